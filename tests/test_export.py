"""Exported files say what the network says, hold what they should and no more, and appear whole or not at all."""

from __future__ import annotations

import ast
import importlib.util
import json
import pickle
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import noise, refused
from mutations import mutated
from PIL import Image
from test_routing import FAMILIES as ROUTED
from test_routing import made
from torch import nn
from torch.export import load as load_program

from sdcli.data.transforms import eval_transform
from sdcli.errors import UserError
from sdcli.export import export as exporting
from sdcli.export import formats, one_exit, push, routed
from sdcli.export.compare import kl, logits_of, problem
from sdcli.export.export import Exported, export
from sdcli.export.formats import FORMATS
from sdcli.export.graphs import _between, sections
from sdcli.export.job import Job
from sdcli.export.one_exit import load_exit
from sdcli.export.prepare import prepare
from sdcli.network.blueprint import Blueprint
from sdcli.network.calibration import Calibration, OperatingPoint, Promise
from sdcli.network.checkpoint import Description, TrainedOn, load_checkpoint, save_checkpoint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.policies import POLICIES, Policy, decide
from sdcli.network.weights import rebuild
from sdcli.recipe.schema import Network

CLASSES = [str(number) for number in range(10)]

# The converters warn about their own future.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def saved(folder: Path, name: str, size: int, data: str = "digits", **table: Any) -> Path:
    """A checkpoint of random weights of some size: fresh classifiers are close to zero."""
    torch.manual_seed(0)
    network = build(Blueprint.draft(Network(**table), name, CLASSES, image_size=size))
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.out_features == len(CLASSES):
            nn.init.normal_(module.weight)
    path = folder / f"{name}.safetensors"
    recipe = {"networks": {"student": {"weights": "random"}}}
    save_checkpoint(
        path, network.state_dict(), Description(network.blueprint, TrainedOn(data, data, 0.1, 42), recipe, 3)
    )
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated checkpoint; exit2's head is not asked."""
    path = saved(tmp_path_factory.mktemp("resnet"), "test_resnet", 32, stem="imagenet")
    tensors, about = load_checkpoint(path)
    policy = Policy({"exit1": 0.6, "exit3": 0.5}, "confidence", {"exit1": 1.5})
    promise = Promise("drop", 1.0, 0.8, 0.9, "clopper-pearson", 500)
    calibration = Calibration(
        policy, (OperatingPoint(policy.thresholds, 0.6, 70.0),), 500, "digits", "2026-11-24", promise
    )
    save_checkpoint(path, tensors, replace(about, early_exit=calibration))
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose stem for small images is arguments of timm: smaller patches."""
    return saved(tmp_path_factory.mktemp("vit"), "test_vit", 32)


@pytest.fixture(scope="module")
def staged(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(resnet, "onnx", "staged", tmp_path_factory.mktemp("staged") / "out")


@pytest.fixture(scope="module")
def everything(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(resnet, "onnx", "all", tmp_path_factory.mktemp("all") / "all.onnx")


@pytest.fixture(scope="module")
def first(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(resnet, "onnx", "exit1", tmp_path_factory.mktemp("one") / "exit1.onnx")


@pytest.fixture(scope="module")
def timm_folder(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(vit, "timm", "final", tmp_path_factory.mktemp("timm") / "out")


def images_for(network: MultiExit, count: int) -> torch.Tensor:
    return torch.randn(count, *network.plan.input_size, generator=torch.Generator().manual_seed(1))


def runner_in(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_runner", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# ONNX


def test_chained_sections_equal_the_whole_graph_and_the_network(staged, everything, resnet):
    import onnxruntime

    network = rebuild(resnet)[0].eval()
    whole = onnxruntime.InferenceSession(everything.output)
    sessions = runner_in(staged.output).Network(staged.output).sessions
    for count in (1, 2, 7):
        images = images_for(network, count)
        wanted = logits_of(network, images)
        together = dict(zip(wanted, whole.run(None, {"images": images.numpy()}), strict=True))
        tensor = images.numpy()
        for session, point in zip(sessions, wanted, strict=True):
            logits, *passed = session.run(None, {session.get_inputs()[0].name: tensor})
            np.testing.assert_allclose(logits, together[point], rtol=1e-5, atol=1e-5)
            assert problem(wanted[point], torch.from_numpy(logits)) == ""
            tensor = passed[0] if passed else None


def test_sections_and_a_truncated_graph_hold_nothing_of_later_stages(staged, first, everything):
    assert b"layer2" not in first.output.read_bytes() and b"exit2" not in first.output.read_bytes()
    whole = {tensor.name for tensor in onnx.load(everything.output).graph.initializer}
    stages, seen = ("layer1", "layer2", "layer3", "layer4"), set()
    for number, own in enumerate(stages):
        content = (staged.output / f"section{number + 1}.onnx").read_bytes()
        for other in stages:
            assert (f"{other}.".encode() in content) == (other == own)
        weights = {name.name for name in onnx.load_from_string(content).graph.initializer if "backbone" in name.name}
        assert weights and not weights & seen
        seen |= weights
    assert seen == {name for name in whole if "backbone" in name}


def test_no_exported_file_names_the_machine_it_was_written_on(staged, first):
    here = str(Path(exporting.__file__).parents[1]).encode()
    for file in (first.output, *staged.output.iterdir()):
        assert here not in file.read_bytes()


def test_a_graph_tells_its_classes_and_preprocessing(first):
    model = onnx.load(first.output)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["classes"]) == CLASSES and json.loads(about["preprocess"])["input_size"] == [3, 32, 32]
    assert json.loads(about["temperatures"]) == {"exit1": 1.5}
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input] == ["batch"]


def test_the_manifest_has_the_policy_the_promise_and_the_costs(staged, resnet):
    manifest, blueprint = manifest_of(staged.output), load_checkpoint(resnet)[1].blueprint
    own = {entry["exit"]: entry for entry in manifest["sections"]}
    assert manifest["policy"] == {"kind": "confidence", "agreement": False}
    assert manifest["calibration"]["promise"]["measured"] == 0.8 and manifest["calibration"]["num_images"] == 500
    assert {exit: entry["threshold"] for exit, entry in own.items()} == {
        "exit1": 0.6,
        "exit2": None,
        "exit3": 0.5,
        "final": None,
    }
    assert [own[exit]["asked"] for exit in own] == [True, False, True, True]
    assert own["exit1"]["temperature"] == 1.5
    assert manifest["macs"] == blueprint.passing(["exit1", "exit3"])
    assert sum(entry["macs"] for entry in own.values()) + own["final"]["head_macs"] == blueprint.plan.macs
    files = [onnx.load(staged.output / entry["file"]) for entry in manifest["sections"]]
    assert [file.opset_import[0].version for file in files] == [manifest["opset"]] * len(own)
    assert manifest["packages"].keys() == {"torch", "timm", "onnx", "onnxscript", "onnxruntime"}


def test_every_exported_exit_is_compared_on_images_and_on_noise(staged):
    assert [(row.exit, row.images) for row in staged.figures] == [
        (exit, what) for what in ("test images", "noise") for exit in ("exit1", "exit2", "exit3", "final")
    ]
    assert all(row.difference < 1e-4 and row.agree == row.num_images and row.kl < 1e-9 for row in staged.figures)
    assert {row.num_images for row in staged.figures} == {32, 8}


# The runner


def test_the_runner_is_short_and_needs_onnxruntime_and_numpy_alone(staged):
    text = (staged.output / "run.py").read_text()
    assert len(text.splitlines()) <= 80
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


def test_the_runner_was_compared_with_the_checkpoints_policy_and_one_that_uses_all_exits(staged):
    assert len(staged.routed) == 4
    for row in staged.routed:
        assert row.same + row.near >= row.num_images and sum(row.shares.values()) == pytest.approx(1)
    for row in staged.routed[::2]:
        assert row.policy == "a third of the rest at each exit"
        assert list(row.shares) == ["exit1", "exit2", "exit3", "final"]
        assert all(row.shares.values()), "every exit is used"
        assert row.near <= row.num_images // 8
    assert set(staged.routed[1].shares) == {"exit1", "exit3", "final"}


def test_a_third_of_those_that_reach_an_exit_leave_there():
    generator = torch.Generator().manual_seed(0)
    # The surest at one exit are the surest at all of them: a third of all images would leave no one to later exits.
    sure = torch.linspace(0, 6, 48)[torch.randperm(48, generator=generator)].view(-1, 1)
    exits = ("exit1", "exit2", "exit3")
    logits = {point: sure * torch.eye(5)[0] + 0.01 * place for place, point in enumerate((*exits, "final"))}
    policy = routed._spread(Policy({}), exits, logits)
    decided = decide(policy, logits)
    counts, left = torch.bincount(decided.exits, minlength=4).tolist(), 48
    for count in counts[:3]:
        assert 1 / 4 <= count / left <= 5 / 12
        left -= count
    assert not routed._near(policy, logits, 1e-6)[decided.exits < 3].any()


@pytest.mark.parametrize("agreement", [False, True])
@pytest.mark.parametrize("kind", list(POLICIES.entries))
def test_the_runner_routes_every_policy_as_the_network(staged, resnet, kind, agreement):
    network, about = rebuild(resnet)
    job = Job(resnet, network, about, "staged")
    # Of different contrast: the exits of an untrained network are equally sure of all noise.
    images = images_for(network, 40) * torch.linspace(0.1, 4, 40).view(-1, 1, 1, 1)
    logits = logits_of(network, images)
    policy = routed._spread(Policy({}, kind, {"exit1": 2.0, "exit2": 0.5}, agreement), job.cuts, logits)
    module = runner_in(staged.output)
    runner = module.Network(staged.output)
    runner.score, runner.agreement = module.SCORES[kind], agreement
    for section in runner.sections:
        exit = section["exit"]
        section.update(threshold=policy.thresholds.get(exit), temperature=policy.temperatures.get(exit, 1.0))
        section["asked"] = exit == "final" or exit in policy.exits
    found = routed._compare(job, runner, kind, policy, "noise", images, logits, 2e-6)
    assert found.same == 40 and found.near < 4
    # Nothing comes before the first exit with which it could agree, and untrained exits agree on little.
    assert agreement or all(found.shares.values())
    answers, _ = runner.route(images.numpy())
    np.testing.assert_allclose(answers, network.route(images, policy).answers, rtol=1e-4, atol=1e-4)


def test_a_runner_that_leaves_elsewhere_is_found(staged, resnet):
    network, about = rebuild(resnet)
    images = images_for(network, 8)
    runner = runner_in(staged.output).Network(staged.output)
    runner.sections[0].update(threshold=0.0)
    with pytest.raises(UserError, match="leave at exit1, and the network at final"):
        routed._compare(
            Job(resnet, network, about, "staged"),
            runner,
            "nobody",
            Policy({}),
            "noise",
            images,
            logits_of(network, images),
            0.0,
        )


def test_the_runner_reads_images_as_evaluation_does(staged, resnet, tmp_path):
    transform = eval_transform(load_checkpoint(resnet)[1].blueprint.preprocess)
    runner = runner_in(staged.output).Network(staged.output)
    for number, (width, height) in enumerate([(28, 28), (96, 40), (97, 60), (301, 200), (150, 333)]):
        image = noise(number, height, width)
        image.save(tmp_path / "image.png")
        np.testing.assert_allclose(runner.read(tmp_path / "image.png"), transform(image), atol=1e-5)


def test_the_runner_is_a_program_that_prints_a_line_per_image(staged, resnet, tmp_path):
    network, about = rebuild(resnet)
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for number, file in enumerate(files):
        noise(number, 40, 60).save(file)
    done = subprocess.run([sys.executable, staged.output / "run.py", *files], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    images = torch.stack([eval_transform(about.blueprint.preprocess)(Image.open(file)) for file in files])
    decided = network.eval().route(images, network.calibration.policy)
    for row, file, answer, place in zip(rows, files, decided.answers, decided.exits, strict=True):
        assert row["file"] == str(file) and row["exit"] == decided.points[place]
        assert row["label"] == CLASSES[answer.argmax()] and row["confidence"] == pytest.approx(
            float(answer.max().exp()), abs=1e-3
        )


def started(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    """The runner as a program, in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    code = 0
    try:
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_malformed_manifests_and_images_give_one_message(staged, tmp_path, capsys, monkeypatch):
    folder, image = tmp_path / "out", tmp_path / "image.png"
    shutil.copytree(staged.output, folder)
    noise(0).save(image)
    random, good, codes = Random(0), manifest_of(folder), []
    read = {key: good[key] for key in ("version", "classes", "preprocess", "policy", "sections")}
    texts = [json.dumps(mutated(mutated(read, random), random)) for _ in range(60)]
    texts += ["", "{", "[]", "null", "\x00", '{"version": 1}', json.dumps(good)[:-40], "[" * 5000]
    for text in texts:
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        code, out, err = started(folder, capsys, monkeypatch, image)
        codes.append(code)
        assert code in (0, 2), text
        assert (code == 2) == err.startswith("error: ") and "Traceback" not in err
        assert bool(out) == (code == 0)
    assert codes.count(2) > 40
    (folder / "manifest.json").write_text(json.dumps(good))
    for content in (b"", b"\x89PNG\r\n\x1a\n", image.read_bytes()[:60]):
        broken = tmp_path / "broken.png"
        broken.write_bytes(content)
        code, out, err = started(folder, capsys, monkeypatch, broken)
        assert (code, out) == (2, "") and err.startswith("error: ")
    (folder / "section2.onnx").write_bytes(b"changed")
    assert started(folder, capsys, monkeypatch, image)[0] == 2


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_done(staged, tmp_path, capsys, monkeypatch):
    names = ["first.png", "cut.png", "photos", "none.png", "last.png"]
    first, cut, folder, none, last = files = [tmp_path / name for name in names]
    noise(0).save(first)
    noise(1).save(last)
    cut.write_bytes(first.read_bytes()[:60])
    folder.mkdir()
    code, out, err = started(staged.output, capsys, monkeypatch, *files)
    assert code == 2
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(first), str(last)]
    lines = err.splitlines()
    assert [line.split("'")[1] for line in lines] == [str(cut), str(folder), str(none)]
    assert lines[1] == f"error: '{folder}': it is a folder; name the images in it"
    assert "No such file" in lines[2]


