"""Exits on timm models: the backbone untouched, every trained parameter taught, costs as published."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.learner import Learner, build_objectives, what_trains
from sdcli.method.objective import Objective
from sdcli.network import heads
from sdcli.network.blueprint import Blueprint
from sdcli.network.heads import HEADS, PatchConv, find_head, head_cost
from sdcli.network.multi_exit import MultiExit
from sdcli.network.multi_exit import build as built
from sdcli.recipe.address import Address
from sdcli.recipe.load import load_recipe, recipe_names
from sdcli.recipe.schema import Network

MODELS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "test_vit4"]
CLASSES = [str(number) for number in range(100)]


def build(
    name: str, head: str = "auto", *, exits: object = "auto", num_classes: int = 7, image_size: int | None = None
) -> MultiExit:
    torch.manual_seed(0)
    return built(Blueprint.draft(Network(exits=exits, head=head), name, CLASSES[:num_classes], image_size=image_size))


def images_for(network: MultiExit, number: int = 2) -> torch.Tensor:
    return torch.randn(number, *network.plan.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_final_logits_equal_the_plain_models_bit_for_bit(name):
    network = build(name).eval()
    plain = timm.create_model(name, num_classes=7).eval()
    plain.load_state_dict(network.backbone.state_dict())
    with torch.no_grad():
        images = images_for(network)
        assert torch.equal(network(images)["final"].logits, plain(images))


@pytest.mark.parametrize("name", MODELS)
def test_every_point_answers_with_the_announced_shapes(name):
    network = build(name)
    signals = network(images_for(network))
    assert list(signals) == network.points == [*(f"exit{i}" for i in range(1, len(signals))), "final"]
    assert len(signals) >= 3
    for point, signal in signals.items():
        stage, width = network.stages[point], network.specs[point]
        assert signal.features.shape == (2, stage.num_chs, *stage.size)
        assert width.num_chs == stage.num_chs
        assert signal.embedding.shape == (2, width.embedding_dim)
        assert signal.logits.shape == (2, 7)


@pytest.mark.parametrize("head", [entry.name for entry in HEADS])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_head_fits_every_stage(name, head):
    network = build(name, head)
    for point, signal in network(images_for(network)).items():
        assert signal.logits.shape == (2, 7), point
        if head != "linear":
            assert signal.embedding.shape[1] == network.plan.embedding_dim


def networks_and_recipes() -> list[Any]:
    """Every recipe on a convnet; on a transformer those whose student has exits or branches; the rest where slow tests run."""
    cases = []
    for name in ("test_resnet", "test_vit", "test_efficientnet"):
        for recipe in recipe_names():
            student = load_recipe([recipe]).student
            plain = student.exits == "none" and not student.branches
            slow = name == "test_efficientnet" or (name == "test_vit" and plain)
            cases.append(pytest.param(name, recipe, marks=[pytest.mark.slow] if slow else []))
    return cases


@pytest.mark.parametrize(("name", "recipe"), networks_and_recipes())
def test_every_trained_parameter_gets_a_gradient(name, recipe):
    loaded = load_recipe([recipe])
    head = loaded.student.head
    networks = {who: build(name, head, exits=loaded.student.exits) for who in loaded.taking_part}
    networks |= {
        who: built(Blueprint.draft(table, name, CLASSES[:7])) for who, table in loaded.others.items() if table.branches
    }
    widths = {str(Address(who, p)): spec for who, network in networks.items() for p, spec in network.specs.items()}
    if (recipe, name) == ("ca-mkd", "test_efficientnet"):
        # Between its last map and its classifier there is another convolution.
        with pytest.raises(UserError, match="whose classifiers read their last maps"):
            build_objectives(loaded, widths, 7, 2)
        return
    objectives, making = build_objectives(loaded, widths, 7, 2)
    frozen = [who for who, learns in loaded.taking_part.items() if not learns]
    images = images_for(networks["student"])
    batch = Batch(images, torch.tensor([0, 1]), torch.arange(2), dict.fromkeys(loaded.batch.views, images))
    for number, objective in enumerate(objectives):
        learner = Learner(networks, objective, frozen, making)
        learner.teach(objective, what_trains(loaded, number), loaded.learning(number))
        objective.set_time(1.0, 1.0)
        learner.zero_grad()
        learner(batch)[0].backward()
        for parameter_name, parameter in learner.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_a_parameter_that_never_reaches_the_output_is_not_trained():
    network = build("test_resnet")
    frozen = [name for name, p in network.backbone.named_parameters() if not p.requires_grad]
    assert frozen == list(network.plan.unused)


def test_a_network_without_exits_is_the_plain_model():
    network = build("test_resnet", exits="none")
    assert network.points == ["final"]
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in network.backbone.parameters())


def test_backbone_names_are_timms():
    network = build("test_resnet")
    plain = timm.create_model("test_resnet", num_classes=7)
    assert set(network.backbone.state_dict()) == set(plain.state_dict())


def test_eject_gives_back_the_model_without_taps():
    network = build("test_resnet")
    backbone = network.eject()
    assert isinstance(backbone, nn.Module)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_answers_for_itself(duplicate):
    network = build("test_resnet").eval()
    images = images_for(network)
    with torch.no_grad():
        before = network(images)
        twin = duplicate(network)
        for parameter in network.parameters():
            parameter.zero_()
        after = twin(images)
    for point in before:
        assert torch.equal(before[point].logits, after[point].logits)


def test_a_forward_pass_keeps_nothing():
    network = build("test_resnet")
    network(images_for(network))
    assert network._store.tensors == {}


def test_an_unknown_head_is_explained():
    with pytest.raises(UserError) as error:
        build("test_resnet", "bottelneck")
    assert str(error.value) == (
        "networks.student.head: unknown head 'bottelneck'\n"
        "  expected: one of bottleneck, bottleneck+attention, linear, patch, sepconv, sepconv+attention, tokens\n"
        "  fix:      did you mean 'bottleneck'?"
    )


def speedups(name: str, head: str) -> list[float]:
    table = Network(head=head)
    costs = Blueprint.draft(table, name, CLASSES[:100], image_size=32).costs()
    return [costs["final"].macs / costs[point].macs for point in ("exit1", "exit2", "exit3", "ensemble")]


# Ratios of MACs that reproduce BYOT's Table 5 (arXiv:1905.08094), and the same for the journal code's heads.
@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("resnet18", "bottleneck", [3.10, 1.87, 1.31, 0.933]),
        ("resnet50", "bottleneck", [4.73, 2.23, 1.24, 0.933]),
        ("resnet101", "bottleneck", [9.14, 4.32, 1.11, 0.964]),
        ("resnet18", "sepconv+attention", [3.36, 1.88, 1.30, 0.954]),
        ("resnet50", "sepconv+attention", [3.18, 1.88, 1.16, 0.761]),
    ],
)
def test_speedups_are_the_papers(name, head, expected):
    assert speedups(name, head) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("name", "millions"), [("resnet18", 12.28), ("resnet50", 38.43)])
def test_journal_heads_have_the_authors_number_of_parameters(name, millions):
    table = Network(head="sepconv+attention")
    costs = Blueprint.draft(table, name, CLASSES[:100], image_size=32).costs()
    assert costs["ensemble"].params / 1e6 == pytest.approx(millions, abs=0.005)


def gradients(network: MultiExit, images: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    objective = Objective(load_recipe(["default"]).losses, network.specs)
    total, _ = objective(network(images), Batch(images, torch.tensor([0, 1]), torch.arange(2)))
    total.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_gradient_checkpointing_changes_no_gradient_and_keeps_nothing(name):
    network = build(name).train()
    images = images_for(network)
    plain = gradients(network, images)
    network.backbone.set_grad_checkpointing(True)
    checkpointed = gradients(network, images)
    assert plain.keys() == checkpointed.keys()
    for parameter_name in plain:
        assert torch.allclose(plain[parameter_name], checkpointed[parameter_name], atol=1e-5), parameter_name
    assert network._store.tensors == {}


def test_an_encoder_gets_a_final_head_of_ours():
    blueprint = Blueprint.draft(Network(), "mobilenetv5_300m_enc", CLASSES[:7])
    plan, heads = blueprint.plan, blueprint.heads
    network = built(blueprint, device="meta")
    signals = network.eval()(torch.empty(1, *plan.input_size, device="meta"))
    assert heads["final"] == "pooled"
    assert {point: signal.logits.shape for point, signal in signals.items()} == dict.fromkeys(network.points, (1, 7))
    costs = blueprint.costs()
    assert costs["final"].params == plan.params + plan.embedding_dim * 7 + 7


def loss_of(network: MultiExit, images: torch.Tensor) -> torch.Tensor:
    objective = Objective(load_recipe(["default"]).losses, network.specs)
    return objective(network(images), Batch(images, torch.tensor([0, 1]), torch.arange(2)))[0]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast_trains_and_stays_near(name):
    network = build(name).eval()
    images = images_for(network)
    exact = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(images)
        loss = loss_of(network, images)
    loss.backward()
    assert loss.dtype == torch.float32
    for point, signal in rounded.items():
        difference = (signal.logits.float() - exact[point].logits).norm() / exact[point].logits.norm()
        assert difference < 0.1, point
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_changes_no_logits(name):
    network = build(name).eval()
    images = images_for(network)
    with torch.no_grad():
        before = network(images)
        after = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    for point in network.points:
        torch.testing.assert_close(after[point].logits, before[point].logits)


# The compiler of torch's default backend needs one for C++ on the machine; graph breaks are the same without it.
@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("test_convnext", "test_efficientnet")),
    ],
)
def test_the_whole_forward_pass_compiles_to_one_graph(name):
    network = build(name).eval()
    images = images_for(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        eager, traced = network(images), compiled(images)
    for point in network.points:
        torch.testing.assert_close(traced[point].logits, eager[point].logits)
    network.train()
    loss_of(compiled, images).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_ddp_finds_no_parameter_unused(name, one_process):
    network = build(name).train()
    images = images_for(network)
    wrapped = nn.parallel.DistributedDataParallel(network, find_unused_parameters=False)
    objective = Objective(load_recipe(["default"]).losses, network.specs)
    batch = Batch(images, torch.tensor([0, 1]), torch.arange(2))
    # A parameter without a gradient is complained about in the step after.
    for _ in range(2):
        objective(wrapped(images), batch)[0].backward()


@pytest.mark.parametrize("size", [8, 9, 11])
def test_patches_mixed_as_matrices_are_the_convolution(size, monkeypatch):
    torch.manual_seed(0)
    ours = PatchConv(3, 5, 4, 4, bias=False).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    reference = nn.functional.conv2d(images, ours.weight, stride=4)
    torch.testing.assert_close(ours(images), reference)
    both = [torch.autograd.grad(out.square().sum(), (images, ours.weight)) for out in (ours(images), reference)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)
    # Without gradients short patches are convolved, and long ones mixed.
    for longest in (0, heads.LONG_PATCH):
        monkeypatch.setattr(heads, "LONG_PATCH", longest)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), reference)


@pytest.mark.parametrize("kind", ["patch", "bottleneck/16"])
def test_exits_in_half_precision_say_nearly_the_same(kind):
    """Torch's own convolution does not, where the CPU has AMX and patches have few channels."""
    torch.manual_seed(0)
    table = Network(head=kind, model_args={"channels": [16, 32, 64, 128]})
    network = built(Blueprint.draft(table, "resnet18", image_size=32)).eval()
    images = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        wanted = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = network(images)
        halved = network.to(torch.bfloat16)(images.to(torch.bfloat16))
    for point in network.exits:
        for found in (mixed, halved):
            error = (found[point].logits.float() - wanted[point].logits).abs().max()
            assert error < 0.1 * wanted[point].logits.abs().max(), point


