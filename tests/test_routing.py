"""Early exit inside a batch: what is routed is what a full pass says, and what cannot be routed is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sdcli.errors import UserError
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.policies import POLICIES, Judge, Policy, decide
from sdcli.network.routing import PATIENCE, _rows
from sdcli.recipe.schema import Network

SMALL = ["test_resnet", "test_vit", "test_vit4", "test_convnext", "test_efficientnet", "test_mambaout", "test_maxvit"]
SMALL += ["test_coatnet", "test_byobnet", "test_nfnet", "test_vit_relpos"]

FAMILIES = [
    "resnet18",
    "resnet26d",
    "resnext26ts",
    "seresnet18",
    "densenet121",
    "vgg11_bn",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnetv2_rw_t",
    "regnetx_002",
    "regnety_002",
    "repvgg_a0",
    "convnext_atto",
    "convnextv2_atto",
    "mambaout_femto",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "hiera_tiny_224",
    "levit_128s",
    "fastvit_t8",
    "mobilevitv2_050",
    "coatnet_pico_rw_224",
    "maxvit_pico_rw_256",
    "poolformer_s12",
    "mixer_s32_224",
    "gmixer_24_224",
    "edgenext_xx_small",
    "efficientformer_l1",
    "ghostnet_050",
    "lcnet_050",
    "rexnet_100",
    "dla34",
    "hardcorenas_a",
]
"""One model of each of 40 families."""


def made(name: str, lean: float = 0.0, **table: object) -> MultiExit:
    """A network with random weights of some size: fresh classifiers are close to zero. `lean` favours one class."""
    torch.manual_seed(0)
    classes = [str(number) for number in range(10)]
    network = build(Blueprint.draft(Network(**table), name, classes)).eval()
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.out_features == 10:
            nn.init.normal_(module.weight)
            module.bias.data[0] += lean
    return network


@pytest.fixture
def patient(monkeypatch):
    """Images of a stream wait for a whole batch after each exit, also large ones on a CPU, and not before they enter."""
    monkeypatch.setattr("sdcli.network.routing.ENOUGH", 2**30)
    monkeypatch.setattr("sdcli.network.routing.MANY", 0)


def pixels(network: MultiExit) -> int:
    _, height, width = network.plan.input_size
    return height * width


def images_for(network: MultiExit, count: int) -> Tensor:
    images = torch.randn(count, *network.plan.input_size, generator=torch.Generator().manual_seed(1))
    return images.to(next(network.parameters()))


def full_pass(network: MultiExit, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {point: signal.logits for point, signal in network(images).items()}


def spread(logits: dict[str, Tensor], exits: list[str], **options: object) -> Policy:
    """A policy by which about a third of the images that reach an exit leave there, if so many may."""
    policy = Policy(dict.fromkeys(exits, -math.inf), **options)
    scores, guesses = reference_scores(policy, logits), reference_guesses(policy, logits)
    left, before, limits = torch.ones(len(logits["final"]), dtype=torch.bool), None, {}
    for point in exits:
        agrees = torch.zeros_like(left) if before is None else guesses[point] == before
        may = left & agrees if policy.agreement and (left & agrees).any() else left
        ordered = scores[point][may].sort(descending=True).values
        # Halfway between two images: neither's score depends on which others are in the batch to the last bit.
        place = min(max(1, int(left.sum()) // 3), len(ordered) - 1)
        limits[point] = float(ordered[place - 1 : place + 1].mean()) if place else 0.0
        left &= ~((scores[point] >= limits[point]) & (agrees | (not policy.agreement)))
        before = guesses[point]
    return policy.at(limits)


def reference_scores(policy: Policy, logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """The policies' scores, written out once more."""
    scores = {}
    for point, (own, mean) in reference_probabilities(policy, logits).items():
        ordered = own.sort(dim=1, descending=True).values
        scores[point] = {
            "ensemble": mean.max(dim=1).values,
            "confidence": own.max(dim=1).values,
            "margin": ordered[:, 0] - ordered[:, 1],
            "entropy": 1 + (own * own.log()).sum(dim=1) / math.log(own.shape[1]),
        }[policy.kind]
    return scores


