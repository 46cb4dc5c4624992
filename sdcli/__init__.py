"""Self-distillation for timm models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdcli.errors import UserError
    from sdcli.method.losses import LOSSES
    from sdcli.method.signals import SIGNALS
    from sdcli.network.cuts import find_stages
    from sdcli.network.heads import HEADS
    from sdcli.network.weights import load

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "errors",
    "find_stages": "network.cuts",
    "HEADS": "network.heads",
    "load": "network.weights",
    "LOSSES": "method.losses",
    "SIGNALS": "method.signals",
}
__all__ = ["HEADS", "LOSSES", "SIGNALS", "UserError", "__version__", "find_stages", "load"]


def __getattr__(name: str) -> Any:
    """The public names, whose modules are imported when they are first asked for: `import sdcli` loads no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sdcli' has no attribute '{name}'")
    return getattr(import_module(f"sdcli.{_PUBLIC[name]}"), name)
