"""The zoo's networks are the papers', as far as their counts tell, and do all that timm's networks do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_families import benchmark
from test_train import QUICK, after, finish, same
from torch import Tensor, nn

from sdcli.errors import UserError
from sdcli.export.export import export
from sdcli.network.backbones import resolve
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import Description, TrainedOn, save_checkpoint
from sdcli.network.cuts import find_stages
from sdcli.network.multi_exit import build
from sdcli.network.weights import load_weights, rebuild
from sdcli.recipe.load import load_recipe
from sdcli.recipe.schema import Network
from sdcli.run.events import Stopped
from sdcli.run.prepare import prepare
from sdcli.run.resume import resume, resumed
from sdcli.run.state import load_state
from sdcli.run.train import fit
from sdcli.zoo import NAMES
from sdcli.zoo.public import renamed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import make_zoo  # noqa: E402
from make_zoo import PUBLISHED, params_of, plan_of  # noqa: E402

sys.path.pop(0)

SMALL = [f"cifar_resnet{depth}" for depth in ("8", "14", "20", "20_half", "32", "44", "56")]
SMALL += ["cifar_wrn_16_2", "cifar_wrn_40_1", "cifar_vgg8_bn", "cifar_squeezenet", "cifar_mobilenetv2"]
SMALL += ["cifar_mobilenetv2_050", "cifar_shufflenetv1", "cifar_shufflenetv2"]
"""Those of at most 130 M MACs, which are trained in a test; the others are traced."""
CLASSES = [str(number) for number in range(10)]


def on_meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conv_weights(module: nn.Module) -> int:
    return sum(conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d))


# The papers' counts


def test_the_issue_s_networks_are_there() -> None:
    names = [f"resnet{depth}" for depth in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4", "20_half")]
    names += [f"wrn_{name}" for name in ("16_2", "40_1", "40_2", "28_10", "28_12", "20_8", "44_8")]
    names += ["resnext29_8x64d", "resnext29_16x64d", "pyramidnet101_240", "pyramidnet110_270", "densenet_bc_100_12"]
    names += [f"vgg{depth}_bn" for depth in (8, 11, 13, 16, 19)]
    names += [
        "mobilenetv1",
        "mobilenetv2",
        "mobilenetv2_050",
        "shufflenetv1",
        "shufflenetv2",
        "squeezenet",
        "googlenet",
    ]
    assert set(NAMES) == {f"cifar_{name}" for name in names}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_printed(name: str) -> None:
    about = PUBLISHED[name]
    assert about.agrees(params_of(name, about.num_classes)) != bool(about.off)


def residual(num_blocks: int, widths: tuple[int, int, int, int], projects: bool) -> int:
    """Parameters of a CIFAR ResNet, by hand: convolutions, two for each norm's channel, classifier for 100 classes."""
    old, *rest = widths
    total = 27 * old + 2 * old
    for new in rest:
        total += 9 * old * new + 9 * new * new * (2 * num_blocks - 1) + 2 * new * 2 * num_blocks
        total += old * new + 2 * new if projects and old != new else 0
        old = new
    return total + 100 * old + 100


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar_resnet8", residual(1, (16, 16, 32, 64), False)),
        ("cifar_resnet14", residual(2, (16, 16, 32, 64), False)),
        ("cifar_resnet20_half", residual(3, (8, 8, 16, 32), False)),
        ("cifar_resnet32x4", residual(5, (32, 64, 128, 256), True)),
        # The paper's, without the 7x7 stem and the biases; with a 3x3 stem and the two values of each norm's channel.
        ("cifar_squeezenet", 1_248_424 - 900 * 513 - (7 * 7 * 3 * 96 + 96) + (27 * 96 + 96) + 96 + 2880),
    ],
)
def test_parameters_are_those_counted_by_hand(name: str, count: int) -> None:
    assert params_of(name, 100) == count


@pytest.mark.parametrize(
    ("name", "counterpart"), [("cifar_mobilenetv1", "mobilenetv1_100"), ("cifar_mobilenetv2", "mobilenetv2_100")]
)
def test_mobilenets_have_timms_parameters(name: str, counterpart: str) -> None:
    assert params_of(name, 1000) == params(on_meta(counterpart))


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_the_convolutions_of_vgg_are_timms(depth: int) -> None:
    assert params(on_meta(f"cifar_vgg{depth}_bn").stages) == params(on_meta(f"vgg{depth}_bn").features)


