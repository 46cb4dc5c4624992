"""The study: its cells are commands that work, its records are those cells, and its page is made of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest

from sdcli.compare.record import read_record
from sdcli.method.check import check_with_model
from sdcli.recipe.load import read_recipe
from sdcli.recipe.merge import Override

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "benchmarks" / "study").glob("*.toml"))

sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
from run import Lanes, expected_hours, needed_again, read_cells, record_of  # noqa: E402

TINY = """
dataset = "digits"
checkpoint = "last"
results = "results"
calibrate = ["--budget", "0.9"]

[networks.tiny]
model = "test_resnet"
speed = 100
options = ["--device", "cpu", "--limit-val", "20"]

[regimes.few]
images = 60
epochs = 1
options = ["--limit-train", "60"]

[rows.baseline]
options = ["--recipe", "baseline", "--recipe", "schedules/cosine"]

[rows.longer]
options = ["--recipe", "baseline", "--recipe", "schedules/cosine"]
epochs = 2

[rows.exits-only]
options = ["--recipe", "exits-only"]
start = "baseline"

[[plan]]
rows = ["exits-only", "baseline"]
regimes = ["few"]
seeds = [3]
"""


def option(options: tuple[str, ...], flag: str) -> list[str]:
    return [value for name, value in pairwise(options) if name == flag]


@pytest.mark.parametrize("study", STUDIES, ids=lambda file: file.stem)
def test_every_row_of_a_study_is_a_recipe_that_its_networks_can_train(study):
    cells = read_cells(tomllib.loads(study.read_text()))
    rows = {(cell.network, cell.row): cell for cell in cells}
    assert len(rows) >= 3
    # Every network and every row once.
    seen: set[str] = set()
    for cell in rows.values():
        if {f"network {cell.network}", f"row {cell.row}"} <= seen:
            continue
        seen |= {f"network {cell.network}", f"row {cell.row}"}
        overrides = [Override.parse(text) for text in option(cell.options, "--set")]
        overrides += [Override.unset(key) for key in option(cell.options, "--unset")]
        for key in ("head", "exits"):
            overrides += [Override(f"networks.student.{key}", v, f"--{key}") for v in option(cell.options, f"--{key}")]
        recipe, _ = read_recipe(option(cell.options, "--recipe"), overrides)
        check_with_model(recipe, cell.options[0])
        assert (recipe.title, cell.epochs > 0) == (cell.row, True)


@pytest.mark.parametrize("study", STUDIES, ids=lambda file: file.stem)
def test_every_record_is_a_cell_of_its_study(study):
    table = tomllib.loads(study.read_text())
    cells = {record_of(table, cell): cell for cell in read_cells(table)}
    for file in sorted((ROOT / table["results"]).rglob("*.json")):
        cell = cells[file.relative_to(ROOT)]
        record = read_record(file)
        assert (record.label, record.seed, record.checkpoint) == (cell.row, cell.seed, table["checkpoint"])
        assert record.training is not None and record.test.split == "test"
        assert record.epoch == record.training.epochs
        assert file.stat().st_size < 16_000


def test_the_page_of_the_study_is_made_from_its_records():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_study import FOLDER, README, readme_table, study, with_table
    finally:
        sys.path.pop(0)
    page = (FOLDER / "study.md").read_text(encoding="utf-8")
    assert page == study(FOLDER / "results"), "run python docs/make_study.py"
    readme = README.read_text(encoding="utf-8")
    assert readme.count("<!-- study -->") == 1
    assert readme == with_table(readme, readme_table(FOLDER / "results")), "run python docs/make_study.py"
    pictures = [part.split(")")[0] for part in page.split("](")[1:] if ".png" in part.split(")")[0]]
    assert (FOLDER / "study.png").is_file()
    assert pictures and all((FOLDER / picture).is_file() for picture in pictures)


def run_study(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "study" / "run.py"), "study.toml", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_study_runs_what_is_missing_in_the_order_of_what_starts_from_what(tmp_path):
    (tmp_path / "study.toml").write_text(TINY)
    planned = run_study(tmp_path, "--dry-run")
    assert "0 of 2 cells are done, 2 are missing:" in planned.stdout
    assert planned.stdout.count("sdcli train test_resnet") == 2 and not (tmp_path / "results").exists()
    done = run_study(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = sorted((tmp_path / "results" / "tiny" / "few").glob("*.json"))
    assert [file.name for file in records] == ["baseline-seed3.json", "exits-only-seed3.json"]
    plain, exits = (json.loads(file.read_text()) for file in records)
    finals = [record["test"]["exits"][-1]["top1"] for record in (plain, exits)]
    assert finals[0] == finals[1], "the backbone was frozen"
    assert exits["training"]["macs"] < plain["training"]["macs"]
    assert plain["early"] == []
    assert exits["early"][0]["budget"] is None and exits["early"][0]["time"] > 0 and exits["early"][0]["macs"] < 1
    again = run_study(tmp_path)
    assert "2 of 2 cells are done, 0 are missing:" in again.stdout
    # What others start from is needed again once its run folder is gone.
    records[1].unlink()
    assert "once more" not in run_study(tmp_path, "--dry-run").stdout
    shutil.rmtree(tmp_path / "runs")
    planned = run_study(tmp_path, "--dry-run")
    assert "1 of 2 cells are done, 1 are missing:" in planned.stdout
    assert "run once more, for their weights: tiny/few/baseline-seed3" in planned.stdout
    assert planned.stdout.count("sdcli train test_resnet") == 2


def test_a_teacher_is_another_network_s_cell_and_ends_first(tmp_path):
    study = tomllib.loads(
        TINY
        + """
