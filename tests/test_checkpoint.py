"""The checkpoint: complete, atomic, a plain timm model inside, and clear about what it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sdcli import __version__
from sdcli.errors import UserError
from sdcli.network.backbones import resolve
from sdcli.network.blueprint import build_network, load_weights, plan_network, rebuild
from sdcli.network.checkpoint import VERSION, Description, load_checkpoint, save_checkpoint
from sdcli.network.multi_exit import MultiExit, choose_heads
from sdcli.recipe.schema import Network


def make(name: str = "test_resnet", num_classes: int = 5) -> tuple[MultiExit, Description]:
    torch.manual_seed(0)
    architecture = resolve(name, num_classes=num_classes, image_size=None)
    plan = plan_network(Network(), architecture)
    heads = choose_heads(plan, "auto")
    network, _ = build_network(Network(), architecture, plan, heads, num_classes)
    about = Description(
        architecture=architecture,
        plan=plan,
        heads=heads,
        classes=[f"class {i}" for i in range(num_classes)],
        preprocess={"mean": [0.5, 0.5, 0.5]},
        dataset={"name": "digits"},
        recipe={"epochs": 1},
        epoch=3,
        scores={},
    )
    return network, about


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
    from sdcli.network.checkpoint import read_tensors

    about = json.loads(read_tensors(path)[1]["sdcli"])
    change(about, tensors)
    save_file(tensors, path, {"format": "pt", "sdcli": json.dumps(about)})


def test_a_checkpoint_gives_back_network_and_description(saved):
    path, network, about = saved
    again, description = rebuild(path)
    assert description == about
    images = torch.randn(2, *about.plan.input_size)
    with torch.no_grad():
        before, after = network.eval()(images), again.eval()(images)
    assert all(torch.equal(before[point].logits, after[point].logits) for point in before)


def test_the_backbones_tensors_are_a_plain_timm_model(saved):
    path, network, about = saved
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    tensors = load_file(path)
    plain.load_state_dict({n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")})
    images = torch.randn(2, *about.plan.input_size)
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
        "  expected: a .safetensors file, such as RUN/best.safetensors"
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
    assert said.endswith("copy it again if it was cut short; a .pth or .pt file has to be converted first")


def test_a_pickle_is_never_read(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {}}, path)
    assert message(path).startswith(f"'{path}' cannot be read as safetensors: ")


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
    assert message(path).startswith(f"'{path}' has metadata that cannot be read: ")


def test_a_missing_tensor_is_named(saved):
    path, *_ = saved
    rewrite(path, lambda about, tensors: tensors.pop("backbone.conv1.0.weight"))
    assert message(path).startswith(f"'{path}' lacks tensor 'backbone.conv1.0.weight'\n")


def test_weights_of_another_number_of_classes_leave_the_classifiers_fresh(saved):
    path, network, _ = saved
    other, _ = make(num_classes=9)
    notes = load_weights(other, path)
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