def test_the_convolutions_of_googlenet_are_those_of_the_papers_table() -> None:
    # Its thousands are 1024; the sum of 3a to 5b.
    printed = 1024 * (159 + 380 + 364 + 437 + 463 + 580 + 840 + 1072 + 1388)
    assert conv_weights(on_meta("cifar_googlenet").stages) == pytest.approx(printed, rel=0.005)


def test_a_wide_resnet_of_44_layers_has_seven_blocks_per_stage() -> None:
    # Each block more than in that of 20 layers: two 3x3 convolutions and two norms per stage.
    more = sum(2 * 9 * width**2 + 4 * width for width in (128, 256, 512))
    assert params_of("cifar_wrn_44_8", 100) == params_of("cifar_wrn_20_8", 100) + 4 * more


def test_pyramidnets_grow_to_the_papers_width() -> None:
    # The paper: 16 + alpha, four times as much behind bottlenecks.
    assert on_meta("cifar_pyramidnet110_270").num_features == 16 + 270
    assert on_meta("cifar_pyramidnet101_240").num_features == 4 * (16 + 240)


def test_macs_are_those_counted_by_hand() -> None:
    stem, classifier = 27 * 16 * 32**2, 64 * 100
    first, second, third = 6 * 9 * 16 * 16, 9 * 16 * 32 + 5 * 9 * 32 * 32, 9 * 32 * 64 + 5 * 9 * 64 * 64
    assert plan_of("cifar_resnet20").macs == stem + first * 32**2 + second * 16**2 + third * 8**2 + classifier


@pytest.mark.parametrize(
    ("name", "macs", "rel"), [("cifar_shufflenetv1", 137e6, 0.005), ("cifar_shufflenetv2", 146e6, 0.008)]
)
def test_macs_of_shufflenets_at_imagenets_maps_are_the_papers(name: str, macs: float, rel: float) -> None:
    # With 56 pixels the stages' maps are those of 224 pixels behind the paper's stem, which has 112x112 positions.
    own = find_stages(on_meta(name, num_classes=1000), (3, 56, 56)).macs
    assert own + 27 * 24 * (112**2 - 56**2) == pytest.approx(macs, rel=rel)


def test_macs_of_a_wide_resnet_are_those_counted_by_others() -> None:
    # osmr/imgclsmob, which also counts norms and activations.
    assert plan_of("cifar_wrn_28_10").macs == pytest.approx(5246.98e6, rel=0.005)


def test_the_page_is_made_of_the_networks() -> None:
    page = make_zoo.PAGE.read_text(encoding="utf-8")
    assert page.endswith(make_zoo.MARK + "\n" + make_zoo.table()), "run python docs/make_zoo.py"


# timm's interface


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_timms_interface(name: str) -> None:
    model = on_meta(name, num_classes=7, in_chans=1, drop_rate=0.1).eval()
    image = torch.empty(2, 1, 32, 32, device="meta")
    features = model.forward_features(image)
    assert features.shape[:2] == (2, model.num_features) and model(image).shape == (2, 7)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(3, "max")
    assert model(image).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(image).shape == features.shape
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    last = len(model.feature_info) - 1
    maps = on_meta(name, features_only=True, out_indices=(0, last))(torch.empty(2, 3, 32, 32, device="meta"))
    assert [found.shape[1] for found in maps] == [model.feature_info[index]["num_chs"] for index in (0, last)]
    assert [32 // found.shape[-1] for found in maps] == [model.feature_info[index]["reduction"] for index in (0, last)]


def test_the_small_networks_are_small() -> None:
    assert {name for name in NAMES if plan_of(name).macs <= 130e6} == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_sections_that_can_be_left(name: str) -> None:
    plan = plan_of(name)
    three = name in ("cifar_resnet8", "cifar_resnet8x4", "cifar_densenet_bc_100_12")
    assert (len(plan.stages), plan.found_by) == (3 if three else 4, "feature_info")
    assert all(stage.clean for stage in plan.stages) and not plan.unused and plan.classifier == "head.fc"


def test_three_exits_are_the_ends_of_the_stages() -> None:
    for name in ("cifar_resnet8x4", "cifar_resnet32x4", "cifar_wrn_16_2"):
        stages = find_stages(on_meta(name), (3, 32, 32), exits=3).stages
        assert [stage.module for stage in stages] == ["stages.0", "stages.1", "stages.2"]


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64])
def test_smaller_and_larger_images_leave_the_network_as_it_is(size: int) -> None:
    for name in ("cifar_resnet20", "cifar_vgg8_bn", "cifar_shufflenetv1"):
        assert resolve(name, num_classes=10, image_size=size).stem == "imagenet"