[networks.large]
model = "test_vit"
speed = 50
options = []

[rows.kd]
options = ["--recipe", "kd"]
teacher = "baseline"
cost = 2
"""
    )
    study["networks"]["tiny"]["teacher"] = "large"
    study["plan"] = [
        {"networks": ["tiny"], "rows": ["kd"], "regimes": ["few"], "seeds": [1]},
        {"networks": ["large"], "rows": ["baseline"], "regimes": ["few"], "seeds": [1]},
    ]
    taught, teacher = read_cells(study)
    words = taught.command("digits", tmp_path, device="cuda")
    assert option(tuple(words), "--set")[1:] == [
        "networks.teacher.model=test_vit",
        f"networks.teacher.weights={tmp_path}/large/few/baseline-seed1/last.safetensors",
    ]
    assert option(tuple(words), "--device")[-1] == "cuda"
    lanes = Lanes(study, [taught, teacher], Namespace(runs=tmp_path))
    assert (lanes.next_ready(), lanes.next_ready()) == (teacher, None)
    (tmp_path / teacher.name).mkdir(parents=True)
    (tmp_path / teacher.name / "report.json").touch()
    assert lanes.next_ready() == taught
    # 60 images at 100 per second, twice as dear; 60 at 50.
    assert expected_hours(study, [taught, teacher], [taught, teacher]) * 3600 == pytest.approx(1.2 + 1.2)


def test_a_study_on_a_gpu_counts_its_hours(tmp_path):
    (tmp_path / "study.toml").write_text(TINY.replace('checkpoint = "last"', 'checkpoint = "last"\ndevice = "cuda"'))
    planned = run_study(tmp_path, "--dry-run")
    assert "about 0.0 h of one GPU" in planned.stdout and planned.stdout.count("--device cuda") == 2


def test_what_is_needed_again_is_followed_to_its_start(tmp_path):
    study = tomllib.loads(
        TINY
        + """
