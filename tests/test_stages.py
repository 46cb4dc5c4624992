"""Stages are where a careful engineer would cut, and what is said about them is true."""

from __future__ import annotations

import doctest
import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdcli.errors import UserError
from sdcli.network.cuts import find_stages
from sdcli.network.stages import Stage, StagePlan, prefix_tokens, tap_modules, to_map
from sdcli.network.trace import count

SIZE = (3, 224, 224)


def on_meta(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def plan_of(name: str, size: tuple[int, int, int] = SIZE, **arguments: Any) -> StagePlan:
    return find_stages(on_meta(name), size, name=name, **arguments)


def modules(plan: StagePlan) -> list[str]:
    return [stage.module for stage in plan.stages]


def maps(plan: StagePlan) -> list[tuple[int, int, int]]:
    return [(stage.num_chs, *stage.size) for stage in plan.stages]


class Blocks(nn.Module):
    """Four equal convolutions, with a classifier behind them."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


# Which stages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("convnext_atto", ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("efficientnet_b0", ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
        ("mobilenetv3_small_050", ["blocks.0", "blocks.1", "blocks.3", "blocks.5"]),
        ("vgg11", ["features.4", "features.9", "features.14", "features.20"]),
        ("deit_tiny_patch16_224", ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]),
        ("swin_tiny_patch4_window7_224", ["layers.0", "layers.1", "layers.2", "layers.3"]),
        # GhostNet announces the first block of a resolution, the last one is meant.
        ("ghostnet_050", ["blocks.2", "blocks.4", "blocks.6", "blocks.9"]),
        # The announced modules return two tensors; the blocks inside return one.
        ("pit_ti_224", ["transformers.0.blocks", "transformers.1.blocks", "transformers.2.blocks"]),
        ("mvitv2_tiny", ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("twins_svt_small", ["blocks.0.1", "blocks.1.1", "blocks.2.9", "blocks.3.3"]),
        ("hrnet_w18_small", ["layer1", "stage2", "stage3", "final_layer"]),
        ("coat_tiny", ["serial_blocks1.1", "serial_blocks2.1", "parallel_blocks.2", "parallel_blocks.5"]),
    ],
)
def test_the_stages_of_a_family_are_its_own(name: str, expected: list[str]) -> None:
    assert modules(plan_of(name)) == expected


def test_the_example_of_find_stages_is_true() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(find_stages, "find_stages", globs={})
    assert doctest.DocTestRunner().run(example) == (0, 5)


def test_pyramid_is_found_by_what_timm_announces_and_trunk_by_equal_shares() -> None:
    assert plan_of("resnet18").found_by == "feature_info"
    plan = plan_of("vit_small_patch16_224")
    assert plan.found_by == "equal shares"
    assert [round(stage.macs / plan.macs, 1) for stage in plan.stages] == [0.3, 0.5, 0.8, 1.0]


def test_layouts_are_told_from_what_follows() -> None:
    assert {stage.output_fmt for stage in plan_of("convnext_atto").stages} == {"NCHW"}
    assert {stage.output_fmt for stage in plan_of("swin_tiny_patch4_window7_224").stages} == {"NHWC"}
    assert maps(plan_of("swin_tiny_patch4_window7_224")) == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("gmixer_12_224", 0), ("deit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)],
)
def test_prefix_tokens_are_counted(name: str, tokens: int) -> None:
    for stage in plan_of(name).stages:
        assert (stage.output_fmt, stage.size, stage.num_prefix_tokens) == ("NLC", (14, 14), tokens)


def test_register_tokens_are_prefix_tokens() -> None:
    plan = plan_of("vit_small_patch14_reg4_dinov2", (3, 518, 518))
    assert {stage.num_prefix_tokens for stage in plan.stages} == {5}
    assert {stage.size for stage in plan.stages} == {(37, 37)}


def test_images_need_not_be_square() -> None:
    assert maps(plan_of("resnet18", (3, 224, 320)))[-1] == (512, 7, 10)


# How many stages


def test_more_stages_cut_the_heaviest_at_its_middle() -> None:
    assert modules(plan_of("resnet18", exits=5)) == ["layer1.0", "layer1.1", "layer2", "layer3", "layer4"]
    assert len(plan_of("deit_tiny_patch16_224", exits=12).stages) == 12


def test_fewer_stages_keep_the_deepest() -> None:
    assert modules(plan_of("resnet18", exits=1)) == ["layer4"]
    assert modules(plan_of("resnet18", exits=3)) == ["layer1", "layer3", "layer4"]


def test_too_many_stages_say_how_many_are_possible() -> None:
    with pytest.raises(UserError) as caught:
        find_stages(Blocks(), (3, 8, 8), exits=9, name="blocks")
    assert str(caught.value) == (
        "blocks cannot be cut into 9 stages\n  expected: between 1 and 4\n  fix:      --exits 4"
    )


def test_no_stage_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="blocks cannot be cut into 0 stages"):
        find_stages(Blocks(), (3, 8, 8), exits=0, name="blocks")


def test_named_stages_are_taken_and_the_deepest_is_added() -> None:
    plan = plan_of("deit_tiny_patch16_224", exits=["blocks.7", "blocks.3"])
    assert modules(plan) == ["blocks.3", "blocks.7", "blocks.11"]
    assert plan.found_by == "named"


def test_a_named_module_behind_the_last_stage_is_the_last() -> None:
    assert modules(plan_of("deit_tiny_patch16_224", exits=["blocks.3", "norm"])) == ["blocks.3", "norm"]


def test_a_named_module_keeps_its_name() -> None:
    assert modules(plan_of("resnet18", exits=["layer1.1", "layer2"])) == ["layer1.1", "layer2", "layer4"]


def test_two_names_of_one_tensor_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        plan_of("resnet18", exits=["layer1", "layer1.1"])
    assert str(caught.value) == (
        "'layer1.1' and 'layer1' return the same tensor of resnet18\n"
        "  expected: modules that return different tensors\n"
        "  fix:      leave one of them out"
    )


def test_a_module_named_twice_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        plan_of("resnet18", exits=["layer1", "layer2", "layer1"])
    assert str(caught.value) == "exits: 'layer1' is named 2 times\n  expected: each module once"


def test_one_module_may_be_named_alone() -> None:
    assert modules(plan_of("resnet18", exits="layer2")) == ["layer2", "layer4"]


def test_a_misspelt_module_gets_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        plan_of("resnet18", exits=["layr2"])
    assert caught.value.wrong == "resnet18 has no module 'layr2'"
    assert caught.value.fix == "did you mean 'layer2'?"


def test_a_model_without_stages_takes_named_ones() -> None:
    class Lone(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    with pytest.raises(UserError) as caught:
        find_stages(Lone(), (3, 8, 8), name="lone")
    assert str(caught.value) == (
        "lone has no stages of its own: no modules whose maps divide the work into stages\n"
        "  expected: a network of stages or blocks\n"
        "  fix:      name the modules to attach exits to with --exits"
    )
    assert modules(find_stages(Lone(), (3, 8, 8), exits=["blocks.0"])) == ["blocks.0"]


class Awkward(nn.Module):
    """Everything that keeps a module from being tapped."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(3, 3, 1)
        self.never = nn.Conv2d(3, 3, 1)
        self.changed = nn.Conv2d(3, 3, 1)
        self.blocks = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(8)))
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)))
        x = self.changed(x)
        x.view(-1).mul_(2)
        return self.fc(self.blocks(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("twice", "is called 2 times in a forward pass"),
        ("never", "is never called in a forward pass"),
        ("changed", "returns a tensor that is changed in place afterwards"),
        ("fc", "returns a tensor of shape [1, 3], which is not a map"),
    ],
)
def test_a_module_that_cannot_be_tapped_says_why(name: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        find_stages(Awkward(), (3, 8, 8), exits=[name], name="awkward")
    assert str(caught.value) == (
        f"module '{name}' of awkward {why}\n"
        "  expected: a module that is called once and returns a map\n"
        "  fix:      name others, such as blocks.0, blocks.1, blocks.4"
    )


def test_a_size_that_the_model_refuses_is_reported_with_its_reason() -> None:
    with pytest.raises(UserError) as caught:
        plan_of("deit_tiny_patch16_224", (3, 32, 32))
    assert caught.value.wrong == (
        "deit_tiny_patch16_224 does not run on an image of 3x32x32: Input height (32) doesn't match model (224)."
    )


# What depends on what


class TwoBranches(Blocks):
    """The fourth block also reads the first one's output, past the two in between."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        third = self.blocks[2](self.blocks[1](first))
        return self.fc(self.blocks[3](third + first).mean((2, 3)))


def test_a_cut_is_clean_only_where_nothing_jumps_over_it() -> None:
    plan = find_stages(TwoBranches(), (3, 8, 8), exits=["blocks.0", "blocks.1", "blocks.2"])
    assert {stage.module: stage.clean for stage in plan.stages} == {
        "blocks.0": True,
        "blocks.1": False,
        "blocks.2": False,
        "blocks.3": True,
    }
    assert plan.notes == (
        "The layers after blocks.1 and blocks.2 also read earlier tensors: exits there can be trained and read, but the "
        "network cannot stop early or be truncated there.",
    )


def test_what_follows_a_clean_cut_depends_on_nothing_else() -> None:
    """Changing everything before a clean cut, and putting its tensor back, leaves the logits as they were."""
    model = timm.create_model("test_efficientnet").eval()
    image = torch.randn(1, 3, 64, 64)
    plan = find_stages(model, (3, 64, 64))
    assert all(stage.clean for stage in plan.stages)
    for stage in plan.stages[:-1]:
        module = model.get_submodule(stage.module)
        kept: list[Tensor] = []
        with torch.no_grad():
            hook = module.register_forward_hook(lambda m, a, output, kept=kept: kept.append(output.clone()))
            logits = model(image)
            hook.remove()
            hook = module.register_forward_hook(lambda m, a, output, kept=kept: kept[0])
            other = model(torch.randn(1, 3, 64, 64))
            hook.remove()
        torch.testing.assert_close(logits, other)


class Unread(Blocks):
    """One parameter is never used, another only for what is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.zeros(2))
        self.aside = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return super().forward(x)