def test_a_papers_name_is_answered_with_the_zoos() -> None:
    with pytest.raises(UserError, match="unknown model 'wrn_40_2'") as caught:
        resolve("wrn_40_2", num_classes=100, image_size=32)
    assert caught.value.fix == "did you mean 'cifar_wrn_40_2'?"


def test_an_unknown_shortcut_is_one_message() -> None:
    with pytest.raises(UserError) as caught:
        resolve("cifar_resnet20", num_classes=10, image_size=32, model_args={"shortcut": "b"})
    assert str(caught.value) == (
        "timm cannot build 'cifar_resnet20' with shortcut='b': shortcut is \"pad\" or \"project\", not 'b'"
    )


def test_the_zoo_is_inspected_by_pattern(sdcli) -> None:
    result = sdcli("inspect", "cifar_resnet2*", "--json")
    assert [row["model"] for row in json.loads(result.out)] == ["cifar_resnet20", "cifar_resnet20_half"]


# Training


@pytest.mark.parametrize("name", SMALL)
def test_every_trained_parameter_gets_a_finite_gradient(name: str) -> None:
    row = benchmark().train_one_step(name)
    assert (row.get("error"), row["without_gradient"], row["checkpointing"]) == (None, "", "ok")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SMALL])
def test_every_trained_parameter_of_a_large_one_gets_a_finite_gradient(name: str) -> None:
    row = benchmark().train_one_step(name)
    assert (row.get("error"), row["without_gradient"], row["checkpointing"]) == (None, "", "ok")


CIFAR = ROOT.parent / "shared" / "data" / "cifar100"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs CIFAR-100 beside the checkout")
@pytest.mark.parametrize("name", SMALL)
def test_the_networks_train_on_photos_of_cifar(name: str, tmp_path: Path) -> None:
    settings = replace(QUICK, model=name, dataset=str(CIFAR))
    finish(prepare(settings, load_recipe(["byot"], ["epochs=1", "batch.size=48"]), tmp_path / "run"))
    assert (tmp_path / "run" / "report.json").exists()


def trained_twice(name: str, folder: Path, *overrides: str) -> Path:
    """The checkpoint of a run, once another that was stopped and resumed has ended with the same bits."""
    settings = replace(QUICK, model=name, limit_train=8, limit_val=10)
    recipe = load_recipe(["quick"], ["batch.size=4", "epochs=2", *overrides])
    finish(prepare(settings, recipe, folder / "whole"))
    # An epoch asks after two updates and three scored batches: this is between the updates of the second.
    assert isinstance(list(fit(prepare(settings, recipe, folder / "parts"), after(6)))[-1], Stopped)
    assert load_state(folder / "parts" / "state" / "last.pt")["position"]["update"] == 1
    finish(resume(folder / "parts", *resumed(folder / "parts", {}, None, [])))
    assert same(folder / "whole", folder / "parts")
    return folder / "whole" / "last.safetensors"


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "cifar_wrn_16_2", "cifar_vgg8_bn", "cifar_mobilenetv2_050", "cifar_shufflenetv1"]
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    # One of each family; most of the time of a short run is the planning of its exits.
    path = trained_twice(name, tmp_path, "networks.student.exits=1")
    assert "import sdcli.zoo" in export(path, "timm", "final", tmp_path / "out").usage


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_trained_stopped_resumed_exported_and_loaded(name: str, tmp_path: Path) -> None:
    path = trained_twice(name, tmp_path)
    card_agrees(name, path, 8, tmp_path)
    # Gigabytes, for all of them.
    shutil.rmtree(tmp_path)


# Export


def saved(folder: Path, name: str, **table: object) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    network = build(Blueprint.draft(Network(**table), name, CLASSES, image_size=32))
    nn.init.normal_(network.backbone.get_classifier().weight)
    about = Description(network.blueprint, TrainedOn("digits", "digits", 0.1, 42), {}, 3)
    save_checkpoint(folder / f"{name}.safetensors", network.state_dict(), about)
    return folder / f"{name}.safetensors"