def test_the_runner_refuses_what_pillow_would_cut_to_eight_bits(staged, tmp_path, capsys, monkeypatch):
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60).save(tmp_path / "deep.png")
    code, out, err = started(staged.output, capsys, monkeypatch, tmp_path / "deep.png")
    assert (code, out) == (2, "") and "more than 8 bits per channel" in err
    Image.new("L", (1, 101)).save(tmp_path / "line.png")
    code, out, err = started(staged.output, capsys, monkeypatch, tmp_path / "line.png")
    assert (code, out) == (2, "") and "(1, 101): " in err and "a side over 100 times the other" in err


@pytest.mark.parametrize("words", [(), ("--threshold",), ("--threshold", "0.5"), ("--help",)])
def test_the_runner_without_images_says_how_it_is_used(staged, capsys, monkeypatch, words):
    found = started(staged.output, capsys, monkeypatch, *words)
    assert found == (2, "", "usage: python run.py [--threshold SHARE] IMAGE...\n")


def test_a_threshold_is_for_all_exits(staged, tmp_path, capsys, monkeypatch):
    noise(0).save(tmp_path / "image.png")
    for threshold, exit in ((0.0, "exit1"), (1.0, "final")):
        code, out, err = started(staged.output, capsys, monkeypatch, "--threshold", threshold, tmp_path / "image.png")
        assert (code, err) == (0, "") and json.loads(out)["exit"] == exit