def reference_guesses(policy: Policy, logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class that each exit would answer."""
    both = reference_probabilities(policy, logits)
    return {point: (mean if policy.kind == "ensemble" else own).argmax(dim=1) for point, (own, mean) in both.items()}


def reference_probabilities(policy: Policy, logits: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each exit alone, and of the geometric mean of the exits so far."""
    found, so_far = {}, []
    for point in policy.thresholds:
        own = torch.softmax(logits[point] / policy.temperatures.get(point, 1.0), dim=1)
        so_far.append(own)
        product = torch.stack(so_far).prod(dim=0) ** (1 / len(so_far))
        found[point] = own, product / product.sum(dim=1, keepdim=True)
    return found


def compare(network: MultiExit, count: int, **options: object) -> Policy:
    images = images_for(network, count)
    logits = full_pass(network, images)
    exits = [point for point, reason in network.why_not.items() if not reason]
    policy = spread(logits, exits, **options)
    expected, routed = decide(policy, logits), network.route(images, policy)
    assert torch.equal(routed.exits, expected.exits)
    torch.testing.assert_close(routed.answers, expected.answers, rtol=1e-4, atol=1e-4)
    used = [routed.points[place] for place in sorted(set(routed.exits.tolist()))]
    # Nothing comes before the first exit with which it could agree.
    assert used == [*exits[1 if policy.agreement else 0 :], "final"], "some leave at every exit, and some go on"
    return policy


@pytest.mark.parametrize("name", SMALL)
def test_routed_answers_equal_those_of_a_full_pass(name):
    network = made(name)
    assert not any(network.why_not.values())
    compare(network, 12)


def sizes_at(network: MultiExit, module: str) -> list[int]:
    """From now on, the sizes of the batches that go into a module."""
    sizes = []
    network.backbone.get_submodule(module).register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 5, 7), (6, 3), (6, 1, 2, 2), (1, 3, 2, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "part"])
