"""Checkpoints that answer in different ways, photos of all kinds, and files that are none."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from sdcli.network.blueprint import Blueprint
from sdcli.network.calibration import Calibration, OperatingPoint, Promise
from sdcli.network.checkpoint import Description, TrainedOn, describe_again, save_checkpoint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.policies import Policy
from sdcli.network.weights import rebuild
from sdcli.recipe.schema import Network

CLASSES = [f"class {number}" for number in range(10)]


def save_network(path: Path, name: str = "test_resnet") -> MultiExit:
    """A checkpoint, said to be trained on the digits, whose exits are neither sure of all images nor of none."""
    torch.manual_seed(0)
    blueprint = Blueprint.draft(Network(), name, CLASSES)
    network = build(blueprint).eval()
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.out_features == len(CLASSES):
            nn.init.normal_(module.weight, std=30.0)
    about = Description(blueprint, TrainedOn("digits", "digits", 0.1, 42), recipe={}, epoch=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, network.state_dict(), about)
    return network


def calibrated(path: Path, promise: Promise | None = None, count: int = 12) -> Calibration:
    """Stores a calibration in the checkpoint, as `sdcli calibrate` would: of `count` photos some leave at exit1."""
    network, about = rebuild(path)
    temperatures = {"exit1": 2.0, "final": 1.5}
    with torch.no_grad():
        logits = network.eval()(torch.stack([network.transform(photo(number)) for number in range(count)]))[
            "exit1"
        ].logits
    scores = (logits / 2).softmax(dim=1).amax(dim=1).sort().values
    # In the widest gap: other batches change the last bits.
    place = int((scores[1:] - scores[:-1]).argmax())
    limit = float(scores[place : place + 2].mean())
    policy = Policy({"exit1": limit, "exit3": None}, temperatures=temperatures)
    curve = (OperatingPoint({"exit1": 0.0}, 0.9, 40.0), OperatingPoint(policy.thresholds, 1.1, 50.0))
    calibration = Calibration(policy, curve, 100, "digits (validation)", "2026-11-24", promise)
    describe_again(path, replace(about, early_exit=calibration), path)
    return calibration


def photo(number: int, width: int = 48, height: int = 40) -> Image.Image:
    """An image of large patches, so that a little compression changes no answer."""
    pixels = np.random.RandomState(number).randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def save_photos(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"photo{number:02}.png" for number in range(count)]
    for number, file in enumerate(files):
        photo(number).save(file)
    return files


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG that says that it is this large, and has the pixels of one line."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (1 + 3 * min(width, 1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def save_malformed(folder: Path) -> list[Path]:
    """60 paths that no image can be read from."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF"}
    contents: dict[str, bytes] = {}
    for suffix, kind in kinds.items():
        whole = encoded(photo(1), kind)
        for share in (0.0, 0.02, 0.2, 0.4):
            contents[f"cut{int(100 * share)}.{suffix}"] = whole[: int(len(whole) * share)]
        contents[f"zeros.{suffix}"] = bytes(len(whole))
        contents[f"text.{suffix}"] = b"This is no image.\n" * 20
        contents[f"noise.{suffix}"] = whole[:8] + np.random.RandomState(2).bytes(500)
    contents |= {
        "bomb.png": huge_png(60_000, 60_000),
        "bomb2.png": huge_png(2**31 - 1, 2**31 - 1),
        "zero.png": huge_png(0, 0),
        "zero-height.png": huge_png(10, 0),
        "page.jpg": b"<!doctype html><html><body>404</body></html>",
        "line.png": encoded(Image.new("RGB", (1, 5000)), "PNG"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    floats = folder / "floats.tif"
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(floats)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    return sorted(folder.iterdir())