@pytest.mark.parametrize("threshold", ["nan", "2", "-1", "inf"])
def test_a_threshold_that_is_no_share_is_refused(staged, tmp_path, capsys, monkeypatch, threshold):
    noise(0).save(tmp_path / "image.png")
    found = started(staged.output, capsys, monkeypatch, "--threshold", threshold, tmp_path / "image.png")
    assert found == (2, "", f"error: ValueError: --threshold {threshold}: a number from 0 to 1 is expected\n")


def test_the_runners_entropy_score_is_never_below_zero(staged):
    score = runner_in(staged.output).SCORES["entropy"]
    for num_classes in range(2, 300):
        own = np.full((1, num_classes), -np.log(num_classes))
        assert 0 <= score(own, own)[1][0] < 1e-12, num_classes


# timm


def test_timm_loads_the_folder_without_sdcli(timm_folder, vit):
    network, about = rebuild(vit)
    model = timm.create_model(f"local-dir:{timm_folder.output}", pretrained=True).eval()
    state = network.backbone.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    images = images_for(network, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network.eval()(images)["final"].logits)
    assert list(model.pretrained_cfg["label_names"]) == CLASSES
    config = timm.data.resolve_data_config(model=model)
    preprocess = about.blueprint.preprocess
    assert (tuple(config["mean"]), tuple(config["std"])) == (preprocess.mean, preprocess.std)
    assert config["input_size"] == (3, 32, 32)
    # As sdcli evaluates small images.
    image = noise(0, 20, 28)
    torch.testing.assert_close(timm.data.create_transform(**config)(image), eval_transform(preprocess)(image))


