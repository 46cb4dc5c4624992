"""The checkpoint: complete, atomic, a plain timm model inside, and clear about what it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import timm
import torch
from mutations import mutated
from safetensors.torch import load_file, save_file

import sdcli
from sdcli import __version__
from sdcli.errors import UserError
from sdcli.files import check_writable
from sdcli.network.blueprint import Blueprint
from sdcli.network.calibration import Calibration, OperatingPoint, Promise
from sdcli.network.checkpoint import (
    VERSION,
    Description,
    TrainedOn,
    describe_again,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
)
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.policies import Policy
from sdcli.network.weights import load_weights, rebuild
from sdcli.recipe.schema import Network


def make(name: str = "test_resnet", num_classes: int = 5) -> tuple[MultiExit, Description]:
    torch.manual_seed(0)
    blueprint = Blueprint.draft(Network(), name, [f"class {i}" for i in range(num_classes)])
    about = Description(blueprint, TrainedOn("digits", "digits", 0.1, 42), recipe={"epochs": 1}, epoch=3)
    return build(blueprint), about


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, MultiExit, Description]:
    network, about = make()
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, network.state_dict(), about)
    return path, network, about


def message(path: Path) -> str:
    with pytest.raises(UserError) as error:
        rebuild(path)
    return str(error.value)


def rewrite(path: Path, change) -> None:
    """The same tensors with the JSON changed."""
    tensors, _ = load_checkpoint(path)
    about = json.loads(read_tensors(path)[1]["sdcli"])
    change(about, tensors)
    save_file(tensors, path, {"format": "pt", "sdcli": json.dumps(about)})


def test_a_checkpoint_gives_back_network_and_description(saved):
    path, network, about = saved
    again, description = rebuild(path)
    assert description == about
    images = torch.randn(2, *about.blueprint.plan.input_size)
    with torch.no_grad():
        before, after = network.eval()(images), again.eval()(images)
    assert all(torch.equal(before[point].logits, after[point].logits) for point in before)


def test_the_backbones_tensors_are_a_plain_timm_model(saved):
    path, network, about = saved
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    tensors = load_file(path)
    plain.load_state_dict({n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")})
    images = torch.randn(2, *about.blueprint.plan.input_size)
    with torch.no_grad():
        assert torch.equal(plain(images), network.eval()(images)["final"].logits)


def test_saving_leaves_nothing_beside(saved):
    path, *_ = saved
    assert [file.name for file in path.parent.iterdir()] == ["last.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint_whole(saved):
    path, network, about = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, network.state_dict(), Description(**{**vars(about), "recipe": {"bad": object()}}))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.safetensors"]


def test_a_missing_checkpoint_is_named(tmp_path):
    assert message(tmp_path / "no.safetensors") == (
        f"checkpoint '{tmp_path / 'no.safetensors'}' does not exist\n"
        "  expected: a run folder, or a file such as RUN/best.safetensors"
    )


def test_a_run_folder_in_place_of_its_checkpoint_is_explained(saved):
    path, *_ = saved
    assert message(path.parent) == (
        f"'{path.parent}' is a folder\n  expected: a .safetensors file\n  fix:      did you mean '{path}'?"
    )


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.999])
def test_a_truncated_checkpoint_is_explained(saved, share):
    path, *_ = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    said = message(path)
    assert said.startswith(f"'{path}' cannot be read as safetensors: ")
    assert said.endswith("copy it again if it was cut short")


def test_a_pickle_is_never_read(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {}}, path)
    assert message(path).startswith(f"'{path}' cannot be read as safetensors: ")
    assert "weights_only=True" in message(path), "how to convert it"


def test_a_foreign_file_is_explained(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    assert message(path) == (
        f"'{path}' was not written by sdcli: its metadata has no 'sdcli' entry\n"
        "  expected: a checkpoint of sdcli train\n"
        f"  fix:      to start training from its weights: sdcli train MODEL --weights {path}"
    )


def test_a_newer_format_is_refused(saved):
    path, *_ = saved
    rewrite(path, lambda about, tensors: about.update(version=VERSION + 1, sdcli="9.0"))
    assert message(path) == (
        f"'{path}' has format {VERSION + 1}, written by sdcli 9.0\n"
        f"  expected: format {VERSION} or older, which is what sdcli {__version__} reads\n"
        "  fix:      pip install --upgrade sdcli"
    )


@pytest.mark.parametrize("key", ["plan", "architecture", "heads", "version"])
def test_metadata_that_lacks_a_part_is_explained(saved, key):
    path, *_ = saved
    rewrite(path, lambda about, tensors: about.pop(key))
    assert message(path).startswith(f"'{path}' has metadata that cannot be used: ")


def test_a_missing_tensor_is_named(saved):
    path, *_ = saved
    rewrite(path, lambda about, tensors: tensors.pop("backbone.conv1.0.weight"))
    assert message(path).startswith(f"'{path}' lacks tensor 'backbone.conv1.0.weight'\n")


def test_weights_of_another_number_of_classes_leave_the_classifiers_fresh(saved):
    path, network, _ = saved
    other, _ = make(num_classes=9)
    notes = load_weights(other, path).notes
    assert notes[0].startswith(f"weights from {path}; ") and "fc" in notes[0] and "heads.exit1" in notes[0]
    assert torch.equal(other.backbone.conv1[0].weight, network.backbone.conv1[0].weight)


def test_weights_of_timms_own_format_are_taken(tmp_path):
    plain = timm.create_model("test_resnet", num_classes=5)
    save_file(plain.state_dict(), tmp_path / "timm.safetensors")
    network, _ = make()
    load_weights(network, tmp_path / "timm.safetensors")
    assert torch.equal(network.backbone.fc.weight, plain.fc.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    network, _ = make()
    with pytest.raises(UserError, match=r"does not fit test_resnet: tensor 'conv1\.0\.weight' is missing"):
        load_weights(network, tmp_path / "vit.safetensors")


def test_weights_of_another_model_of_sdcli_name_it(saved):
    path, _, _ = saved
    with pytest.raises(UserError, match="has the weights of test_resnet, not of test_vit"):
        load_weights(make("test_vit")[0], path)


def test_the_same_network_gives_the_same_bytes_with_a_new_files_permissions(saved):
    path, network, about = saved
    path.with_name("plain").touch()
    for number in range(5):
        again = path.with_name(f"again{number}.safetensors")
        save_checkpoint(again, network.state_dict(), about)
        assert again.read_bytes() == path.read_bytes()
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


def test_a_loaded_network_knows_its_classes_and_preprocessing(saved):
    path, _, about = saved
    network = sdcli.load(str(path))
    assert not network.training and network.blueprint == about.blueprint
    assert network.blueprint.classes == ("class 0", "class 1", "class 2", "class 3", "class 4")


# Metadata are not believed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda about, _: about["architecture"]["model_args"].update(checkpoint_path="/etc/passwd"), "model_args.checkpoint_path"),
        (lambda about, _: about["architecture"]["model_args"].update(pretrained_cfg={}), "model_args.pretrained_cfg"),
        (lambda about, _: about["architecture"]["model_args"].update(features_only=True), "model_args.features_only"),
        (lambda about, _: about["architecture"].update(model="hf-hub:someone/something"), "would have to be fetched"),
        (lambda about, _: about["architecture"].update(model="local-dir:/tmp"), "would have to be fetched"),
        (lambda about, _: about["architecture"].update(num_classes=7), "5 classes of a network of 7"),
        (lambda about, _: about["architecture"].update(stem="other"), "stem = 'other'"),
        (lambda about, _: about["architecture"].update(input_size=[3, 10**9, 10**9]), "input sizes"),
        (lambda about, _: about["preprocess"].update(std=[0.0, 1.0, 1.0]), "preprocess has numbers"),
        (lambda about, _: about["preprocess"].update(interpolation="cubist"), "preprocess.interpolation = 'cubist'"),
        (lambda about, _: about["preprocess"].update(crop_pct=1e-9), "a share or an epoch is out of range"),
        (lambda about, _: about["plan"].update(macs=0), "parameters and 0 MACs"),
        (lambda about, _: about["plan"].update(macs=about["plan"]["stages"][-1]["macs"] - 1), "above the network's"),
        (lambda about, _: about["preprocess"].update(mean=["a", 0, 0]), "preprocess.mean.0: Input should be a valid number"),
        (lambda about, _: about["plan"]["stages"][0].update(module="nowhere"), "cannot be built"),
        (lambda about, _: about["plan"]["stages"][0].update(output_fmt="NLC"), "cannot be built"),
        (lambda about, _: about["plan"]["stages"][0].update(tensor=3), "cannot be built"),
        (lambda about, _: about["plan"].update(stages=[]), "0 stages"),
        (lambda about, _: about["heads"].update(exit9="linear"), "a head at 'exit9'"),
        (lambda about, _: about["heads"].update(exit1="linear"), "tensor 'heads.exit1."),
        (lambda about, _: about.update(epoch="3"), "epoch: Input should be a valid integer"),
        (lambda about, _: about.update(version=True), "version = True"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_true_are_refused(saved, change, reason):
    path, *_ = saved
    rewrite(path, change)
    assert reason in message(path).split("\n")[0]


def test_mutated_metadata_are_one_message_or_harmless(saved):
    path, *_ = saved
    tensors, metadata = read_tensors(path)
    about, random, refused = json.loads(metadata["sdcli"]), Random(0), 0
    for _ in range(150):
        save_file(tensors, path, {"format": "pt", "sdcli": json.dumps(mutated(about, random))})
        try:
            rebuild(path)
        except UserError as error:
            refused += 1
            assert "\n" not in error.wrong and len(str(error)) < 3000
    assert refused > 75


def test_mutated_bytes_are_one_message_or_harmless(saved):
    path, *_ = saved
    whole, random, refused = path.read_bytes(), Random(1), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.choice([1, 1, 3, 50])):
            # Most of what can go wrong is in the header.
            data[random.randrange(header if random.random() < 0.9 else len(data))] = random.randrange(256)
        path.write_bytes(data[: random.randrange(len(data))] if random.random() < 0.2 else data)
        try:
            rebuild(path)
        except UserError:
            refused += 1
    assert refused > 75


POLICY = Policy({"exit1": 0.9, "exit2": None, "exit3": 0.5}, "ensemble", {"exit1": 1.5, "final": 1.1})
CALIBRATION = Calibration(
    POLICY,
    (OperatingPoint({"exit1": 0.5}, 0.4, 70.0), OperatingPoint(POLICY.thresholds, 0.7, 74.5)),
    num_images=500,
    data="digits (validation)",
    date="2026-11-24",
    promise=Promise("drop", 1.0, 0.8, 0.9, "clopper-pearson", 250),
)


def test_a_calibration_is_written_beside_the_same_tensors(saved, tmp_path):
    path, _, about = saved
    before, other = path.read_bytes(), tmp_path / "other.safetensors"
    describe_again(path, replace(about, early_exit=CALIBRATION), other)
    assert path.read_bytes() == before
    tensors, again = load_checkpoint(other)
    assert again.early_exit == CALIBRATION
    assert all(torch.equal(tensor, load_file(path)[name]) for name, tensor in tensors.items())
    describe_again(path, replace(about, early_exit=CALIBRATION), path)
    assert path.read_bytes() == other.read_bytes()
    describe_again(path, about, path)
    assert path.read_bytes() == before


def test_a_budget_chooses_the_best_setting_within_it():
    assert CALIBRATION.at_budget(0.3) is None
    assert CALIBRATION.at_budget(0.69).thresholds == {"exit1": 0.5}
    assert CALIBRATION.at_budget(0.7) == POLICY


def test_a_budget_chooses_by_the_images_that_chose_and_of_equally_good_settings_the_cheapest():
    def curve(*gave: float | None) -> Calibration:
        costs, measured = (0.4, 0.7, 0.8, 1.0), (60.0, 50.0, 80.0, 10.0)
        limits = ({"exit1": 0.5}, {"exit1": 0.7}, {"exit1": 0.9}, {})
        settings = map(OperatingPoint, limits, costs, measured, gave)
        return replace(CALIBRATION, curve=tuple(settings))

    chosen = curve(61.0, 78.0, 78.0, 10.0)
    assert [chosen.at_budget(budget).thresholds for budget in (0.5, 0.75, 1, 2)] == [
        {"exit1": limit} for limit in (0.5, 0.7, 0.7, 0.7)
    ]
    # What is not known of all of them counts for none.
    unknown = curve(61.0, 78.0, None, 10.0)
    assert [unknown.at_budget(budget).thresholds["exit1"] for budget in (0.7, 0.8, 1)] == [0.7, 0.9, 0.9]


def test_a_calibration_that_does_not_say_by_what_it_chose_is_read(saved):
    path, _, about = saved
    describe_again(path, replace(about, early_exit=CALIBRATION), path)
    rewrite(path, lambda described, _: [point.pop("chosen_by") for point in described["early_exit"]["curve"]])
    assert rebuild(path)[1].early_exit == CALIBRATION


@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_is_written_through_a_symbolic_link(saved, tmp_path, there):
    path, network, about = saved
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target.safetensors", tmp_path / "link.safetensors"
    if there:
        target.write_bytes(path.read_bytes())
    link.symlink_to("elsewhere/target.safetensors")
    save_checkpoint(link, network.state_dict(), replace(about, epoch=7))
    assert link.is_symlink() and load_checkpoint(target)[1].epoch == 7
    describe_again(link, replace(about, epoch=8), link)
    assert link.is_symlink() and load_checkpoint(target)[1].epoch == 8
    check_writable(link)
    assert [file.name for file in target.parent.iterdir()] == ["target.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "last.safetensors", "link.safetensors"]


@pytest.mark.parametrize("error", [ImportError("no module named 'wheels'"), OSError(24, "Too many open files")])
def test_a_failure_of_the_machine_is_not_blamed_on_the_checkpoint(saved, monkeypatch, error):
    path, *_ = saved

    def fails(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("sdcli.network.weights.build", fails)
    said = message(path)
    assert said.startswith(f"'{path}' cannot be built here: {type(error).__name__}: ")
    assert said.endswith("the checkpoint is not the cause")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found["policy"].update(kind="sureness"), "unknown policy 'sureness'"),
        (lambda found: found["policy"]["thresholds"].update(exit9=0.5), "there is no exit 'exit9'"),
        (lambda found: found["policy"]["temperatures"].update(exit1=-1.0), "the temperature of exit1 is -1.0"),
        (lambda found: found["curve"].reverse(), "early_exit.curve is not sorted by cost"),
        (lambda found: found["curve"][0].update(thresholds={"exit1": "low"}), "early_exit.curve.0.thresholds.exit1"),
        (lambda found: found["promise"].update(measured=float("nan")), "not finite"),
        (lambda found: found["curve"][0].update(thresholds={"exit9": 0.5}), "there is no exit 'exit9'"),
        (lambda found: found["curve"][1].update(thresholds={"final": 0.5}), "there is no exit 'final'"),
        (lambda found: found["curve"][0].update(cost=-1.0), "early_exit.curve has a cost or an accuracy"),
        (lambda found: found["curve"][0].update(chosen_by=101.0), "early_exit.curve has a cost or an accuracy"),
        (lambda found: found["policy"]["temperatures"].update(exit1=1e-9), "the temperature of exit1 is 1e-09"),
        (lambda found: found["policy"]["temperatures"].update(final=21.0), "the temperature of final is 21.0"),
        (lambda found: found.update(num_images=0), "early_exit.num_images = 0"),
        (lambda found: found["promise"].update(confidence=1.0), "early_exit.promise.confidence = 1"),
        (lambda found: found["promise"].update(limit=0.0), "early_exit.promise has a limit of 0 points"),
        (lambda found: found["promise"].update(limit=100.5), "early_exit.promise has a limit of 100.5 points"),
        (lambda found: found["promise"].update(num_images=0), "early_exit.promise.num_images = 0"),
    ],
)
def test_a_calibration_that_cannot_be_true_is_refused(saved, change, reason):
    path, _, about = saved
    describe_again(path, replace(about, early_exit=CALIBRATION), path)
    rewrite(path, lambda described, _: change(described["early_exit"]))
    assert message(path).startswith(f"'{path}' has metadata that cannot be used: ") and reason in message(path)