def test_parameters_that_never_reach_the_output_are_listed() -> None:
    plan = find_stages(Unread(), (3, 8, 8))
    assert plan.unused == ("never", "aside.weight")
    assert plan.notes == ("Parameters that never affect the output and are not trained: 2 (never, aside.weight).",)
    assert plan_of("resnet18").unused == ()


def test_an_output_changed_in_place_is_passed_over() -> None:
    # VGG's convolutions return tensors that the ReLU behind them overwrites.
    plan = plan_of("vgg11")
    model = on_meta("vgg11")
    assert all(not isinstance(model.get_submodule(name), nn.Conv2d) for name in modules(plan))


def test_a_dropout_is_not_taken_for_the_tensor_it_passes_on() -> None:
    class Dropping(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5)) for _ in range(4))

    for stage in find_stages(Dropping(), (3, 8, 8)).stages:
        assert tap_modules(stage) == [stage.module] == [f"blocks.{stage.module[-1]}"]


def test_tap_modules_return_the_stage_s_own_tensor() -> None:
    model = timm.create_model("test_resnet").eval()
    plan = find_stages(model, (3, 64, 64))
    returned: dict[str, Tensor] = {}
    for stage in plan.stages:
        assert len(tap_modules(stage)) > 1
        for path in tap_modules(stage):
            module = model.get_submodule(path)
            module.register_forward_hook(lambda m, a, output, path=path: returned.update({path: output}))
    model(torch.zeros(1, 3, 64, 64))
    for stage in plan.stages:
        assert len({id(returned[path]) for path in tap_modules(stage)}) == 1


