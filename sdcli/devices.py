"""Which device to run on: accelerate's choice, or the user's."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from sdcli.errors import UserError


def accelerator_for(device: str | None) -> Accelerator:
    """An accelerator on `device` (`cpu`, `cuda`, `cuda:1`, `mps`, …), or on the best there is.

    Raises UserError for a device that this machine does not have.
    """
    if device is not None:
        try:
            # The only sure way to know whether a device is there, its number included.
            torch.empty(1, device=torch.device(device))
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--device {device} cannot be used: {reason}", f"one of {', '.join(_present())}") from None
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return Accelerator(cpu=device == "cpu")


def _present() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
