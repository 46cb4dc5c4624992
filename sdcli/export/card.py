"""What model cards have in common: the fields that the Hugging Face hub reads, licences, and names as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdcli.data.dataset import NAMED
from sdcli.network.checkpoint import Description
from sdcli.network.multi_exit import MultiExit

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

UNKNOWN = "unknown"
"""The hub's name for a licence that nobody has stated."""
TASK = "image-classification"


def front_matter(about: Description, license: str, name: str, results: Sequence[EvalResult] = ()) -> list[str]:
    """The hub's fields as the lines that begin a card; `results` are scores of the model `name`."""
    from huggingface_hub import ModelCardData

    hub = hub_id(about.dataset.source)
    data = ModelCardData(
        library_name="timm",
        license=license,
        tags=[TASK, "timm", "sdcli"],
        pipeline_tag=TASK,
        datasets=[hub] if hub else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    return ["---", *data.to_yaml().splitlines(), "---"]


def hub_id(source: str) -> str:
    """The id of a data set on the hub; "" for a local one."""
    if source in NAMED:
        return NAMED[source].hub or ""
    return source if "/" in source and " " not in source else ""


def license_of(network: MultiExit, about: Description, stated: str = "") -> str:
    """The licence that was stated, or that of the pretrained weights it was trained from; `UNKNOWN` where nobody has
    stated one."""
    if stated:
        return stated
    student = about.recipe.get("networks", {}).get("student", {})
    if isinstance(student, dict) and student.get("weights") == "pretrained":
        config: Any = network.backbone.pretrained_cfg
        return str(config.get("license") or UNKNOWN)
    return UNKNOWN


def plain(text: str) -> str:
    """A name that a user has chosen as one line of Markdown that shows it and does nothing else."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"[<>\[\]`*|#\\&~]|(?<![^\W_])_|_(?![^\W_])", lambda found: "\\" + found[0], line) or "data"