# What it costs


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("resnet50", 4.09e9, 25.56e6),
        ("swin_tiny_patch4_window7_224", 4.49e9, 28.29e6),
        ("convnext_tiny", 4.46e9, 28.59e6),
        ("vit_small_patch16_224", 4.60e9, 22.05e6),
        ("efficientnet_b0", 0.39e9, 5.29e6),
    ],
)
def test_costs_are_the_published_ones(name: str, macs: float, params: float) -> None:
    plan = plan_of(name)
    assert plan.macs == pytest.approx(macs, rel=0.011)
    assert plan.params == pytest.approx(params, rel=0.001)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"])
def test_macs_are_half_of_what_torch_counts(name: str) -> None:
    model = on_meta(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 160, 160, device="meta"))
    assert 2 * find_stages(model, (3, 160, 160)).macs == counter.get_total_flops()


def test_costs_up_to_a_stage_are_those_of_the_modules_before_it() -> None:
    model = on_meta("resnet18")
    first = find_stages(model, SIZE).stages[0]
    front = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool, model.layer1)
    assert (first.params, first.macs) == count(front, torch.empty(1, *SIZE, device="meta"))


def test_count_of_a_linear_layer() -> None:
    assert count(nn.Linear(5, 7), torch.zeros(3, 5)) == (5 * 7 + 7, 3 * 5 * 7)