def timm_config(folder: Path) -> dict[str, Any]:
    """What timm makes of an exported folder's preprocessing."""
    return timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{folder}", pretrained=True))


def photo_folder(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    for number in range(10):
        (folder / "test" / f"{number}").mkdir(parents=True)
        for place, (width, height) in enumerate(sizes):
            noise(10 * number + place, height, width).save(folder / "test" / f"{number}" / f"{place}.png")
    return folder


def test_timm_shows_small_images_whole_to_a_network_with_a_larger_input(tmp_path):
    path = saved(tmp_path, "test_resnet", 128, stem="imagenet")
    exported = export(path, "timm", "final", tmp_path / "out")
    config = timm_config(exported.output)
    assert (config["crop_mode"], config["crop_pct"]) == ("squash", 1.0)
    transform = eval_transform(load_checkpoint(path)[1].blueprint.preprocess)
    for image in (noise(0, 24, 24), noise(1, 40, 96)):
        torch.testing.assert_close(timm.data.create_transform(**config)(image), transform(image))
    assert (
        "config.json shows images whole, as sdcli shows those of up to 96 pixels (crop_mode squash)" in exported.notes
    )


@pytest.mark.parametrize(
    ("data", "size", "sizes", "mode", "note"),
    [
        ("photos", 128, [(24, 24)] * 4, "squash", "config.json shows images whole, as sdcli shows those of up to 96"),
        ("photos", 64, [(150, 200)] * 4, "center", ""),
        ("photos", 128, [(24, 24)] + [(150, 200)] * 3, "center", "of the others; config.json has one rule for all"),
        ("", 128, [], "center", "config.json shows the centre of an image, by the network's input size"),
        ("", 64, [], "squash", "config.json shows images whole, by the network's input size"),
        ("cifar10", 128, [], "squash", "config.json shows images whole, as sdcli shows those of up to 96"),
    ],
)
def test_timm_shows_images_as_most_of_the_data_are_shown(tmp_path, data, size, sizes, mode, note):
    path = saved(tmp_path, "test_resnet", size, data="" if sizes else data, stem="imagenet")
    photos = str(photo_folder(tmp_path / "photos", sizes)) if sizes else None
    exported = export(path, "timm", "final", tmp_path / "out", dataset=photos)
    config, preprocess = timm_config(exported.output), load_checkpoint(path)[1].blueprint.preprocess
    assert (config["crop_mode"], config["crop_pct"]) == (mode, 1.0 if mode == "squash" else preprocess.crop_pct)
    image = noise(0, 24, 24) if mode == "squash" else noise(0, 200, 150)
    torch.testing.assert_close(timm.data.create_transform(**config)(image), eval_transform(preprocess)(image))
    notes = [text for text in exported.notes if "config.json" in text]
    assert len(notes) == bool(note) and all(note in text for text in notes)


def test_the_card_states_licence_model_and_data(timm_folder, vit, tmp_path):
    card = (timm_folder.output / "README.md").read_text()
    assert "license: unknown\n" in card and "test_vit" in card and "digits" in card
    assert any("--license" in text for text in timm_folder.notes)
    named = export(vit, "timm", "final", tmp_path / "named", license="mit")
    assert "license: mit\n" in (named.output / "README.md").read_text()
    assert not any("--license" in text for text in named.notes)
    for folder, license in ((timm_folder.output, None), (named.output, "mit")):
        assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == license


def test_a_stem_that_timm_cannot_build_is_refused(tmp_path, sdcli):
    path = saved(tmp_path, "test_resnet", 32, stem="cifar")
    refused(
        sdcli("export", path, "--to", "timm", "--output", tmp_path / "out"),
        "--to timm: the stem of test_resnet was changed for small images (cifar), which no argument of timm.create_model does\n"
        "  expected: a network with timm's own stem, or with smaller patches\n"
        "  fix:      --to safetensors or --to onnx; or train it with --stem imagenet",
    )


# The hub


class Hub:
    """What is asked of the hub's client."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> Any:
        self.calls.append(("create", repository, private))

        class Address(str):
            repo_id = f"me/{repository}"

        return Address(f"https://huggingface.co/me/{repository}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))


def test_the_folder_is_uploaded(vit, tmp_path, sdcli, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.calls.clear()
    result = sdcli("export", vit, "--to", "timm", "--output", tmp_path / "out", "--push", "mine", "--private")
    assert result.code == 0 and "uploaded to https://huggingface.co/me/mine" in result.err
    assert Hub.calls == [
        ("create", "mine", True),
        ("upload", "me/mine", ["README.md", "config.json", "model.safetensors"]),
    ]


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("401 Client Error\nmore")])
def test_an_upload_that_fails_is_one_message_and_the_folder_stays(tmp_path, monkeypatch, error):
    import huggingface_hub

    def create_repo(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=create_repo))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError) as raised:
        push.push(tmp_path, "me/mine", private=False)
    assert raised.value.wrong == f"'me/mine' was not uploaded: {str(error).splitlines()[0]}"
    assert f"hf upload me/mine {tmp_path}" in raised.value.fix


# Other formats


def test_one_exit_in_safetensors_is_loaded_by_its_snippet(resnet, tmp_path, sdcli):
    exported = export(resnet, "safetensors", "exit2", tmp_path / "exit2.safetensors")
    network = rebuild(resnet)[0].eval()
    images = images_for(network, 2)
    alone = load_exit(exported.output)
    noise(0).save(tmp_path / "photo.png")
    with torch.no_grad():
        assert torch.equal(alone(images), network(images)["exit2"].logits)
    assert not any("layer3" in name or "exit1" in name for name in alone.state_dict())
    space: dict[str, Any] = {}
    exec(exported.usage, space)
    assert isinstance(space["network"], nn.Module)
    for words in (["eval"], ["predict", "photo.png"], ["calibrate"], ["export", "--to", "onnx", "-o", "a.onnx"]):
        command, *rest = words
        refused(
            sdcli(command, exported.output, *(tmp_path / word if word == "photo.png" else word for word in rest)),
            f"'{exported.output}' holds only exit2 of a network: sdcli export --to safetensors wrote it\n"
            "  expected: a checkpoint of sdcli train, which holds the whole network\n"
            "  fix:      in Python: from sdcli.export.one_exit import load_exit; "
            f"network = load_exit({str(exported.output)!r})",
        )
    with pytest.raises(UserError, match="is not one exit"):
        load_exit(resnet)


def test_programs_of_torch_export_are_chained_without_sdcli(vit, tmp_path):
    output = tmp_path / "out"
    exported = export(vit, "pt2", "staged", output)
    network = rebuild(vit)[0].eval()
    images = images_for(network, 3)
    files = [output / entry["file"] for entry in manifest_of(output)["sections"]]
    tensor, stages, seen = images, [stage.module for stage in network.plan.stages], set()
    for file, point in zip(files, network.classifiers, strict=True):
        program = load_program(file)
        assert not seen & program.state_dict.keys() and program.state_dict
        seen |= program.state_dict.keys()
        later = stages[network.classifiers.index(point) + 1 :]
        assert not any(f".{module}." in name for name in program.state_dict for module in later)
        logits, *passed = program.module()(tensor)
        assert problem(logits_of(network, images)[point], logits.detach()) == ""
        tensor = passed[0] if passed else None
    assert exported.routed == []


@pytest.mark.slow
def test_openvino_is_written_in_single_precision(resnet, tmp_path):
    openvino = pytest.importorskip("openvino")
    exported = export(resnet, "openvino", "exit1", tmp_path / "out")
    assert set(exported.files) == {"manifest.json", "model.bin", "model.xml"}
    model = openvino.Core().read_model(tmp_path / "out" / "model.xml")
    weights = {op.get_element_type().to_string() for op in model.get_ops() if op.get_type_name() == "Constant"}
    assert "f32" in weights and "f16" not in weights


def fake_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of ExecuTorch as an export uses, on torch: its file is a pickle of exported programs."""
    import io

    def lower(programs: Any, *, partitioner: list[Any], constant_methods: dict[str, str]) -> Any:
        saved: dict[str, Any] = dict(constant_methods)
        for name, program in programs.items():
            torch.export.save(program, buffer := io.BytesIO())
            saved[name] = buffer.getvalue()
        assert partitioner == ["xnnpack"]
        return SimpleNamespace(to_executorch=lambda: SimpleNamespace(buffer=pickle.dumps(saved)))

    class Runtime:
        get = classmethod(lambda cls: cls())

        def load_program(self, path: Path) -> Any:
            saved = pickle.loads(path.read_bytes())

            def method(name: str) -> Any:
                if isinstance(saved[name], str):
                    return SimpleNamespace(execute=lambda inputs: [saved[name]])
                run = torch.export.load(io.BytesIO(saved[name])).module()
                return SimpleNamespace(execute=lambda inputs: [found.detach() for found in run(*inputs)])

            return SimpleNamespace(load_method=method)

    modules = {
        "executorch": {},
        "executorch.exir": {"to_edge_transform_and_lower": lower},
        "executorch.runtime": {"Runtime": Runtime},
        "executorch.backends": {},
        "executorch.backends.xnnpack": {},
        "executorch.backends.xnnpack.partition": {},
        "executorch.backends.xnnpack.partition.xnnpack_partitioner": {"XnnpackPartitioner": lambda: "xnnpack"},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("sdcli.export.manifest.version", lambda name: "0")


def test_executorch_gets_a_method_per_section(resnet, tmp_path, monkeypatch):
    if importlib.util.find_spec("executorch") is None:
        fake_executorch(monkeypatch)
    exported = export(resnet, "executorch", "staged", tmp_path / "out.pte")
    assert [row.exit for row in exported.figures][:4] == ["exit1", "exit2", "exit3", "final"]


# Graphs


def test_sections_read_the_batch_size_from_their_own_input():
    network = made("test_convnext")
    ready, _ = prepare(network)
    images, tensor = images_for(network, 5), images_for(network, 5)
    for section in sections(ready, network.classifiers[:-1]):
        logits, *passed = section.program.module()(tensor)
        assert problem(logits_of(network, images)[section.exit], logits) == ""
        tensor = passed[0] if passed else None


def test_anything_else_that_crosses_a_cut_is_an_error():
    class Reaching(nn.Module):
        def forward(self, images):
            stage = images.relu()
            return stage.sum(1), stage + images

    program = torch.export.export(Reaching(), (torch.zeros(2, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = program.module(check_guards=False)
    source = next(node for node in graph.graph.nodes if node.op == "placeholder")
    stage = next(node for node in graph.graph.nodes if "relu" in str(node.target))
    sound, reaching = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    (found,) = _between(graph, source, stage, [sound], "exit2")(torch.ones(4, 3))
    assert found.tolist() == [3.0] * 4
    with pytest.raises(UserError, match="section that ends at exit2 also reads the images"):
        _between(graph, source, stage, [reaching], "exit2")


def test_blocks_of_branches_are_fused():
    network = made("test_byobnet")
    ready, notes = prepare(network)
    if any(hasattr(module, "reparameterize") for module in network.modules()):
        assert len(notes) == 1
    for point, logits in logits_of(ready, images_for(network, 2)).items():
        assert problem(logits_of(network, images_for(network, 2))[point], logits) == ""


def test_only_exits_at_clean_cuts_are_staged(resnet):
    network, about = rebuild(resnet)
    network.calibration = None
    network._why_not = {"exit1": "", "exit2": "it reads earlier tensors", "exit3": ""}
    job = Job(resnet, network, about, "staged")
    assert job.cuts == ("exit1", "exit3") and job.notes == ["exit2 is left out: it reads earlier tensors"]
    network._why_not = dict.fromkeys(network._why_not, "no")
    with pytest.raises(UserError, match="cannot be cut at any exit"):
        Job(resnet, network, about, "staged")


def test_a_policy_at_an_exit_that_is_no_clean_cut_is_refused(resnet):
    network, about = rebuild(resnet)
    network._why_not = {"exit1": "", "exit2": "", "exit3": "it reads earlier tensors"}
    with pytest.raises(UserError, match="the policy of this checkpoint uses exit3"):
        Job(resnet, network, about, "staged")


# Differences, worked out by hand


def test_differences_beyond_rounding_are_named():
    wanted = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert problem(wanted, wanted.clone()) == "" and problem(wanted, wanted + 1e-4) == ""
    assert "logits differ by 0.001" in problem(wanted, wanted + 1e-3)
    assert "logits differ by nan" in problem(wanted, wanted * torch.nan)
    assert "shape" in problem(wanted, wanted[:1])
    # 1e-4 of the largest logit is allowed, which leaves the class open where the margin is as small.
    wide = torch.tensor([[1000.0, 0.0], [0.30, 0.15]])
    assert "the mean KL divergence is 0.002" in problem(wide, torch.tensor([[1000.0, 0.0], [0.21, 0.24]]))
    assert kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986123, 0.0]])) == pytest.approx(
        0.5 * np.log(0.5 / 0.75 * 0.5 / 0.25)
    )


@pytest.mark.parametrize(("format", "name"), [("safetensors", "out.safetensors"), ("timm", "out")])
def test_a_file_that_differs_is_removed_and_the_exit_is_named(vit, tmp_path, monkeypatch, format, name):
    def changed(path: Any, job: Any) -> Any:
        return lambda images: {job.exit: logits_of(job.network, images)[job.exit] + 0.1}

    monkeypatch.setattr(FORMATS[format].load(), "read", changed)
    with pytest.raises(UserError, match="final of the exported file is not that of the checkpoint"):
        export(vit, format, "final", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_earlier_one(vit, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export(vit, "timm", "final", output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    monkeypatch.setattr(FORMATS["timm"].load(), "read", lambda path, job: lambda images: {"final": images.flatten(1)})
    with pytest.raises(UserError):
        export(vit, "timm", "final", output, force=True)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_message(vit, tmp_path, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(one_exit, "save_checkpoint", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(vit, "safetensors", "exit1", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_noise_stands_in_for_data_that_cannot_be_opened(tmp_path):
    path = saved(tmp_path, "test_resnet", 32, data="", stem="imagenet")
    exported = export(path, "safetensors", "exit1", tmp_path / "out.safetensors")
    assert [row.images for row in exported.figures] == ["noise in range", "noise"]
    assert exported.notes[-1].startswith("compared on noise in the range of images, not on images: ")


# The command


def test_json_has_the_figures_and_the_files(resnet, tmp_path, sdcli):
    result = sdcli(
        "export", resnet, "--to", "safetensors", "--exit", "exit1", "-o", tmp_path / "a.safetensors", "--json"
    )
    shown = json.loads(result.out)
    assert result.code == 0 and shown["files"] == {"": (tmp_path / "a.safetensors").stat().st_size}
    assert [row["exit"] for row in shown["checks"]] == ["exit1", "exit1"]
    assert "load_exit" in result.err


def test_the_table_has_a_row_per_exit(resnet, tmp_path, sdcli):
    result = sdcli("export", resnet, "--to", "safetensors", "--exit", "exit1", "-o", tmp_path / "a.safetensors")
    assert result.out.count("exit1") == 2 and "32/32" in result.out and "mean KL" in result.out


def test_what_cannot_be_exported_is_said_before_anything_is_loaded(resnet, first, tmp_path, sdcli, monkeypatch):
    (tmp_path / "taken.onnx").write_text("mine")
    shutil.copy(first.output, tmp_path / "ours.onnx")
    shutil.copy(resnet, tmp_path / "last.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("mine")
    monkeypatch.setattr(exporting, "rebuild", None)
    for words, message in [
        (
            ["--to", "onx", "-o", "a.onnx"],
            "--to: unknown format 'onx'\n"
            "  expected: one of executorch, onnx, openvino, pt2, safetensors, timm\n"
            "  fix:      did you mean 'onnx'?",
        ),
        (
            ["--to", "onnx", "-o", tmp_path / "a"],
            f"--output {tmp_path}/a is a single file, whose name does not end in .onnx\n"
            "  expected: a name that ends in .onnx\n"
            f"  fix:      --output {tmp_path}/a.onnx",
        ),
        (
            ["--to", "onnx", "-o", tmp_path / "ours.onnx"],
            f"--output {tmp_path}/ours.onnx exists\n"
            "  expected: a new name\n"
            "  fix:      another --output, or --force to replace it",
        ),
        (
            ["--to", "onnx", "-o", tmp_path / "taken.onnx", "--force"],
            f"--output {tmp_path}/taken.onnx exists and is not an exported file\n"
            "  expected: a new file\n"
            "  fix:      choose another --output",
        ),
        (
            ["--to", "safetensors", "--exit", "exit1", "-o", tmp_path / "last.safetensors", "--force"],
            f"--output {tmp_path}/last.safetensors exists and is not an exported file\n"
            "  expected: a new file\n"
            "  fix:      choose another --output",
        ),
        (
            ["--to", "timm", "-o", tmp_path / "mine", "--force"],
            f"--output {tmp_path}/mine exists and is not an exported folder\n"
            "  expected: a new folder\n"
            "  fix:      choose another --output",
        ),
        (
            ["--to", "onnx", "-o", tmp_path / "none" / "a.onnx"],
            f"--output {tmp_path}/none/a.onnx: the folder '{tmp_path}/none' does not exist\n"
            "  expected: an existing folder\n"
            f"  fix:      mkdir -p {tmp_path}/none",
        ),
        (
            ["--to", "timm", "--exit", "exit1", "-o", tmp_path / "a"],
            "--exit exit1: timm's format holds a timm model, whose end is 'final'\n"
            "  expected: --exit final\n"
            "  fix:      --to onnx --exit exit1, or --to safetensors",
        ),
        (
            ["--to", "safetensors", "--exit", "staged", "-o", tmp_path / "a"],
            "--exit staged: --to safetensors holds one exit\n  expected: the name of an exit\n  fix:      --to pt2",
        ),
        (
            ["--to", "safetensors", "-o", resnet, "--force"],
            f"--output {resnet} is the checkpoint's own place\n  expected: a new name\n  fix:      choose another --output",
        ),
        (
            ["--to", "onnx", "-o", "a.onnx", "--push", "me/mine"],
            "--push me/mine: only timm's folder has a card\n  expected: --to timm\n  fix:      leave --push out",
        ),
    ]:
        refused(sdcli("export", resnet, *words), message)
    assert (tmp_path / "taken.onnx").read_text() == "mine"


def test_an_unknown_exit_is_refused_with_the_known_ones(resnet, tmp_path, sdcli):
    refused(
        sdcli("export", resnet, "--to", "onnx", "--exit", "exit7", "-o", tmp_path / "a.onnx"),
        "--exit: unknown exit 'exit7'\n"
        "  expected: one of all, exit1, exit2, exit3, final, staged\n"
        "  fix:      did you mean 'exit3'?",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_with_its_command(resnet, tmp_path, sdcli, monkeypatch):
    find = formats.find_spec
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    refused(
        sdcli("export", resnet, "--to", "onnx", "-o", tmp_path / "a.onnx"),
        "--to onnx: onnx, onnxscript, onnxruntime are not installed\n"
        "  expected: the extra 'onnx'\n"
        "  fix:      pip install 'sdcli[onnx]'",
    )


def test_help_names_every_format(sdcli):
    shown = sdcli("export", "--help").out
    assert FORMATS and all(name in shown for name in FORMATS)


NOT_TRIED = (
    "resnet26d",
    "resnext26ts",
    "efficientnetv2_rw_t",
    "deit3_small_patch16_224",
    "swinv2_tiny_window8_256",
    "maxvit_pico_rw_256",
    "gmixer_24_224",
    "hardcorenas_a",
)
FAMILIES = [*(name for name in ROUTED if name not in NOT_TRIED), "hrnet_w18_small"]
"""One model of each of 33 families; the last one has exits at which no image can leave."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_staged(name, tmp_path):
    network = made(name)
    path = tmp_path / "best.safetensors"
    about = Description(network.blueprint, TrainedOn("none", "", 0.1, 42), {}, 1)
    save_checkpoint(path, network.state_dict(), about)
    exported = export(path, "onnx", "staged", tmp_path / "out")
    points = [point for point in network.classifiers if not network.why_not.get(point)]
    assert [row.exit for row in exported.figures][: len(points)] == points
    assert exported.routed and manifest_of(exported.output)["left_out"].keys() == set(network.classifiers) - set(points)
