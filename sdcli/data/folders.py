"""Data sets of image files: one folder per class."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.dataset import SPLITS, ImageData, Images, listed, printable, whole_split
from sdcli.data.images import read_image, why_unreadable
from sdcli.data.splits import scored_as_test, standard_splits
from sdcli.errors import UserError, counted, did_you_mean

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision's ImageFolder; case does not matter."""


@dataclass(frozen=True, eq=False)
class _Files(Images):
    """Images in files of their own."""

    paths: NDArray[np.bytes_]
    """An array, not a list: reading a list of strings in a forked worker copies all of it, through reference counts."""
    root: str
    """The data set's folder."""

    def read(self, row: int) -> Image.Image:
        path = os.fsdecode(self.paths[row])
        return read_image(path, f"'{path}'")

    def file(self, row: int) -> str:
        return printable(os.path.relpath(os.fsdecode(self.paths[row]), self.root))

    def identity(self) -> tuple[int, str] | None:
        digest = blake2b()
        for path in self.paths.tolist():
            try:
                status = os.stat(path)
            except OSError:
                return None  # reading it reports the reason
            digest.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
        return len(self.paths), digest.hexdigest()


@dataclass
class _Found:
    """What the folder of a split holds."""

    images: list[tuple[str, str]] = field(default_factory=list)
    """(class, file), sorted by class, then folder, then file name, as in torchvision's ImageFolder."""
    empty: list[str] = field(default_factory=list)
    """Class folders without an image."""
    skipped: list[str] = field(default_factory=list)
    """Files in class folders without the extension of an image."""
    unlisted: list[str] = field(default_factory=list)
    """Images that the split's file of labels does not list."""
    loose: list[str] = field(default_factory=list)
    """Images beside the class folders."""
    unreadable: list[str] = field(default_factory=list)
    """Images that cannot be read, with the reason."""

    @property
    def classes(self) -> list[str]:
        return sorted({label for label, _ in self.images})


def open_class_folders(name: str, path: Path) -> ImageData | None:
    """The data set below `path`: `[SPLIT/]CLASS/**/*.jpg`, or a single folder with this layout; None if no folder holds
    an image.

    Folders are read as by torchvision's ImageFolder: the class is the folder directly below the split, and images may
    lie at any depth in it. Hidden files and folders are ignored. A split may have its labels in a file instead, as
    Tiny-ImageNet's does: `val/val_annotations.txt`, with lines FILE<TAB>CLASS (further columns are ignored) for the
    images in `val/images` or in `val`. Other splits without labels are left out, with a note, and so are images beside
    the folders of splits or classes, and folders beside those of splits.

    Raises UserError for files that cannot be images (empty, or not regular), all at once and for all splits, and for a
    class that the training split does not have. Raises OSError for folders that cannot be read.
    """
    layout = _layout(path)
    folders, unlabelled = layout.splits, layout.unlabelled
    if not folders:
        return None
    chosen, notes = standard_splits(name, list(folders))
    found = {split: _read_split(folders[own], path) for split, own in chosen.items()}
    _refuse_unreadable(name, [file for split in found.values() for file in split.unreadable])
    first = next(iter(found))
    for split in [split for split in found if split != first and found[split].classes == ["images"]]:
        if "images" not in found[first].classes:
            unlabelled.append(chosen[split])
            del found[split]
    classes = found[first].classes
    numbers = {label: number for number, label in enumerate(classes)}
    splits = {}
    for split, files in found.items():
        _check_classes(files.classes, found[first], folders[chosen[split]], folders[chosen[first]])
        labels = np.array([numbers[label] for label, _ in files.images], dtype=np.int64)
        paths = np.array([os.fsencode(file) for _, file in files.images])
        splits[split] = whole_split(chosen[split], _Files(paths, str(path)), labels)
    notes += [_without_labels(own) for own in unlabelled]
    notes += _about_folders(layout, path)
    notes += _about_files(
        found, [os.path.relpath(folders[chosen[first]] / label, path) for label in found[first].empty], layout, path
    )
    splits, more_notes = scored_as_test(splits)
    return ImageData(name, str(path), tuple(map(printable, classes)), splits, notes=(*notes, *more_notes))


def unlabelled_images(path: Path) -> list[str]:
    """The image files of a folder whose images lie in no class folders.

    Empty for a folder with class folders or no images, and for what is no folder.
    """
    folder = path.expanduser()
    if not folder.is_dir() or _has_classes(folder):
        return []
    files = sorted(walk(folder))
    return [os.path.join(below, name) for below, names in files for name in sorted(filter(_is_image, names))]


