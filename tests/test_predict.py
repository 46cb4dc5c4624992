"""`sdcli predict`: photos of every kind are read right, and what is none never stops the others."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, Terminal, refused
from photos import CLASSES, calibrated, encoded, photo, save_malformed, save_network, save_photos
from PIL import Image
from rich.console import Console

from sdcli.cli.predictions import predictions_table
from sdcli.data.images import read_image
from sdcli.network.calibration import Promise
from sdcli.network.checkpoint import describe_again, load_checkpoint
from sdcli.network.heads import HEADS
from sdcli.network.predict import Prediction
from sdcli.network.weights import load


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_network(folder / "last.safetensors")
    save_photos(folder / "photos", 6)
    return folder


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.endswith(" …")]


# What is said about images ----------------------------------------------------------------------------------------


def test_json_has_one_line_per_image_in_the_order_of_the_arguments(sdcli: Command, run: Path):
    third, first = run / "photos" / "photo03.png", run / "photos" / "photo01.png"
    result = sdcli("predict", run, third, first, third, "--json", "--top", 2)
    assert result.code == 0
    rows = records(result.out)
    assert [row["file"] for row in rows] == [str(third), str(first), str(third)]
    assert rows[0] == rows[2]
    assert list(rows[0]) == ["file", "label", "confidence", "exit", "top"]
    assert rows[0]["top"][0] == {"label": rows[0]["label"], "confidence": rows[0]["confidence"]}
    assert [len(row["top"]) for row in rows] == [2, 2, 2] and rows[0]["exit"] == "final"


def test_the_command_says_what_the_network_says(sdcli: Command, run: Path):
    network, files = load(run), sorted((run / "photos").iterdir())
    with torch.no_grad():
        signals = network(torch.stack([network.transform(Image.open(file)) for file in files]))
    together = torch.stack([signals[point].logits for point in network.exits]).mean(dim=0)
    for options, logits in (
        ([], signals["final"].logits),
        (["--exit", "exit2"], signals["exit2"].logits),
        (["--ensemble"], together),
    ):
        rows = records(sdcli("predict", run, run / "photos", "--json", "--batch-size", 4, *options).out)
        probabilities, numbers = logits.softmax(dim=1).max(dim=1)
        assert [row["label"] for row in rows] == [CLASSES[number] for number in numbers]
        assert [row["confidence"] for row in rows] == pytest.approx(probabilities.tolist(), abs=1e-4)


def test_csv_has_a_column_for_each_of_the_top_classes(sdcli: Command, run: Path):
    result = sdcli("predict", run, run / "photos", "--csv", "--top", 3)
    header, *rows = csv.reader(io.StringIO(result.out))
    assert header == ["file", "label", "confidence", "exit", "label2", "confidence2", "label3", "confidence3"]
    assert len(rows) == 6 and all(len(row) == 8 for row in rows)


def test_parquet_holds_what_json_prints(sdcli: Command, run: Path, tmp_path: Path):
    from pyarrow import parquet

    file = tmp_path / "found.parquet"
    result = sdcli("predict", run, run / "photos", "--parquet", file, "--batch-size", 4)
    assert (result.code, result.out) == (0, "")
    assert said(result.err)[-1] == f"{file}: 6 images"
    assert parquet.read_table(file).to_pylist() == records(sdcli("predict", run, run / "photos", "--json").out)


@pytest.mark.parametrize("before", [b"results of yesterday", None])
def test_a_parquet_file_stays_as_it_was_where_no_image_can_be_read(sdcli, run, tmp_path, before):
    bad, file = tmp_path / "bad.png", tmp_path / "found.parquet"
    bad.write_bytes(b"no image")
    if before is not None:
        file.write_bytes(before)
    result = sdcli("predict", run, bad, "--parquet", file)
    assert (result.code, result.out) == (2, "")
    assert f"{file} not written: no image was classified" in said(result.err)
    assert (file.read_bytes() if file.exists() else None) == before
    assert {name.name for name in tmp_path.iterdir()} <= {"bad.png", "found.parquet", "decoded"}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "photo.png",
            "--parquet {}\n  expected: a file whose name ends in .parquet\n  fix:      --parquet photo.parquet",
        ),
        (
            "no/found.parquet",
            "--parquet {}: there is no folder '{parent}'\n  expected: a file in a folder that exists",
        ),
    ],
)
def test_a_parquet_file_that_would_replace_a_photo_or_cannot_be_written_is_refused(sdcli, run, tmp_path, file, message):
    path = tmp_path / file
    result = sdcli("predict", run, run / "photos", "--parquet", path)
    refused(result, message.format(path, parent=path.parent))


def test_the_table_drops_the_next_classes_where_there_is_no_room():
    found = Prediction("cat", 0.9, "exit1", (("cat", 0.9), ("dog", 0.07), ("a very long name of a class", 0.03)))
    rows = [(f"photos/{number}.jpg", found) for number in range(3)]
    for width, shown in ((120, True), (60, False)):
        console = Console(width=width, file=io.StringIO())
        console.print(predictions_table(rows, console))
        text = console.file.getvalue()
        assert ("dog 7.0%" in text) == shown
        assert "photos/2.jpg" in text and "90.0%" in text


# Which exits answer -----------------------------------------------------------------------------------------------


def test_a_calibrated_checkpoint_lets_images_leave_and_says_what_is_promised(sdcli: Command, tmp_path: Path):
    path = tmp_path / "run" / "best.safetensors"
    save_network(path)
    save_photos(tmp_path / "photos", 12)
    promise = Promise("drop", 1.0, 0.5, 0.9, "clopper-pearson", 50)
    calibration = calibrated(path, promise)
    result = sdcli("predict", tmp_path / "run", tmp_path / "photos", "--json")
    network = load(path)
    images = torch.stack([network.transform(photo(number)) for number in range(12)])
    routed = network.route(images, calibration.policy)
    assert [row["exit"] for row in records(result.out)] == [routed.points[place] for place in routed.exits]
    assert len({row["exit"] for row in records(result.out)}) > 1
    first, last = said(result.err)
    assert first == (
        "note: early exit as calibrated on digits (validation); promise: at most 1 point of top-1 accuracy lost against"
        " the plain network, with 90% confidence"
    )
    assert "times the plain network's MACs" in last
    for options in (["--no-early-exit"], ["--exit", "final"]):
        plain = sdcli("predict", tmp_path / "run", tmp_path / "photos", "--json", *options)
        assert {row["exit"] for row in records(plain.out)} == {"final"} and not said(plain.err)
    cheapest = records(sdcli("predict", tmp_path / "run", tmp_path / "photos", "--json", "--budget", 1).out)
    assert {row["exit"] for row in cheapest} == {"exit1"}
    refused(
        sdcli("predict", tmp_path / "run", tmp_path / "photos", "--json", "--budget", 0.2),
        "a budget of 0.2 cannot be met\n  expected: 0.9 or more"
        "\n  fix:      a larger budget, one exit alone (sdcli predict --exit), or exits with a cheaper head (--head linear)",
    )


def test_a_budget_of_a_calibration_without_settings_asks_for_another_calibration(sdcli: Command, tmp_path: Path):
    path = tmp_path / "best.safetensors"
    save_network(path)
    found = calibrated(path)
    describe_again(path, replace(load_checkpoint(path)[1], early_exit=replace(found, curve=())), path)
    refused(
        sdcli("predict", path, save_photos(tmp_path / "photos", 1)[0], "--budget", 0.5),
        "a budget of 0.5 cannot be met: the checkpoint's calibration has no settings to choose from\n"
        "  expected: settings that sdcli calibrate has found for this network\n"
        "  fix:      sdcli calibrate RUN, or a threshold instead",
    )


def test_a_head_that_is_not_imported_is_asked_for_without_naming_a_command(sdcli, run, monkeypatch):
    path = run / "last.safetensors"
    kind = load_checkpoint(path)[1].blueprint.heads["exit1"]
    monkeypatch.setattr(
        HEADS, "entries", {name: entry for name, entry in HEADS.entries.items() if name != kind.split("/")[0]}
    )
    refused(
        sdcli("predict", path, run / "photos"),
        f"'{path}': the head of exit1 is '{kind}', which this sdcli does not have\n"
        "  expected: the file that registers it, which it was trained with\n"
        "  fix:      add --import FILE.py to the command; in Python, import that file first",
    )


def test_without_a_calibration_the_final_exit_answers_and_that_is_said_once(sdcli: Command, run: Path):
    result = sdcli("predict", run, run / "photos", "--batch-size", 1)
    assert said(result.err) == [
        "note: not calibrated for early exit: the final exit answers (sdcli calibrate finds when images may leave)"
    ]


def test_a_threshold_needs_no_calibration(sdcli: Command, run: Path):
    rows = records(sdcli("predict", run, run / "photos", "--json", "--threshold", 0).out)
    assert {row["exit"] for row in rows} == {"exit1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--exit", "exit1", "--ensemble"],
            "--exit and --ensemble exclude each other\n"
            "  expected: one of --exit, --ensemble, --budget, --threshold, --no-early-exit",
        ),
        (["--json", "--csv"], "--json and --csv exclude each other\n  expected: one of --json, --csv, --parquet"),
        (
            ["--exit", "exit9"],
            "unknown exit 'exit9'\n  expected: one of exit1, exit2, exit3, final\n  fix:      did you mean 'exit3'?",
        ),
        (["--exit", ""], "unknown exit ''\n  expected: one of exit1, exit2, exit3, final"),
        (
            ["--budget", 0.5],
            "a budget of 0.5: the checkpoint is not calibrated\n"
            "  expected: thresholds that sdcli calibrate has found for this network\n"
            "  fix:      sdcli calibrate RUN, or a threshold instead",
        ),
        (["--threshold", 2], "invalid value: --threshold 2\n  expected: a number from 0 to 1"),
    ],
)
def test_options_that_cannot_be_met_are_one_message(sdcli: Command, run: Path, options: list, message: str):
    refused(sdcli("predict", run, run / "photos", *options), message)


def test_a_single_image_that_cannot_be_read_leaves_no_others(sdcli: Command, run: Path, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = sdcli("predict", run, tmp_path / "bad.png")
    assert result.code == 2
    assert "error: 1 of 1 path could not be read\n  expected: images that can be read, as named above" in result.err


# Which files ------------------------------------------------------------------------------------------------------


def test_folders_patterns_and_lists_name_the_same_files(sdcli: Command, run: Path, monkeypatch: pytest.MonkeyPatch):
    photos = run / "photos"
    names = [str(file) for file in sorted(photos.iterdir())]
    expected = records(sdcli("predict", run, *names, "--json").out)
    assert len(expected) == 6
    for paths in ([photos], [photos / "*.png"], [photos / "photo0[0-2].png", photos / "photo0[!0-2].png"]):
        assert records(sdcli("predict", run, *paths, "--json").out) == expected
    stdin = io.TextIOWrapper(io.BytesIO("".join(f"{name}\n" for name in names).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert records(sdcli("predict", run, "-", "--json").out) == expected


def test_a_folder_is_searched_at_any_depth_and_other_files_are_noted(sdcli: Command, run: Path, tmp_path: Path):
    save_photos(tmp_path / "a" / "b", 1)
    save_photos(tmp_path / "a", 2)
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("no photo")
    result = sdcli("predict", run, tmp_path, "--json")
    assert [Path(row["file"]).relative_to(tmp_path) for row in records(result.out)] == [
        Path("a/photo00.png"),
        Path("a/photo01.png"),
        Path("a/b/photo00.png"),
    ]
    assert f"skipped 1 file without the extension of an image: {tmp_path}/a/notes.txt" in result.err


def test_a_file_with_a_pattern_in_its_name_is_that_file(sdcli: Command, run: Path, tmp_path: Path):
    photo(1).save(tmp_path / "photo[1].png")
    photo(2).save(tmp_path / "photo1.png")
    (row,) = records(sdcli("predict", run, tmp_path / "photo[1].png", "--json").out)
    assert row["file"].endswith("photo[1].png")


def test_paths_that_stand_for_nothing_are_one_message(sdcli: Command, run: Path, tmp_path: Path, monkeypatch):
    save_photos(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    kinds = "an image, a folder of images, a pattern such as 'photos/*.jpg', or - for a list on standard input"
    refused(
        sdcli("predict", run, tmp_path / "fotos"),
        f"'{tmp_path}/fotos' does not exist\n  expected: {kinds}\n  fix:      did you mean '{tmp_path}/photos'?",
    )
    refused(
        sdcli("predict", run, tmp_path / "*.gif"),
        f"'{tmp_path}/*.gif' matches no file\n  expected: a pattern such as 'photos/*.jpg'\n  fix:      check the pattern",
    )
    assert f"folder '{tmp_path}/empty' has no images" in sdcli("predict", run, tmp_path / "empty").err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "standard input lists no path" in sdcli("predict", run, "-").err


def test_beside_others_a_path_that_stands_for_nothing_is_named_and_counted(sdcli: Command, run: Path, tmp_path: Path):
    result = sdcli("predict", run, tmp_path / "nothing.png", run / "photos", "--json")
    assert (result.code, len(records(result.out))) == (2, 6)
    assert f"'{tmp_path}/nothing.png' does not exist" in result.err
    assert "error: 1 of 7 paths could not be read; the others are done" in result.err


# Images of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_sixty_malformed_files_do_not_stop_the_good_ones(sdcli: Command, run: Path, tmp_path: Path, workers: int):
    bad = save_malformed(tmp_path / "bad")
    assert len(bad) >= 60
    good = sorted((run / "photos").iterdir())
    mixed = [
        path
        for place, path in enumerate(bad)
        for path in ([good[place // 10], path] if place % 10 == 0 and place < 60 else [path])
    ]
    result = sdcli("predict", run, *mixed, "--json", "--batch-size", 16, "--workers", workers)
    assert result.code == 2 and "Traceback" not in result.err
    assert [row["file"] for row in records(result.out)] == [str(file) for file in good]
    assert records(result.out) == records(sdcli("predict", run, *good, "--json").out)
    lines = [line for line in said(result.err) if line.startswith(("'", "folder '"))]
    assert len(lines) == len(bad) and all(any(str(path) in line for line in lines) for path in bad)
    assert f"error: {len(bad)} of {len(mixed)} paths could not be read; the others are done" in result.err


def test_strict_stops_at_the_first_image_that_cannot_be_read(sdcli: Command, run: Path, tmp_path: Path):
    (tmp_path / "empty.png").write_bytes(b"")
    result = sdcli("predict", run, tmp_path / "empty.png", run / "photos", "--json", "--strict")
    assert (result.code, result.out) == (2, "")
    assert f"error: '{tmp_path}/empty.png': the image cannot be read (empty)" in result.err


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1).astype(np.uint8)


def as_array(content: bytes) -> np.ndarray:
    return np.asarray(read_image(content, "image"))


def test_an_image_is_turned_upright_by_its_exif_orientation():
    upright = photo(1)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, it has to be turned clockwise
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.array_equal(as_array(encoded(turned, kind, exif=exif, **options)), np.asarray(upright)), kind
    jpeg = as_array(encoded(turned, "JPEG", exif=exif, quality=95, subsampling=0))
    assert np.abs(jpeg.astype(int) - np.asarray(upright)).mean() < 8


def test_an_orientation_counts_wherever_a_file_states_it():
    upright = photo(1)
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    chunks, rest = {}, encoded(turned, "PNG", exif=exif)[8:]
    while rest:
        length = 12 + int.from_bytes(rest[:4], "big")
        chunks[rest[4:8]], rest = rest[:length], rest[length:]
    assert list(chunks) == [b"IHDR", b"eXIf", b"IDAT", b"IEND"]
    late = b"\x89PNG\r\n\x1a\n" + b"".join(chunks[name] for name in (b"IHDR", b"IDAT", b"eXIf", b"IEND"))
    assert np.array_equal(as_array(late), np.asarray(upright))
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    assert np.array_equal(as_array(encoded(turned, "WEBP", lossless=True, xmp=xmp.encode())), np.asarray(upright))


def test_a_list_whose_names_end_with_nul_is_one_message(sdcli: Command, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a.png\0b[1].png\0"))
    result = sdcli("predict", run, "-")
    assert result.code == 2 and "Traceback" not in result.err and "matches no file" in result.err


def test_transparency_is_dropped_as_timm_drops_it():
    image = photo(1).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert np.array_equal(as_array(encoded(image, "PNG")), np.asarray(photo(1)))
    palette = photo(1).quantize(16)
    assert np.array_equal(as_array(encoded(palette, "PNG", transparency=0)), np.asarray(palette.convert("RGB")))


def test_cmyk_grey_palette_and_bilevel_become_rgb():
    image = photo(1)
    cmyk = as_array(encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk.astype(int) - np.asarray(image)).mean() < 8
    luminance = np.asarray(image.convert("L"))
    assert np.array_equal(as_array(encoded(image.convert("L"), "PNG")), grey(luminance))
    assert np.array_equal(as_array(encoded(image.convert("LA"), "PNG")), grey(luminance))
    bits = image.convert("1")
    assert np.array_equal(as_array(encoded(bits, "PNG")), grey(np.asarray(bits) * 255))
    few = image.quantize(8)
    assert np.array_equal(as_array(encoded(few, "PNG")), np.asarray(few.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert np.array_equal(as_array(encoded(Image.fromarray(values), kind)), grey(np.array([[0, 1, 128, 255]])))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    first = as_array(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.array_equal(first, np.asarray(frames[0]))


# Where output goes ------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_ends_it_quietly(run: Path):
    command = [sys.executable, "-m", "sdcli", "predict", str(run), *[str(run / "photos" / "photo01.png")] * 600]
    process = subprocess.Popen(
        [*command, "--json", "--device", "cpu", "--batch-size", "8", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert len(said(err)) == 1 and said(err)[0].startswith("note: ")


def test_a_terminal_has_a_bar_where_images_are_many(sdcli: Command, run: Path, monkeypatch: pytest.MonkeyPatch):
    for batch_size, shown in ((2, True), (6, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        assert sdcli("predict", run, run / "photos", "--batch-size", batch_size).code == 0
        assert ("predicting" in terminal.getvalue()) == shown


def test_names_of_files_are_printed_not_obeyed(sdcli: Command, run: Path, tmp_path: Path):
    name = tmp_path / "a\x1b[31m[bold].png"
    photo(1).save(name)
    table = sdcli("predict", run, name).out
    assert "\x1b" not in table and "[bold].png" in table
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(strange, "wb") as file:
        file.write(encoded(photo(1), "PNG"))
    for option in ("--json", "--csv"):
        assert "caf" in sdcli("predict", run, os.fsdecode(strange), option).out