# Wide and deep, small, tokens, maps in NHWC, and two whose classifier alone is too dear for a head.
CHOSEN = {
    "resnet18": "patch", "mobilenetv3_small_100": "patch", "efficientvit_b0": "patch", "vit_tiny_patch16_224": "tokens",
    "swin_tiny_patch4_window7_224": "patch", "lcnet_035": "linear", "test_resnet": "patch",
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_automatic_heads_cost_little_and_every_exit_less_than_the_next(name):
    blueprint = Blueprint.draft(Network(), name, [str(number) for number in range(1000)])
    assert {kind.partition("/")[0] for kind in blueprint.heads.values()} == {CHOSEN[name]}
    own, costs, macs = blueprint.head_costs(), blueprint.costs(), blueprint.plan.macs
    heads = [own[point].macs for point in blueprint.points[:-1]]
    assert max(heads) <= 0.05 * macs and sum(heads) <= 0.15 * macs
    alone = [costs[point].macs for point in blueprint.points]
    assert alone == sorted(set(alone))


def test_automatic_heads_are_as_wide_as_they_may_be():
    blueprint = Blueprint.draft(Network(), "mobilenetv3_small_100", CLASSES[:7])
    for point, kind in blueprint.heads.items():
        width = int(kind.removeprefix("patch/"))
        wider = head_cost(f"patch/{width + 8}", blueprint.plan, blueprint.stages[point], 7)[1]
        assert width == 128 or wider > 0.05 * blueprint.plan.macs


def test_the_width_of_a_head_is_part_of_its_kind():
    narrow, wide = (build("test_resnet", head) for head in ("bottleneck/24", "bottleneck"))
    assert narrow.heads["exit1"].body[0][0].out_channels == 24
    assert wide.heads["exit1"].body[0][0].out_channels == 128
    assert narrow.blueprint.heads["exit1"] == "bottleneck/24"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("linear/24", "head 'linear/24': linear has no width"),
        ("patch/0", "unknown head 'patch/0'"),
        ("patch/1000000", "unknown head 'patch/1000000'"),
        ("pach/24", "unknown head 'pach'"),
    ],
)
def test_a_width_that_cannot_be_is_refused(kind, message):
    with pytest.raises(UserError) as error:
        find_head(kind)
    assert error.value.wrong == message