def card_agrees(name: str, path: Path, size: int, folder: Path) -> None:
    """A checkpoint's timm folder, loaded in a fresh process by the snippet on its card, answers as the network does."""
    exported = export(path, "timm", "final", folder / "out")
    assert exported.usage.startswith("import sdcli.zoo; model = timm.create_model(")
    card = (exported.output / "README.md").read_text(encoding="utf-8")
    assert f"{name} of sdcli, which registers it with timm" in card
    snippet = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(exported.output))
    images = torch.randn(2, 3, size, size)
    save_file({"images": images}, folder / "images.safetensors")
    snippet += f"""
import torch
from safetensors.torch import load_file, save_file
with torch.no_grad():
    save_file({{"logits": model(load_file("{folder}/images.safetensors")["images"])}}, "{folder}/logits.safetensors")
import sys
assert not {{"sdcli.network", "sdcli.cli", "datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", snippet], check=True, cwd=ROOT)
    network, about = rebuild(path)
    assert about.blueprint.architecture.model == name
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(load_file(folder / "logits.safetensors")["logits"], network(images)["final"].logits)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_mobilenetv2_050"])
def test_timms_folder_is_loaded_by_the_cards_snippet(name: str, tmp_path: Path) -> None:
    table = {"model_args": {"shortcut": "project"}} if name == "cifar_resnet20" else {}
    path = saved(tmp_path, name, **table)
    card_agrees(name, path, 32, tmp_path)


# Weights of public repositories


def public(network: nn.Module, author: str) -> dict[str, Tensor]:
    """The tensors of a zoo's ResNet, under the names of a public repository."""
    found = {}
    for name, tensor in network.state_dict().items():
        new = name.replace("stem.", "")
        for number in range(3):
            new = new.replace(f"stages.{number}.", f"layer{number + 1}.")
        new = new.replace("head.fc", "linear" if author == "akamaster" else "fc")
        found["module." + new if author == "akamaster" else new] = tensor.clone()
    return found


@pytest.mark.parametrize(("author", "shortcut"), [("akamaster", "pad"), ("chenyaofo", "project")])
def test_a_public_file_is_loaded_by_its_names(author: str, shortcut: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model("cifar_resnet20", num_classes=10, shortcut=shortcut)
    tensors = public(theirs, author)
    # Files of old versions of torch do not have the counts.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    assert any(name.startswith(("module.layer3.2.conv2", "layer3.2.conv2")) for name in tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    network = build(Blueprint.draft(Network(model_args={"shortcut": shortcut}), "cifar_resnet20", CLASSES))
    loaded = load_weights(network, tmp_path / "theirs.safetensors")
    assert loaded.fresh == ("heads.exit1", "heads.exit2", "heads.exit3")
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(image)["final"].logits, theirs.eval()(image))


@pytest.mark.parametrize(("file", "own"), [("project", "pad"), ("pad", "project")])
def test_other_shortcuts_are_refused(file: str, own: str, tmp_path: Path) -> None:
    theirs = timm.create_model("cifar_resnet20", num_classes=10, shortcut=file)
    path = tmp_path / "theirs.safetensors"
    save_file(public(theirs, "chenyaofo"), path)
    network = build(Blueprint.draft(Network(model_args={"shortcut": own}), "cifar_resnet20", CLASSES))
    with pytest.raises(UserError) as caught:
        load_weights(network, path)
    has = "1x1 convolutions" if file == "project" else "no layers"
    assert str(caught.value) == (
        f"'{path}' has {has} in the shortcuts between stages, the network has others\n"
        f'  expected: a network with shortcut = "{file}"\n'
        f"  fix:      --set networks.student.model_args.shortcut={file}"
    )


def test_a_public_file_of_another_depth_or_width_is_refused(tmp_path: Path) -> None:
    network = build(Blueprint.draft(Network(), "cifar_resnet20", CLASSES))
    for name, wrong in (("cifar_resnet20_half", "is of shape"), ("cifar_resnet14", "is missing")):
        path = tmp_path / f"{name}.safetensors"
        save_file(public(timm.create_model(name, num_classes=10), "akamaster"), path)
        with pytest.raises(UserError, match=f"does not fit cifar_resnet20.*{wrong}"):
            load_weights(network, path)


def test_names_of_nobody_are_left_as_they_are() -> None:
    assert renamed({"conv1.weight": torch.zeros(1), "layer4.0.conv1.weight": torch.zeros(1)}) == {}
    assert renamed({"module.layer2.0.shortcut.0.weight": torch.zeros(1)}).keys() == {"stages.1.0.downsample.0.weight"}