@dataclass
class _Layout:
    """How the folder of a data set is divided."""

    splits: dict[str, Path]
    """The folder of each split, by the data set's own names."""
    unlabelled: list[str] = field(default_factory=list)
    """Splits whose images have no classes."""
    unused: list[Path] = field(default_factory=list)
    """Folders with images beside those of the splits."""
    loose: list[Path] = field(default_factory=list)
    """Images beside the folders of splits or above them."""


def _layout(path: Path) -> _Layout:
    own_names = [own for names in SPLITS.values() for own in names]
    named = {folder.name: folder for folder in _folders(path) if folder.name.lower() in own_names}
    splits = {own: folder for own, folder in named.items() if _has_classes(folder) or _annotations(folder).is_file()}
    if splits:
        return _Layout(
            splits,
            [own for own, folder in named.items() if own not in splits and _has_images(folder)],
            [folder for folder in _folders(path) if folder.name not in named and _shows_images(folder)],
            _loose(path),
        )
    with_images = list(filter(_has_images, _folders(path)))
    if len(with_images) == 1 and _has_classes(with_images[0]):
        # An archive often unpacks into a folder of its own.
        layout = _layout(with_images[0])
        layout.loose = [*_loose(path), *layout.loose]
        return layout
    for folder in with_images:
        for below in _folders(folder):
            if below.name.lower() in SPLITS["train"] and _has_images(below):
                is_data_set = _has_classes(below)
                raise UserError(
                    f"'{folder}' holds a split, '{below.name}', where the folder of a class was expected",
                    "splits above classes: train/CLASS/*.jpg",
                    f"--dataset {folder}" if is_data_set else f"move its images to {below.name}/{folder.name}",
                )
    return _Layout({"train": path} if with_images else {})


def _folders(path: Path) -> list[Path]:
    # Hidden ones (".ipynb_checkpoints") are never classes.
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [path / name for name in sorted(names) if not _leads_back(str(path), name)]


def _loose(path: Path) -> list[Path]:
    """The images in the folder itself."""
    _, names = next(walk(path))
    return [path / name for name in sorted(filter(_is_image, names))]


def _has_classes(path: Path) -> bool:
    return any(map(_has_images, _folders(path)))


def _has_images(path: Path) -> bool:
    return any(map(_is_image, (file for _, files in walk(path) for file in files)))


def _shows_images(path: Path) -> bool:
    """Whether a folder that the data set does not need holds images; it may be one that cannot be read."""
    try:
        return _has_images(path)
    except OSError:
        return False


def _is_image(file: str) -> bool:
    return file.lower().endswith(EXTENSIONS)


def walk(path: Path | str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `path` down and the files in it, without hidden ones. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(path, onerror=fail, followlinks=True):
        # macOS leaves "._photo.jpg" beside photos; they are not images.
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(folder, name)]
        yield folder, [file for file in files if not file.startswith(".")]


def _leads_back(folder: str, name: str) -> bool:
    """Whether `name` is a link to a folder above it, which would be followed forever."""
    if not os.path.islink(link := os.path.join(folder, name)):
        return False
    target = os.path.realpath(link)
    return os.path.commonpath([os.path.realpath(folder), target]) == target


def _read_split(path: Path, root: Path) -> _Found:
    """What the split's folder holds; files that are reported are named as seen from `root`."""
    found = _Found()
    if _annotations(path).is_file():
        _read_annotated(path, root, found)
        return found
    found.loose = [os.path.relpath(file, root) for file in _loose(path)]
    for folder in _folders(path):
        before = len(found.images) + len(found.unreadable)
        for below, files in sorted(walk(folder)):
            for file in sorted(files):
                full = os.path.join(below, file)
                if _is_image(file):
                    _add(found, folder.name, full, root)
                else:
                    found.skipped.append(os.path.relpath(full, root))
        if len(found.images) + len(found.unreadable) == before:
            found.empty.append(folder.name)
    return found


def _add(found: _Found, label: str, file: str, root: Path) -> None:
    if reason := why_unreadable(file):
        found.unreadable.append(f"{os.path.relpath(file, root)} ({reason})")
    else:
        found.images.append((label, file))


