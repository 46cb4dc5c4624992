"""The Python interface: the examples of its documentation, and what it takes and refuses."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
import re
import shutil
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from photos import CLASSES, calibrated, photo, save_network, save_photos
from PIL import Image

import sdcli
from sdcli.errors import UserError
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import describe_again
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.policies import Policy
from sdcli.network.weights import rebuild
from sdcli.recipe.schema import Network

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_network(folder / "best.safetensors")
    return folder


@pytest.fixture
def net(run: Path) -> MultiExit:
    return sdcli.load(run)


def test_the_examples_of_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_network(Path("runs/first/best.safetensors"))
    calibrated(Path("runs/first/best.safetensors"))
    for name, file in zip(("one", "two"), save_photos(Path("photos"), 2), strict=True):
        file.rename(file.with_stem(name))
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 5
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "docs/python.md", None, 0)
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert results.failed == 0, "".join(said)
    assert results.attempted > 20


def test_a_run_folder_gives_its_best_checkpoint(run: Path, tmp_path: Path):
    assert sdcli.load(run).blueprint == sdcli.load(str(run / "best.safetensors")).blueprint
    with pytest.raises(UserError, match="has no checkpoint"):
        sdcli.load(tmp_path)


def test_images_paths_and_tensors_give_the_same_predictions(net: MultiExit, tmp_path: Path):
    files = save_photos(tmp_path, 5)
    images = [Image.open(file) for file in files]
    by_path = net.predict(files, batch_size=2)
    assert len(by_path) == 5 and [found.exit for found in by_path] == ["final"] * 5
    assert net.predict(images, batch_size=2) == by_path
    tensors = torch.stack([net.transform(image) for image in images])
    assert net.predict(tensors, batch_size=2) == by_path
    assert net.predict(images[0]) == net.predict(str(files[0])) == net.predict(tensors[0]) == net.predict(files[:1])
    assert net.predict([]) == []


def test_the_transform_reads_images_of_any_mode(net: MultiExit):
    image = photo(3)
    for mode in ("RGBA", "LA", "P", "CMYK", "1"):
        converted = image.convert(mode)
        assert torch.equal(net.transform(converted), net.transform(converted.convert("RGB"))), mode
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    turned.getexif()[0x0112] = 6
    assert torch.equal(net.transform(turned), net.transform(image))


def test_top_lists_the_likeliest_classes_first_and_is_limited_to_those_there_are(net: MultiExit):
    (found,) = net.predict(photo(1), top=100)
    shares = [share for _, share in found.top]
    assert len(found.top) == len(CLASSES) and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert found.top[0] == (found.label, found.confidence)


def test_predicting_leaves_modes_and_gradients_as_they_were(net: MultiExit):
    net.train()
    net.predict(photo(1))
    net.predict(photo(1), ensemble=True)
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_temperatures_change_how_sure_an_exit_says_it_is(run: Path, tmp_path: Path):
    path = tmp_path / "best.safetensors"
    save_network(path)
    calibration = calibrated(path)
    net = sdcli.load(path)
    image = net.transform(photo(1))[None]
    with torch.no_grad():
        logits = net(image)["exit1"].logits
    expected = (logits / calibration.policy.temperatures["exit1"]).softmax(dim=1).max()
    assert net.predict(image, exit="exit1")[0].confidence == pytest.approx(float(expected), rel=1e-5)


def test_an_exit_after_which_nothing_can_leave_can_still_answer_alone():
    torch.manual_seed(0)
    net = build(Blueprint.draft(Network(), "hrnet_w18_small", CLASSES)).eval()
    point = next(point for point, reason in net.why_not.items() if reason)
    assert net.predict(torch.zeros(1, *net.plan.input_size), exit=point)[0].exit == point
    strategy = net.strategy(threshold=0.5)
    assert strategy.policy and point not in strategy.policy.thresholds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit": "exit1", "budget": 0.5}, "exit and budget contradict each other"),
        ({"ensemble": True, "early_exit": False}, "ensemble and early_exit=False contradict each other"),
        ({"exit": "exit7"}, "unknown exit 'exit7'"),
        ({"budget": 0.5}, "a budget of 0.5: the checkpoint is not calibrated"),
        ({"budget": -1.0}, "a budget of -1"),
        ({"threshold": 1.5}, "a threshold of 1.5"),
        ({"top": 0}, "top = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"top": 1.5}, "top = 1.5"),
        ({"batch_size": "8"}, "batch_size = '8'"),
        ({"threshold": "a"}, "a threshold of 'a'"),
        ({"threshold": float("nan")}, "a threshold of nan"),
        ({"budget": "half"}, "a budget of 'half'"),
        ({"exit": ""}, "unknown exit ''"),
    ],
)
def test_options_that_cannot_be_met_are_refused(net: MultiExit, options: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        net.predict(photo(1), **options)


def test_a_threshold_holds_at_exits_that_the_calibration_does_not_use_too(run: Path, tmp_path: Path):
    path = Path(shutil.copy(run / "best.safetensors", tmp_path))
    calibration = calibrated(path)
    table = calibration.policy.at({"exit2": 0.9})
    about = rebuild(path)[1]
    describe_again(path, replace(about, early_exit=replace(calibration, policy=table)), path)
    net = sdcli.load(path)
    assert net.strategy(threshold=0.3).policy == table.at(dict.fromkeys(["exit1", "exit2", "exit3"], 0.3))
    assert net.predict(photo(1), threshold=0.0)[0].exit == "exit1"


def test_a_photo_that_breaks_off_is_refused_as_its_file_is(net: MultiExit, tmp_path: Path):
    file = tmp_path / "cut.jpg"
    photo(1, 640, 480).save(file)
    file.write_bytes(file.read_bytes()[:3000])
    with Image.open(file) as opened:
        for image in (file, opened):
            with pytest.raises(UserError, match="cannot be read"):
                net.predict(image)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32), r"a tensor \[1, 3, 32, 32\] of float32"),
        (torch.zeros(1, 3, 160, 160, dtype=torch.uint8), "of uint8"),
        ([3], "an image of type int"),
        (None, "images of type NoneType"),
        (3.5, "images of type float"),
        ("nowhere.png", r"'nowhere.png': the image cannot be read \(no such file\)"),
        (Image.new("F", (8, 8)), "32-bit values without a known range"),
        (Image.new("RGB", (1, 500)), "a side is over 100 times the other"),
    ],
)
def test_what_is_no_image_is_refused(net: MultiExit, images: object, message: str):
    with pytest.raises(UserError, match=message):
        net.predict(images)


def test_a_network_of_numbers_that_are_not_finite_gives_no_answer(net: MultiExit):
    with torch.no_grad():
        net.backbone.fc.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        net.predict(photo(1))


def test_a_network_can_be_copied_and_its_transform_sent_to_processes(net: MultiExit):
    again = copy.deepcopy(net)
    assert again.predict(photo(1)) == net.predict(photo(1))
    transform = pickle.loads(pickle.dumps(net.transform))
    assert torch.equal(transform(photo(1)), net.transform(photo(1)))


def test_loading_leaves_random_numbers_as_they_were(run: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sdcli.load(run)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_network_whose_model_was_taken_out_answers_nothing(run: Path, tmp_path: Path, is_calibrated: bool):
    path = Path(shutil.copy(run / "best.safetensors", tmp_path))
    if is_calibrated:
        calibrated(path)
    net = sdcli.load(path)
    images = net.transform(photo(1))[None]
    net.predict(images)
    before = net.predict(images, early_exit=False)
    model = net.eject()
    with torch.no_grad():
        assert net.classes[int(model(images).argmax())] == before[0].label
    for use in (
        lambda: net.predict(images),
        lambda: net.predict(images, early_exit=False),
        lambda: net(images),
        lambda: net.upto("exit1"),
        lambda: net.route(images, Policy({"exit1": 0.0})),
        lambda: next(net.stream([images], Policy({"exit1": 0.0}))),
        lambda: net.tensors(images),
    ):
        with pytest.raises(UserError, match=re.escape("eject() took its timm model out")):
            use()


def test_images_may_come_one_by_one(net: MultiExit, tmp_path: Path):
    files = save_photos(tmp_path, 5)
    expected = net.predict(files, batch_size=2)
    assert net.predict((Image.open(file) for file in files), batch_size=2) == expected
    assert net.predict(dict.fromkeys(files), batch_size=2) == expected
    assert net.predict(iter([])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64,), "input_size = 64"),
        (((3, 64, -1),), "input_size = (3, 64, -1)"),
        (((64, 64),), "input_size = (64, 64)"),
        (((3, 64.0, 64.0),), "input_size = (3, 64.0, 64.0)"),
        (((),), "input_size = ()"),
    ],
)
def test_a_size_that_is_none_is_refused(arguments: tuple, message: str):
    model = timm.create_model("test_resnet")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sdcli.find_stages(model, *arguments)
    assert error.value.fix == "find_stages(model, (3, 224, 224))"


def test_what_is_no_model_and_what_are_no_exits_are_refused():
    with pytest.raises(UserError, match="model = 'test_resnet'"):
        sdcli.find_stages("test_resnet")
    with pytest.raises(UserError, match=r"exits = 2\.5"):
        sdcli.find_stages(timm.create_model("test_resnet"), exits=2.5)


def test_the_interface_has_types():
    for function in (sdcli.load, sdcli.find_stages, MultiExit.predict, MultiExit.upto, MultiExit.route):
        hints = typing.get_type_hints(function)
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        assert {*names, "return"} <= hints.keys()
