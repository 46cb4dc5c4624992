"""Image files read as upright RGB, whatever their format."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sdcli.errors import UserError

LISTED = 20
"""Images that one error names."""

LONGEST = 100
"""How many times as long as its shorter side an image may be: resized to the network's input, it has to fit into
memory."""


def read_image(source: bytes | str | Path, where: str) -> Image.Image:
    """An image file, or its bytes, in RGB and upright according to its EXIF orientation.

    Grayscale and palettes become RGB, 16 bits become 8, and transparency is dropped, as in timm. Raises UserError that
    starts with `where`, if the image cannot be read or is nothing but a line (`LONGEST`).
    """
    # Pillow would try six other formats first, which takes as long as decoding 32x32 pixels.
    formats = ("WEBP",) if isinstance(source, bytes) and source[8:12] == b"WEBP" else None
    try:
        with warnings.catch_warnings():
            # Of large images, damaged EXIF and the like: an image is read, or refused below.
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
                return as_rgb(opened)
    except Exception as error:  # Pillow's decoders raise anything on broken bytes
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else reason_of(error)
        raise UserError(
            f"{where}: the image cannot be read ({reason})", "a JPEG, PNG, WebP or similar file", "replace or remove it"
        ) from None


def all_of(errors: Sequence[UserError]) -> UserError:
    """One error for several images that cannot be read."""
    if len(errors) == 1:
        return errors[0]
    shown = [f"\n    {error.wrong}" for error in errors[:LISTED]]
    more = f"\n    … ({len(errors) - LISTED} more)" if len(errors) > LISTED else ""
    return errors[0].but(
        wrong=f"{len(errors)} images cannot be read:{''.join(shown)}{more}", fix="replace or remove them"
    )


def why_unreadable(file: str) -> str:
    """What is wrong with an image file, judged by its metadata; "" if nothing is. Opening it could wait forever: it may
    be a named pipe."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return "a broken link" if os.path.islink(file) else "no such file"
    except OSError as error:
        return reason_of(error)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        return kinds.get(stat.S_IFMT(status.st_mode), "a device")
    if status.st_size == 0:
        return "empty"
    return "" if os.access(file, os.R_OK) else "no permission to read it"


def reason_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where an image may say how it is turned."""


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB and upright; of an animation the frame that it shows: the first, where nothing has moved on.

    Values of 16 bits become 8. Files with 32 bits a pixel do not state the range of their values: up to 255 they are
    taken as 8 bits, up to 65,535 as 16.

    Raises ValueError for 32-bit values without a known range, and for an image that is nothing but a line (`LONGEST`).
    """
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels: a side is over {LONGEST} times the other")
    # Of a PNG, metadata may follow the pixels.
    image.load()
    # exif_transpose alone would look for an orientation in every image.
    upright = ImageOps.exif_transpose(image) if any(key in image.info for key in ORIENTED) else image
    return _to_rgb(upright, _has_16_bits(image))


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file states that its integers have 16 bits: Pillow widens those of PGM and signed TIFF to 32."""
    bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample)
    return image.mode != "I" or image.format == "PPM" or bits == (16,)


def _to_rgb(image: Image.Image, has_16_bits: bool) -> Image.Image:
    if image.mode.startswith("I"):
        # convert() would clip 16-bit values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values without a known range")
        if has_16_bits or values.max() > 255:
            values = np.rint(values / 257).astype(np.int64)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit values without a known range")
    if "transparency" in image.info:
        # Converted directly to RGB, palettes with transparency make Pillow warn.
        image = image.convert("RGBA")
    return image.convert("RGB")