def test_rows_are_taken_out_of_maps_of_every_layout(shape, layout):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if layout == "channels_last":
        tensor = tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor.mT
    elif layout == "transposed":
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "part":
        tensor = torch.cat([tensor, tensor])[2:, ..., 1:][: len(tensor)]
    for rows in ([0, 2, 3, 5], [4], []):
        wanted = torch.tensor([row for row in rows if row < len(tensor)], dtype=torch.long)
        found = _rows(tensor, wanted)
        assert torch.equal(found, tensor[wanted])
        if layout == "channels_last" and len(shape) == 4 and len(wanted) > 1:
            assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["ensemble", "margin"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit4", "test_convnext"])
def test_a_stream_answers_as_batches_one_by_one_and_in_their_order(name, kind, patient):
    network = made(name)
    images = images_for(network, 29)
    policy = spread(full_pass(network, images), ["exit1", "exit2", "exit3"], kind=kind, agreement=kind == "margin")
    batches = images.split([4, 4, 3, 4, 1, 4, 4, 4, 1])
    streamed = list(network.stream(batches, policy))
    assert [len(decided.answers) for decided in streamed] == [len(batch) for batch in batches]
    for batch, decided in zip(batches, streamed, strict=True):
        alone = network.route(batch, policy)
        assert torch.equal(decided.exits, alone.exits) and decided.points == alone.points
        torch.testing.assert_close(decided.answers, alone.answers, rtol=1e-4, atol=1e-4)


def test_images_of_a_stream_wait_until_a_batch_of_them_goes_on(patient):
    network = made("test_resnet")
    images = images_for(network, 24)
    policy = spread(full_pass(network, images), ["exit1", "exit2", "exit3"])
    network.check(policy)
    deep = sizes_at(network, "layer3")
    left = network.route(images, policy).exits
    deep.clear()
    list(network.stream(images.split(4), policy))
    going = int((left >= 2).sum())
    # At the end one image may lead those that wait further down.
    assert deep[: going // 4] == [4] * (going // 4) and going <= sum(deep) <= going + 1
    deep.clear()
    for batch in images.split(4):
        network.route(batch, policy)
    assert sum(deep) == going and len(deep) > going // 4 + 2


@pytest.mark.parametrize(("pixels_of", "least"), [(3, 1), (1, 3)], ids=["small", "large"])
def test_only_few_images_of_a_stream_wait_on_a_cpu(pixels_of, least, monkeypatch):
    """Three small ones have enough pixels; of large ones, each of which has, as many go on together."""
    network = made("test_resnet")
    monkeypatch.setattr("sdcli.network.routing.ENOUGH", pixels_of * pixels(network))
    monkeypatch.setattr("sdcli.network.routing.FEW", least)
    monkeypatch.setattr("sdcli.network.routing.MANY", 0)
    images = images_for(network, 24)
    scores = Judge(Policy({"exit1": 0.0})).read("exit1", full_pass(network, images)["exit1"]).score.sort()
    sure, unsure = images[scores.indices[12:]], images[scores.indices[:12]]
    policy = Policy({"exit1": float(scores.values[11:13].mean())})
    network.check(policy)
    deep = sizes_at(network, "layer2")
    # Of eight images five, two, three and two are unsure: where fewer than three are, they wait for the next batch's.
    batches = [torch.cat([unsure[a:b], sure[: 8 - (b - a)]]) for a, b in ((0, 5), (5, 7), (7, 10), (10, 12))]
    streamed = list(network.stream(batches, policy))
    assert deep == [5, 5, 2]
    assert [int((decided.exits == 1).sum()) for decided in streamed] == [5, 2, 3, 2]


def test_all_who_wait_go_on_with_the_last_batch_of_a_stream(monkeypatch):
    """No further pass is needed, whose first stages would run for nothing."""
    network = made("test_resnet")
    monkeypatch.setattr("sdcli.network.routing.MANY", 0)
    images = images_for(network, 24)
    policy = spread(full_pass(network, images), ["exit1", "exit2", "exit3"])
    network.check(policy)
    alone = network.route(images, policy).exits
    first, last = sizes_at(network, "layer1"), sizes_at(network, "layer4")
    streamed = list(network.stream(images.split(6), policy))
    assert first == [6] * 4 and sum(last) == int((alone == 3).sum()) and len(last) < 4
    assert torch.equal(torch.cat([decided.exits for decided in streamed]), alone)


def test_nobody_waits_in_a_stream_where_one_image_is_enough(monkeypatch):
    network = made("test_resnet")
    monkeypatch.setattr("sdcli.network.routing.ENOUGH", pixels(network))
    monkeypatch.setattr("sdcli.network.routing.FEW", 1)
    monkeypatch.setattr("sdcli.network.routing.MANY", 4 * pixels(network))
    images = images_for(network, 12)
    policy = spread(full_pass(network, images), ["exit1", "exit2", "exit3"])
    network.check(policy)
    router = network.router(policy)
    # Each enters when the next one has come.
    assert [len(router.take(batch)) for batch in images.split(4)] == [0, 1, 1]
    assert len(router.rest()) == 1


def test_small_batches_of_a_stream_enter_together_on_a_cpu(monkeypatch):
    network = made("test_resnet")
    images = images_for(network, 20)
    policy = spread(full_pass(network, images), ["exit1", "exit2", "exit3"])
    network.check(policy)
    alone = network.route(images, policy)
    monkeypatch.setattr("sdcli.network.routing.MANY", 8 * pixels(network))
    monkeypatch.setattr("sdcli.network.routing.ENOUGH", pixels(network))
    monkeypatch.setattr("sdcli.network.routing.FEW", 1)
    first = sizes_at(network, "layer1")
    batches = images.split([3, 3, 1, 2, 8, 2, 1])
    router = network.router(policy)
    found = [router.take(batch) for batch in batches]
    # Eight are enough, and enter when the next batch has come; the last three enter when no more come.
    assert first == [9, 8] and [len(own) for own in found] == [0, 0, 0, 0, 4, 1, 0]
    found.append(router.rest())
    assert first == [9, 8, 3] and len(found[-1]) == 2
    decided = [own for answered in found for own in answered]
    assert [len(own.exits) for own in decided] == [3, 3, 1, 2, 8, 2, 1]
    assert torch.equal(torch.cat([own.exits for own in decided]), alone.exits)
    torch.testing.assert_close(torch.cat([own.answers for own in decided]), alone.answers, rtol=1e-4, atol=1e-4)


def test_batches_of_a_stream_do_not_wait_long_to_enter(monkeypatch):
    network = made("test_resnet")
    monkeypatch.setattr("sdcli.network.routing.MANY", 1000 * pixels(network))
    monkeypatch.setattr("sdcli.network.routing.ENOUGH", pixels(network))
    router = network.router(Policy({"exit1": 0.5}))
    answered = [len(router.take(image)) for image in images_for(network, PATIENCE + 3).split(1)]
    assert answered == [0] * (PATIENCE + 1) + [PATIENCE + 1, 0]
    assert len(router.rest()) == 2


def test_an_answer_of_a_stream_is_held_back_for_a_few_batches_at_most(patient):
    network = made("test_resnet")
    images = images_for(network, 4)
    # Of the first batch one image goes to the end, and all that follow leave at exit1.
    logits = full_pass(network, images)
    scores = Judge(Policy({"exit1": 0.0})).read("exit1", logits["exit1"]).score.sort(descending=True)
    first, easy = images, images[scores.indices[:1]].expand(4, -1, -1, -1)
    policy = Policy({"exit1": float(scores.values[-2:].mean()), "exit2": 2.0})
    router = network.router(policy)
    answered = [len(router.take(batch)) for batch in (first, *[easy] * 20)]
    # It waits at exit1, and then at exit2.
    assert answered == [0] * (2 * PATIENCE + 1) + [2 * PATIENCE + 1] + [1] * (19 - 2 * PATIENCE)
    assert len(router.rest()) == 1
    assert network.route(first, policy).exits.tolist().count(2) == 1


def test_a_stream_without_images_and_a_batch_without_images_have_no_answers():
    network = made("test_resnet")
    policy = Policy({"exit1": 0.5})
    assert list(network.stream([], policy)) == []
    empty = images_for(network, 0)
    assert network.route(empty, policy).answers.shape == (0, 10)
    assert [len(decided.exits) for decided in network.stream([empty, images_for(network, 2)], policy)] == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_routed_answers_equal_those_of_a_full_pass_in_every_family(name, patient):
    # In double precision: deep networks with random weights amplify rounding, which differs between processors.
    network = made(name).double()
    # Their logits are huge: all scores would be 1.
    spread_of = {point: float(own.std()) for point, own in full_pass(network, images_for(network, 9)).items()}
    policy = compare(network, 9, temperatures=spread_of)
    images = images_for(network, 9)
    streamed = torch.cat([decided.exits for decided in network.stream(images.split(3), policy)])
    assert torch.equal(streamed, network.route(images, policy).exits)
    refused = {point for point, reason in network.why_not.items() if reason}
    assert refused == {point for point, stage in network.stages.items() if not stage.clean and point != "final"}


@pytest.mark.parametrize("agreement", [False, True])
@pytest.mark.parametrize("kind", list(POLICIES.entries))
def test_every_policy_routes_as_it_decides(kind, agreement):
    # Random exits agree on nothing.
    compare(
        made("test_resnet", lean=8.0 if agreement else 0.0),
        30,
        kind=kind,
        agreement=agreement,
        temperatures={"exit1": 2.0, "exit2": 0.5},
    )


@pytest.mark.parametrize("agreement", [False, True])
@pytest.mark.parametrize("kind", list(POLICIES.entries))
def test_policies_decide_as_a_loop_over_images_does(kind, agreement):
    generator = torch.Generator().manual_seed(3)
    logits = {point: 3 * torch.randn(200, 5, generator=generator) for point in ("exit1", "exit2", "exit3", "final")}
    temperatures = {"exit1": 2.0, "exit2": 1.0, "exit3": 0.7}
    limits = {"exit1": 0.7, "exit2": None, "exit3": 0.5}
    decided = decide(Policy(limits, kind, temperatures, agreement), logits)
    scores = reference_scores(Policy(limits, kind, temperatures), logits)
    for image in range(200):
        before, where = None, "final"
        products = torch.ones(5)
        for point in ("exit1", "exit2", "exit3"):
            own = torch.softmax(logits[point][image] / temperatures[point], dim=0)
            products = products * own
            guess = int((products if kind == "ensemble" else own).argmax())
            # Where nobody leaves an exit only counts if later ones ask for its opinion.
            if limits[point] is None and kind != "ensemble" and not agreement:
                continue
            sure = limits[point] is not None and scores[point][image] >= limits[point]
            if sure and (not agreement or guess == before):
                where = point
                break
            before = guess
        answer = int(logits["final"][image].argmax()) if where == "final" else guess
        assert decided.points[decided.exits[image]] == where
        assert int(decided.answers[image].argmax()) == answer


def test_the_entropy_score_is_never_below_zero():
    for num_classes in range(2, 300):
        logits = torch.zeros(3, num_classes)
        score = Judge(Policy({"exit1": 0.0}, "entropy")).read("exit1", logits).score
        assert bool((score >= 0).all()) and score == pytest.approx(0, abs=1e-5), num_classes
        decided = decide(Policy({"exit1": 0.0}, "entropy"), {"exit1": logits, "final": logits})
        assert decided.exits.tolist() == [0] * 3, "a threshold of 0 is for all"


def test_nobody_leaves_at_thresholds_of_none_and_the_answer_is_the_plain_networks():
    network = made("test_resnet")
    images = images_for(network, 5)
    routed = network.route(images, Policy(dict.fromkeys(network.classifiers[:-1])))
    assert routed.points == ("final",)
    with torch.no_grad():
        assert torch.equal(routed.answers, torch.log_softmax(network.backbone(images), dim=1))


def test_the_rest_of_the_network_is_not_run_when_all_have_left():
    network = made("test_resnet")
    calls = []
    network.backbone.get_submodule(network.stages["exit2"].module).register_forward_hook(lambda *_: calls.append(1))
    network.why_not  # noqa: B018 - runs the network
    calls.clear()
    routed = network.route(images_for(network, 4), Policy({"exit1": 0.0}))
    assert routed.exits.tolist() == [0] * 4 and not calls


def test_heads_of_exits_that_are_switched_off_are_not_run():
    network = made("test_resnet")
    network.why_not  # noqa: B018
    for head in network.heads.values():
        head.forward = None
    network.heads["exit2"].__dict__.pop("forward")
    routed = network.route(images_for(network, 4), Policy({"exit2": 2.0, "exit3": None}))
    assert routed.points == ("exit2", "final")


def test_training_mode_and_taps_are_as_before_after_routing():
    network = made("test_vit").train()
    network.backbone.eval()
    before = [module.training for module in network.modules()]
    network.route(images_for(network, 4), Policy({"exit1": 0.5}))
    assert [module.training for module in network.modules()] == before
    assert network(images_for(network, 2)).keys() == set(network.points)


def test_a_stage_that_is_no_clean_cut_is_refused_with_the_reason():
    network = made("hrnet_w18_small")
    with pytest.raises(UserError, match="stage2 also reads earlier tensors") as error:
        network.route(images_for(network, 2), Policy({"exit2": 0.5}))
    assert "exit1" in error.value.expected


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensor, count: tensor.reshape(count, -1, *tensor.shape[2:]), "relies on the number of images"),
        (lambda tensor, count: tensor - tensor.mean(dim=0), "gives other results"),
    ],
)
def test_a_model_that_remembers_the_batch_is_refused(spoil, reason):
    network = made("test_resnet")
    backbone, features = network.backbone, network.backbone.forward_features

    def remembering(images):
        counts = [len(images)]
        hook = backbone.layer3.register_forward_hook(lambda module, args, output: spoil(output, counts[0]))
        try:
            return features(images)
        finally:
            hook.remove()

    backbone.forward_features = remembering
    assert reason in network.why_not["exit1"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy({"exit9": 0.5}), "there is no exit 'exit9'"),
        (Policy({"exit2": 0.5, "exit1": 0.5}), "not in the network's order"),
        (Policy({"exit1": 0.5}, "sureness"), "unknown policy 'sureness'"),
        (Policy({"exit1": 0.5}, temperatures={"exit1": 0.0}), "temperature of exit1"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(policy, message):
    network = made("test_resnet")
    with pytest.raises(UserError, match=message):
        network.route(images_for(network, 2), policy)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_truncated_network_answers_as_the_whole_and_holds_nothing_deeper(name):
    network = made(name)
    images, costs = images_for(network, 2), network.blueprint.costs()
    logits = full_pass(network, images)
    before = copy.deepcopy(network.state_dict())
    for point in network.classifiers:
        alone = network.upto(point)
        with torch.no_grad():
            assert torch.equal(alone(images), logits[point])
        assert sum(parameter.numel() for parameter in alone.parameters()) == costs[point].params
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_truncated_network_needs_a_head():
    with pytest.raises(UserError, match="unknown exit 'exit1'"):
        made("test_resnet", head="none").upto("exit1")


def test_an_image_pays_for_the_head_of_every_exit_that_it_passes():
    blueprint = made("test_resnet").blueprint
    heads, stages = blueprint.head_costs(), blueprint.stages
    passing = blueprint.passing(["exit1", "exit3"])
    assert passing["exit1"] == stages["exit1"].macs + heads["exit1"].macs
    assert passing["exit3"] == stages["exit3"].macs + heads["exit1"].macs + heads["exit3"].macs
    assert passing["final"] == blueprint.plan.macs + heads["exit1"].macs + heads["exit3"].macs