# Maps


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_convnext",
        "test_efficientnet",
        "test_vit2",
        "hiera_tiny_224",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_maps_are_those_of_forward_intermediates(name: str) -> None:
    """timm's own `forward_intermediates` is the reference; Hiera's tokens lie in windows, which it also undoes."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = (3, 224, 224) if "224" in name else (3, 160, 160)
    plan = find_stages(model, size)
    kept: dict[Stage, Tensor] = {}
    for stage in plan.stages:
        module = model.get_submodule(stage.module)
        module.register_forward_hook(lambda m, a, output, stage=stage: kept.update({stage: output}))
    with torch.no_grad():
        reference = model.forward_intermediates(
            torch.randn(2, *size), intermediates_only=True, output_fmt="NCHW", norm=False
        )
    compared = 0
    for stage, tensor in kept.items():
        own = to_map(tensor, stage)
        assert own.shape == (2, stage.num_chs, *stage.size)
        compared += any(own.shape == other.shape and torch.equal(own, other) for other in reference)
    assert compared == len(plan.stages) > 2


def test_tokens_of_another_image_keep_their_proportions() -> None:
    stage = plan_of("deit_tiny_patch16_224").stages[0]
    tokens = torch.arange(2 * (1 + 36) * 192.0).reshape(2, 37, 192)
    assert to_map(tokens, stage).shape == (2, 192, 6, 6)
    assert torch.equal(to_map(tokens, stage)[1, :, 0, 1], tokens[1, 2])


def test_prefix_tokens_come_first_and_may_be_none() -> None:
    stage = plan_of("deit_tiny_patch16_224").stages[0]
    tokens = torch.randn(2, 197, 192)
    assert torch.equal(prefix_tokens(tokens, stage), tokens[:, :1])
    assert prefix_tokens(torch.zeros(2, 64, 56, 56), plan_of("resnet18").stages[0]).shape == (2, 0, 64)


# Classifier


@pytest.mark.parametrize(
    ("name", "classifier", "width"),
    [
        ("resnet18", "fc", 512),
        ("convnext_atto", "head.fc", 320),
        ("efficientnet_b0", "classifier", 1280),
        ("vgg11", "head.fc", 4096),
        ("ghostnet_050", "classifier", 1280),
        ("dla34", "fc", 512),
        ("deit_tiny_distilled_patch16_224", None, 192),
    ],
)
def test_the_classifier_is_what_makes_logits_of_the_embedding(name: str, classifier: str | None, width: int) -> None:
    plan = plan_of(name)
    assert (plan.classifier, plan.embedding_dim) == (classifier, width)


# The plan


def test_plan_survives_json() -> None:
    for name in ("resnet18", "mvitv2_tiny", "hrnet_w18_small"):
        plan = plan_of(name)
        assert StagePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_model_is_left_as_it_was() -> None:
    model = timm.create_model("test_resnet")
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    find_stages(model, (3, 64, 64))
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_plan_is_the_same_with_and_without_weights() -> None:
    assert find_stages(timm.create_model("test_vit"), (3, 160, 160)) == find_stages(on_meta("test_vit"), (3, 160, 160))


def test_the_size_of_the_images_is_the_one_that_timm_states():
    assert find_stages(on_meta("test_resnet")) == find_stages(on_meta("test_resnet"), (3, 160, 160))
    # What a model was built for counts, where it differs from what its weights were trained for.
    with torch.device("meta"):
        model = timm.create_model("test_vit", img_size=64)
    assert find_stages(model).input_size == (3, 64, 64)


def test_a_model_that_states_no_size_is_refused():
    with pytest.raises(UserError, match="Sequential does not state the size of its images") as error:
        find_stages(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert error.value.fix == "find_stages(model, (3, 224, 224))"
