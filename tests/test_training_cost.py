"""What a run costs, as its log says, against what torch counts; and which images it is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from sdcli.recipe.load import load_recipe
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.train import backward, fit, next_update
from sdcli.run.training import Training, enter_phase

QUICK = Settings("test_resnet", "digits", limit_train=48, limit_val=20, device="cpu", workers=0)

TWO_NETWORKS = """
extends = "default"
[networks.peer]
model = "test_resnet"
exits = "none"
[losses.peer]
kind = "cross_entropy"
on = "peer.final"
"""


def begun(names: list[str], folder: Path, phase: int = 0) -> Training:
    training = prepare(QUICK, load_recipe(names, ["epochs=2"]), folder / "run")
    enter_phase(training, phase)
    training.module.train()
    training.loader.set_epoch(1, 0)
    return training


@pytest.mark.parametrize(
    ("name", "phase"),
    [("baseline", 0), ("default", 0), ("byot", 0), ("exits-then-all", 1), ("cs-kd", 0), ("ddgsd", 0),
     ("born-again", 1), ("two networks", 0)],
)  # fmt: skip
def test_training_macs_are_those_that_torch_counts(tmp_path, name, phase):
    own = tmp_path / "two.toml"
    own.write_text(TWO_NETWORKS)
    training = begun([str(own) if name == "two networks" else name], tmp_path, phase)
    batch = next_update(training, iter(training.loader))
    with FlopCounterMode(display=False) as counter:
        backward(training, batch)
    counted = counter.get_total_flops() / 2 / len(batch[0].labels)
    # The first layer asks for no gradient of the images; losses are not counted. (Of grouped convolutions torch counts
    # the gradient of the weights as if they were dense, and of attention
    # on a CPU nothing, so neither is here.)
    assert counted == pytest.approx(training.learner.training_macs, rel=0.03)


def test_exits_on_a_frozen_backbone_cost_its_forward_pass_and_their_own_training(tmp_path):
    weights = tmp_path / "plain"
    list(fit(prepare(QUICK, load_recipe(["baseline"], ["epochs=1"]), weights)))
    recipe = load_recipe(["exits-only"], ["epochs=1", f"networks.student.weights={weights / 'last.safetensors'}"])
    training = prepare(QUICK, recipe, tmp_path / "run")
    enter_phase(training, 0)
    network = training.learner.student
    heads = network.blueprint.head_costs()
    heads.pop("final")
    trunk = network.plan.macs
    assert training.learner.training_macs == trunk + 3 * sum(head.macs for head in heads.values())


def test_the_log_has_the_cost_of_every_epoch(tmp_path):
    training = prepare(QUICK, load_recipe(["default"], ["epochs=2"]), tmp_path / "run")
    list(fit(training))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["macs"] for line in lines] == [48 * training.learner.training_macs] * 2
    assert all(line["cpu_seconds"] > 0 for line in lines)


def test_runs_with_other_seeds_have_the_same_images(tmp_path):
    recipe = load_recipe(["baseline"], ["epochs=1"])
    first = prepare(QUICK, recipe, tmp_path / "1")
    other = prepare(replace(QUICK, seed=7), recipe, tmp_path / "2")
    split = prepare(replace(QUICK, split_seed=7), recipe, tmp_path / "3")
    for name in ("train", "validation"):
        assert first.splits[name].index.tolist() == other.splits[name].index.tolist()
        assert first.splits[name].index.tolist() != split.splits[name].index.tolist()
    assert (first.description.dataset.seed, other.description.dataset.seed, split.description.dataset.seed) == (
        42,
        42,
        7,
    )
    one, two = (next(training.learner.student.parameters()) for training in (first, other))
    assert not one.equal(two)