[rows.further]
options = ["--recipe", "default"]
start = "exits-only"
"""
    )
    study["plan"][0]["rows"] = ["further", "exits-only", "baseline"]
    cells = {cell.row: cell for cell in read_cells(study)}
    again = needed_again(study, [cells["further"]], tmp_path)
    assert again == [cells["baseline"], cells["exits-only"]]
    (tmp_path / cells["exits-only"].name).mkdir(parents=True)
    (tmp_path / cells["exits-only"].name / "report.json").touch()
    assert needed_again(study, [cells["further"]], tmp_path) == []


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (("", ""), ("--lanes", "0"), "--lanes: at least 1"),
        (("", ""), ("--only", "zzz"), "--only zzz: no cell of the plan has this in its name"),
        (("[rows.baseline]", "[rows.'C D']"), (), "row 'C D'\n  expected: letters, digits and ._+-"),
        (('rows = ["exits-only"', 'rows = ["none"'), (), "the plan names 'none', which is none of [rows]"),
        (("[rows", "[rows.."), (), "study.toml cannot be read"),
    ],
)
def test_a_study_that_cannot_be_run_says_why(tmp_path, change, options, message):
    (tmp_path / "study.toml").write_text(TINY.replace(*change, 1) if change[0] else TINY)
    done = run_study(tmp_path, "--dry-run", *options)
    assert done.returncode > 0 and message in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_report_fails_its_cell_alone(tmp_path):
    (tmp_path / "study.toml").write_text(TINY)
    run = tmp_path / "runs" / "study" / "tiny" / "few" / "baseline-seed3"
    run.mkdir(parents=True)
    (run / "report.json").write_text("{")
    done = run_study(tmp_path, "--only", "baseline")
    assert done.returncode == 1 and "tiny/few/baseline-seed3: JSONDecodeError" in done.stderr


def test_a_cell_that_fails_is_named_and_the_others_are_done(tmp_path):
    (tmp_path / "study.toml").write_text(TINY.replace('"exits-only"]\nstart', '"exits-only", "--lr", "-1"]\nstart'))
    done = run_study(tmp_path)
    assert done.returncode == 1
    assert "failed: tiny/few/exits-only-seed3; see runs/study/logs/tiny/few/exits-only-seed3" in done.stderr
    assert (tmp_path / "results" / "tiny" / "few" / "baseline-seed3.json").is_file()


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path):
    (tmp_path / "study.toml").write_text(TINY.replace("epochs = 1\noptions", "epochs = 40\noptions"))
    command = [sys.executable, str(ROOT / "benchmarks" / "study" / "run.py"), "study.toml", "--only", "baseline"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = tmp_path / "runs" / "study" / "tiny" / "few" / "baseline-seed3"
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 0 and not (tmp_path / "results").exists()
    before = len((run / "log.jsonl").read_text().splitlines())
    assert before < 40
    done = run_study(tmp_path, "--only", "baseline")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 41)), "no epoch was trained twice"
    assert (tmp_path / "results" / "tiny" / "few" / "baseline-seed3.json").is_file()
    assert "stopped in epoch" in (tmp_path / "runs/study/logs/tiny/few/baseline-seed3/train.log").read_text()


def test_the_seconds_are_those_of_rows_of_their_studies():
    seconds = json.loads((ROOT / "docs" / "results" / "seconds.json").read_text(encoding="utf-8"))
    for key, found in seconds.items():
        name, network = key.split("/")
        study = tomllib.loads((ROOT / "benchmarks" / "study" / f"{name}.toml").read_text(encoding="utf-8"))
        assert found["rows"].keys() <= {cell.row for cell in read_cells(study) if cell.network == network}
        assert found["rows"]["baseline"] == {"image": 1.0, "training": 1.0}


def test_rows_are_timed_side_by_side(tmp_path):
    (tmp_path / "study.toml").write_text(TINY.replace('"exits-only", "baseline"', '"longer", "exits-only", "baseline"'))
    (tmp_path / "docs" / "results").mkdir(parents=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "study" / "seconds.py"), "study.toml", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "docs" / "results" / "seconds.json").read_text()).values()
    assert list(found["rows"]) == ["longer", "baseline"], "exits-only starts from another cell"
    assert found["rows"]["baseline"] == {"image": 1.0, "training": 1.0}
    longer = found["rows"]["longer"]
    assert longer["training"] == pytest.approx(2 * longer["image"], abs=0.002), "it has twice the epochs"