def _annotations(path: Path) -> Path:
    """The file of a split's labels where its images are not sorted into class folders."""
    return path / f"{path.name}_annotations.txt"


def _read_annotated(path: Path, root: Path, found: _Found) -> None:
    file = _annotations(path)
    folder = path / "images" if (path / "images").is_dir() else path
    labels: dict[str, str] = {}
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        columns = [column.strip() for column in os.fsdecode(line).split("\t")]
        if columns == [""]:
            continue
        image, label = columns[:2] if len(columns) > 1 else ("", "")
        wrong = ""
        if not image or not label:
            wrong = "no file and class separated by a tab"
        elif os.path.isabs(image) or ".." in Path(image).parts:
            wrong = f"'{image}' lies outside of '{folder}'"
        elif labels.setdefault(image, label) != label:
            wrong = f"'{image}' has two classes, '{labels[image]}' and '{label}'"
        if wrong:
            raise UserError(
                f"'{file}', line {number}: {wrong}",
                "one line FILE<TAB>CLASS for every image; further columns are ignored",
                "repair or remove the line",
            )
    if not labels:
        raise UserError(f"'{file}' lists no image", "a line FILE<TAB>CLASS for every image", "fill or remove the file")
    for label, image in sorted((label, image) for image, label in labels.items()):
        _add(found, label, str(folder / image), root)
    known = {str(folder / image) for image in labels}
    for below, files in sorted(walk(folder)):
        for full in (os.path.join(below, name) for name in sorted(files) if _is_image(name)):
            if full not in known:
                found.unlisted.append(os.path.relpath(full, root))


def _about_folders(layout: _Layout, root: Path) -> list[str]:
    if not layout.unused:
        return []
    names = [os.path.relpath(folder, root) for folder in layout.unused]
    verb = "is" if len(names) == 1 else "are"
    first = next(iter(layout.splits.values()))
    return [
        f"{counted(len(names), 'folder')} with images {verb} not used: {listed(names)} (only the splits are read: "
        f"{', '.join(layout.splits)}; the folder of a class belongs in each of them: {first.name}/CLASS/*.jpg)"
    ]


def _about_files(found: Mapping[str, _Found], empty: Sequence[str], layout: _Layout, root: Path) -> list[str]:
    notes = []
    loose = [os.path.relpath(file, root) for file in layout.loose]
    if loose := [*loose, *(file for split in found.values() for file in split.loose)]:
        notes.append(f"skipped {counted(len(loose), 'image')} outside of the class folders: {listed(loose, 3)}")
    if empty:
        notes.append(f"left out {counted(len(empty), 'class folder')} without images: {listed(empty)}")
    if skipped := [file for split in found.values() for file in split.skipped]:
        notes.append(f"skipped {counted(len(skipped), 'file')} without the extension of an image: {listed(skipped, 3)}")
    if unlisted := [file for split in found.values() for file in split.unlisted]:
        notes.append(
            f"skipped {counted(len(unlisted), 'image')} without a line in the annotations: {listed(unlisted, 3)}"
        )
    return notes


def _refuse_unreadable(name: str, files: Sequence[str]) -> None:
    if files:
        raise UserError(
            f"'{name}': {counted(len(files), 'image file')} cannot be read: {listed(files, 20)}",
            "regular files that are not empty",
            "replace or remove them",
        )


def _check_classes(classes: Sequence[str], first: _Found, path: Path, first_path: Path) -> None:
    """Raises UserError where the split in `path` has a class that the first one, in `first_path`, does not have."""
    known = set(first.classes)
    extra = next((label for label in classes if label not in known), None)
    if extra is None:
        return
    if extra in first.empty:
        raise UserError(
            f"'{path / extra}' holds images, but '{first_path / extra}' holds none",
            "images of every class in the first split",
            "add some, or remove the class from every split",
        )
    annotated = _annotations(path).is_file()
    raise UserError(
        f"'{_annotations(path)}': there is no class '{extra}' in '{first_path}'"
        if annotated
        else f"'{path / extra}': there is no such class in '{first_path}'",
        "the same classes in every split" if annotated else "the same folder names in every split",
        did_you_mean(extra, first.classes) or ("repair the file" if annotated else "rename or remove the folder"),
    )


def _without_labels(own: str) -> str:
    return (
        f"split '{own}' is left out: its images have no classes (expected {own}/CLASS/*.jpg, or {own}/{own}"
        "_annotations.txt with a line FILE<TAB>CLASS for every image)"
    )
