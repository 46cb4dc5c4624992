"""What an exported network says about itself, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdcli import __version__
from sdcli.data.transforms import SMALL, Preprocess
from sdcli.errors import UserError
from sdcli.export.graphs import Section
from sdcli.export.job import Job
from sdcli.network.policies import Policy
from sdcli.recipe.address import FINAL

VERSION = 1
"""Of the layout; `runner.py` refuses another."""
MANIFEST = "manifest.json"


def describe(job: Job, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What belongs to the weights: classes, preprocessing, early exit, and the versions that wrote it."""
    blueprint, calibration = job.network.blueprint, job.network.calibration
    about: dict[str, Any] = {
        "version": VERSION,
        "sdcli": __version__,
        "packages": {name: version(name) for name in ("torch", "timm", *packages)},
        "model": blueprint.architecture.model,
        "exit": job.exit,
        "classes": list(blueprint.classes),
        "preprocess": _preprocess(blueprint.preprocess),
    }
    if job.kind != "staged":
        costs = blueprint.costs()
        about["macs"] = {point: costs[point].macs for point in job.points}
        temperatures = calibration.policy.temperatures if calibration else {}
        return about | {"temperatures": {p: t for p, t in temperatures.items() if p in job.points}}
    policy = policy_of(job)
    about["policy"] = {"kind": policy.kind, "agreement": policy.agreement}
    about |= {"macs": blueprint.passing(policy.exits), "left_out": job.left_out}
    if calibration:
        about["calibration"] = {key: calibration.to_dict()[key] for key in ("promise", "data", "num_images", "date")}
    return about


def policy_of(job: Job) -> Policy:
    """When images leave a staged export: never, where the checkpoint was not calibrated."""
    calibration = job.network.calibration
    return calibration.policy if calibration else Policy(dict.fromkeys(job.cuts))


def _preprocess(preprocess: Preprocess) -> dict[str, Any]:
    """What `data.transforms.eval_transform` does, in numbers."""
    from timm.data.transforms import str_to_pil_interp

    return {
        **preprocess.to_dict(),
        "small": SMALL,
        "resize": [math.floor(side / preprocess.crop_pct) for side in preprocess.size],
        "resample": int(str_to_pil_interp(preprocess.interpolation)),
    }


def of_sections(
    job: Job, sections: Sequence[Section], files: Sequence[Path], packages: Iterable[str]
) -> dict[str, Any]:
    """The manifest of a staged export: `describe`, and each section's file, names, shapes and costs."""
    stages, heads, policy = job.network.stages, job.network.blueprint.head_costs(), policy_of(job)
    entries, before = [], 0
    for section, file in zip(sections, files, strict=True):
        macs = stages[section.exit].macs
        entries.append(
            {
                "exit": section.exit,
                "file": file.name,
                "sha256": sha256(file.read_bytes()).hexdigest(),
                "input": section.input,
                "shape": ["batch", *section.input_shape],
                "dtype": "float32",
                "logits": section.exit,
                "passes": section.passes,
                "asked": section.exit == FINAL or section.exit in policy.exits,
                "threshold": policy.thresholds.get(section.exit),
                "temperature": policy.temperatures.get(section.exit, 1.0),
                "macs": macs - before,
                "head_macs": heads[section.exit].macs,
            }
        )
        before = macs
    assert entries[-1]["exit"] == FINAL
    return describe(job, packages) | {"notes": job.notes, "sections": entries}


def write(manifest: Mapping[str, Any], folder: Path) -> None:
    """Writes it into the folder."""
    text = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_sections(folder: Path) -> list[dict[str, Any]]:
    """The sections of a folder that was just written."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for entry in manifest["sections"]:
        if sha256((folder / entry["file"]).read_bytes()).hexdigest() != entry["sha256"]:
            raise UserError(f"{entry['file']} was not written whole", "a disk that keeps what is written to it")
    return list(manifest["sections"])


def names_of(section: Mapping[str, Any]) -> tuple[str, ...]:
    """What a section returns."""
    return tuple(name for name in (section["logits"], section["passes"]) if name)
