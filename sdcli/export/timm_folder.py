"""`--to timm`: a folder that `timm.create_model("local-dir:PATH")` loads, with a card; sdcli is not needed, but for the
networks of its zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdcli import __version__
from sdcli.data.transforms import SMALL
from sdcli.errors import UserError
from sdcli.export.card import UNKNOWN, front_matter, license_of, plain
from sdcli.export.compare import Reader
from sdcli.export.job import Job
from sdcli.recipe.address import FINAL


def write(job: Job, path: Path) -> None:
    """config.json, model.safetensors and README.md."""
    from timm.models._hub import save_config_for_hf

    blueprint = job.network.blueprint
    # As sdcli evaluates images, and as this network was trained: small ones whole, the centre of large ones.
    shown = {"crop_pct": 1.0, "crop_mode": "squash"} if _shows_whole(job) else {"crop_mode": "center"}
    license = license_of(job.network, job.about, job.license)
    path.mkdir()
    about = {
        "sdcli": __version__,
        "label_names": list(blueprint.classes),
        # Instead of timm's own, which is that of the weights that timm has for this model.
        "pretrained_cfg": {"license": None if license == UNKNOWN else license},
    }
    save_config_for_hf(
        job.network.backbone,
        str(path / "config.json"),
        model_config=about,
        model_args=dict(blueprint.architecture.model_args),
        data_config=blueprint.preprocess.to_dict() | shown,
    )
    state = job.network.backbone.state_dict()
    # The format allows no two tensors that share memory, which tied weights do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "README.md").write_text(_card(job, license), encoding="utf-8")


def _shows_whole(job: Job) -> bool:
    """Whether timm is to show images whole, as sdcli shows small ones; with a note where that is not plain to see.

    sdcli decides for each image and timm for all of them: most of the data's images count, or the network's input where
    nothing is known of them.
    """
    large_input = max(job.network.blueprint.preprocess.size) > SMALL
    if job.small is None:
        how = "the centre of an image" if large_input else "images whole"
        job.notes.append(
            f"config.json shows {how}, by the network's input size: the size of the data's images is not known"
        )
        return not large_input
    whole = job.small >= 0.5
    if 0 < job.small < 1:
        job.notes.append(
            f"{job.small:.0%} of the images have at most {SMALL} pixels a side: sdcli shows these whole and the centre "
            f"of the others; config.json has one rule for all of them: {'whole' if whole else 'the centre'}"
        )
    elif whole and large_input:
        job.notes.append(
            f"config.json shows images whole, as sdcli shows those of up to {SMALL} pixels (crop_mode squash)"
        )
    return whole


def check(job: Job) -> None:
    """Raises UserError for a network that timm's arguments do not describe: a stem that was changed for small images,
    other than by smaller patches, and an encoder, whose classifier is a head of sdcli."""
    architecture = job.network.blueprint.architecture
    if job.network.plan.encoder:
        raise UserError(
            f"--to timm: {architecture.model} has no classifier of its own, and timm does not have sdcli's head",
            "a timm model with a classifier",
            "--to safetensors, or --to onnx",
        )
    if architecture.stem not in ("imagenet", "patch"):
        raise UserError(
            f"--to timm: the stem of {architecture.model} was changed for small images ({architecture.stem}), "
            "which no argument of timm.create_model does",
            "a network with timm's own stem, or with smaller patches",
            "--to safetensors or --to onnx; or train it with --stem imagenet",
        )


def _card(job: Job, license: str) -> str:
    blueprint, data = job.network.blueprint, job.about.dataset
    if license == UNKNOWN:
        job.notes.append("the card states no licence: add one with --license, such as --license apache-2.0")
    final, size = blueprint.costs()[FINAL], "x".join(map(str, blueprint.preprocess.size))
    in_zoo = blueprint.architecture.in_zoo
    lines = [
        *front_matter(job.about, license, blueprint.architecture.model),
        "",
        f"# {blueprint.architecture.model}, trained on {plain(data.name)}",
        "",
        f"An image classifier of {len(blueprint.classes)} classes, trained by self-distillation with sdcli "
        f"{__version__}. This folder holds the whole timm model, without the exits that it was trained with.",
        "",
        f"- **Model:** {blueprint.architecture.model} of {'sdcli, which registers it with timm' if in_zoo else 'timm'}",
        f"- **Parameters:** {final.params / 1e6:.1f} M",
        f"- **MACs:** {final.macs / 1e9:.2f} G at {size} pixels",
        f"- **Data:** {plain(data.name)}",
        f"- **Epochs:** {job.about.epoch}",
        f"- **Licence of the weights:** {license}",
        *_scores(job),
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        *(["import sdcli.zoo  # pip install sdcli: timm alone does not have this architecture"] if in_zoo else []),
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"',
        "config = timm.data.resolve_data_config(model=model)",
        "transform = timm.data.create_transform(**config)",
        'names = model.pretrained_cfg["label_names"]',
        "```",
        "",
    ]
    return "\n".join(lines)


def _scores(job: Job) -> list[str]:
    """Top-1 of the final exit on the split that the checkpoint was scored on, if it was."""
    scores = job.about.scores
    for result in scores.get("exits", []):
        if isinstance(result, dict) and result.get("point") == FINAL and isinstance(result.get("top1"), float):
            return [f"- **Top-1:** {result['top1']:.2f} % ({plain(str(scores.get('split', 'validation')))} split)"]
    return []


def read(path: Path, job: Job) -> Reader:
    """The folder as timm loads it."""
    import timm

    model: Any = timm.create_model(f"local-dir:{path}", pretrained=True).eval()

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {FINAL: model(images)}

    return run


def usage(path: Path, job: Job) -> str:
    """How to load it."""
    first = "import sdcli.zoo; " if job.network.blueprint.architecture.in_zoo else ""
    return f'{first}model = timm.create_model("local-dir:{path}", pretrained=True)'
