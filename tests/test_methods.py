"""Every recipe trains and is scored on a convnet and on a transformer, and goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcli.data.batch import Batch
from sdcli.data.dataset import Split
from sdcli.data.loaders import EpochBatches
from sdcli.errors import UserError
from sdcli.evaluation.scoring import score_checkpoint
from sdcli.method.catalogue import completed
from sdcli.method.check import remarks
from sdcli.method.losses import LOSSES
from sdcli.method.signals import Memory, SignalContext
from sdcli.network.checkpoint import read_tensors
from sdcli.network.signals import Signal
from sdcli.network.weights import rebuild
from sdcli.recipe.load import load_recipe, recipe_names, to_toml
from sdcli.recipe.schema import WeightSchedule
from sdcli.run.events import Epoch, Finished, Stopped
from sdcli.run.prepare import prepare
from sdcli.run.resume import resume, resumed
from sdcli.run.settings import Settings
from sdcli.run.train import fit, next_update
from sdcli.run.training import Training, enter_phase

# Short and small, whatever the recipe says: two epochs of each phase, two updates each.
SHORT = ("epochs=2", "batch.size=32", "schedule.warmup_epochs=0", "optimizer.lr=0.01")
MODELS = {"convnet": "test_resnet", "transformer": "test_vit"}


def settings(model: str) -> Settings:
    return Settings(MODELS[model], "digits", limit_train=64, limit_val=20, device="cpu", workers=0)


def recipe_of(name: str, weights: Path | None = None, model: str = "") -> Any:
    """A recipe cut short; one that starts from trained weights, or has a trained teacher, gets `weights`. Other
    networks are a small `model`."""
    recipe = load_recipe([name], SHORT)
    more = [] if recipe.student.weights != "pretrained" else [f"networks.student.weights={weights}"]
    more += [f"networks.{other}.weights={weights}" for other in recipe.awaited]
    more += [f"networks.{other}.model={model}" for other, table in recipe.others.items() if table.model and model]
    return load_recipe([name], [*SHORT, *more]) if weights is not None else recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain trained network of every model."""
    folder = tmp_path_factory.mktemp("finished")
    runs = {model: list(fit(prepare(settings(model), recipe_of("baseline"), folder / model))) for model in MODELS}
    return {model: events[-1].checkpoint for model, events in runs.items()}


def after(questions: int) -> Callable[[], int | None]:
    asked = iter(range(1, questions + 1))
    return lambda: None if next(asked, questions) < questions else 15


def outcome(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "cpu_seconds", "images_per_s")} for line in lines]


def every_recipe() -> Iterator[Any]:
    """All recipes on a convnet; on a transformer those whose networks have exits or compare more than predictions.

    The others, which do the same there, run where slow tests do.
    """
    for name in recipe_names():
        recipe = load_recipe([name])
        reads = {LOSSES.find(loss.kind).reads for loss in recipe.losses.values()}
        plain = recipe.student.exits == "none" and not recipe.student.branches and reads == {"logits"}
        yield name, "convnet"
        yield pytest.param(name, "transformer", marks=[pytest.mark.slow] if plain and not recipe.signals else [])


@pytest.mark.parametrize(("name", "model"), list(every_recipe()))
def test_a_recipe_trains_and_goes_on_exactly(name: str, model: str, finished: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(name, finished[model], MODELS[model])
    whole = list(fit(prepare(settings(model), recipe, tmp_path / "whole")))
    assert isinstance(whole[-1], Finished)
    log = outcome(tmp_path / "whole")
    assert len(log) == sum(recipe.phase_epochs)
    assert all(torch.tensor(list(line["losses"].values())).isfinite().all() for line in log)
    assert whole[-1].report.exits[-1].point == "final"

    # How a run goes on depends on its recipe, not on its model.
    if model == "convnet":
        # In the middle of the second epoch.
        assert isinstance(list(fit(prepare(settings(model), recipe, tmp_path / "parts"), after(4)))[-1], Stopped)
        torch.manual_seed(1)
        list(fit(resume(tmp_path / "parts", *resumed(tmp_path / "parts", {}, None, []))))
        assert outcome(tmp_path / "parts") == log
        first, second = (load_file(tmp_path / folder / "last.safetensors") for folder in ("whole", "parts"))
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)

    # The file alone says the same as the run, without the teachers.
    away = finished[model].rename(finished[model].with_name("away"))
    try:
        best = tmp_path / "whole" / "best.safetensors"
        scored = score_checkpoint(best, device="cpu", split="validation", limit=20).to_dict()
    finally:
        away.rename(finished[model])
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert [e["nll"] for e in scored["exits"]] == pytest.approx([e["nll"] for e in report["exits"]], rel=1e-5)


# What the methods are made of


def losses_of(tables: str, tmp_path: Path, *overrides: str) -> Any:
    file = tmp_path / "recipe.toml"
    file.write_text(tables)
    return load_recipe([str(file)], [*SHORT, *overrides])


def prepared(tables: str, tmp_path: Path, model: str = "convnet") -> Training:
    return prepare(settings(model), losses_of(tables, tmp_path), tmp_path / "run")


def batch_of(training: Training, epoch: int = 1) -> Batch:
    training.loader.set_epoch(epoch)
    return next(iter(training.loader))


def test_weights_over_time_multiply() -> None:
    assert WeightSchedule(value=2.0).at(3, 10) == 2.0 and not WeightSchedule(value=2.0).varies
    assert WeightSchedule(value=2.0, warmup=4).at(1, 10) == 0.5
    assert WeightSchedule(value=1.0, warmup=0.5).at(2.5, 10) == 0.5
    assert (
        WeightSchedule(value=1.0, start=0.5).at(4.9, 10) == 0.0
        and WeightSchedule(value=1.0, start=0.5).at(5.0, 10) == 1.0
    )
    assert WeightSchedule(value=1.0, to=0.2).at(5, 10) == pytest.approx(0.6)
    assert WeightSchedule(value=1.0, start=2, stop=8, decay=0.5).at(6, 10) == pytest.approx(0.8)
    assert WeightSchedule(value=1.0, sigmoid=80).at(40, 300) == pytest.approx(math.exp(-5 / 4))


def test_a_weight_over_time_is_set_at_every_update(tmp_path: Path) -> None:
    tables = 'extends = "baseline"\n[losses.more]\nkind = "cross_entropy"\non = "final"\nweight = { value = 3.0, start = 0.5 }\n'
    training = prepared(tables, tmp_path)
    list(fit(training))
    log = outcome(tmp_path / "run")
    assert [line["losses"]["more"] for line in log] == [0.0, pytest.approx(3 * log[1]["losses"]["task"], rel=1e-5)]


def test_views_are_the_same_images_varied_anew_and_mates_are_of_the_same_class(tmp_path: Path) -> None:
    tables = (
        'extends = "baseline"\n[batch.views.view]\nof = "itself"\n[batch.views.mate]\nof = "class"\n'
        '[losses.view]\nkind = "kl"\non = "final"\ntarget = "final@view"\n'
        '[losses.mate]\nkind = "kl"\non = "final"\ntarget = "final@mate"\n'
    )
    training = prepared(tables, tmp_path)
    first, again, later = batch_of(training), batch_of(training), batch_of(training, 2)
    assert set(first.views) == {"view", "mate"}
    assert torch.equal(first.views["mate"], again.views["mate"])
    assert not torch.equal(first.views["view"], first.images)
    assert not torch.equal(first.views["mate"][:4], later.views["mate"][:4])
    loader = training.loader
    mates = loader.beside.positions("mate", 1, np.arange(len(loader.split)))
    assert (loader.split.labels[mates] == loader.split.labels).all()
    assert 0 < (mates == np.arange(len(mates))).mean() < 0.6, "some are their own mates, by chance"
    # The mate is a constant: its pass has no gradient, and the network is the same.
    passes = {images: set(points.values()) for (_, images), points in training.learner.passes.items()}
    assert passes == {"": {True}, "view": {False}, "mate": {False}}


def test_groups_of_a_class_stay_together_whatever_shares_them() -> None:
    labels = np.arange(60) % 5
    split = Split("train", None, labels, np.arange(60))  # type: ignore[arg-type]
    shares = [EpochBatches(split, 24, seed=1, mates=2, world=2, rank=rank, parts=2) for rank in (0, 1)]
    seen: list[int] = []
    for share in shares:
        assert len(share) == 4
        for places in share.positions():
            groups = places.reshape(-1, 3)
            assert (labels[groups] == labels[groups[:, :1]]).all()
            assert all(len(set(group)) == 3 for group in groups.tolist())
            seen += groups[:, 0].tolist()
    assert len(set(seen)) == len(seen) == 16


def test_a_memory_gives_the_label_first_and_then_what_was_said() -> None:
    memory = Memory(SignalContext([1], 3, 10))
    said = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]])
    batch = Batch(torch.zeros(2, 3, 1, 1), torch.tensor([2, 0]), torch.tensor([7, 1]))
    signal = Signal(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1), said)
    assert memory(signal, batch).softmax(1).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    torch.testing.assert_close(memory(signal, batch).softmax(1), said.softmax(1), atol=1e-3, rtol=0)
    memory.eval()
    memory(Signal(signal.features, signal.embedding, -said), batch)
    torch.testing.assert_close(memory(signal, batch).softmax(1), said.softmax(1), atol=1e-3, rtol=0)


def test_a_gate_learns_from_the_mix_and_not_from_what_the_mix_teaches(tmp_path: Path) -> None:
    training = prepare(settings("convnet"), recipe_of("one-exits"), tmp_path / "run")
    training.learner.objective.set_time(1.0, 2.0)
    gate = training.learner.derived["mix"].make.gate[0].weight
    _, parts = training.learner(batch_of(training))
    assert torch.autograd.grad(parts["labels"], gate, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(parts["soft"], gate, allow_unused=True)[0] is None


def test_a_tap_without_a_head_is_compared_and_not_scored(tmp_path: Path) -> None:
    training = prepare(settings("convnet"), recipe_of("sp"), tmp_path / "run")
    assert training.network.classifiers == ["final"] and len(training.network.points) == 4
    report = list(fit(training))[-1].report
    assert [result.point for result in report.exits] == ["final"] and report.ensemble is None
    assert score_checkpoint(tmp_path / "run" / "best.safetensors", limit=20, device="cpu").ensemble is None
    with pytest.raises(UserError) as error:
        prepare(settings("convnet"), load_recipe(["byot"], ["networks.student.head=none"]), tmp_path / "x")
    assert str(error.value) == (
        "losses.exits compares predictions, but exit1 has no classifier\n"
        "  expected: a point with a head; a network that is trained already has those of its checkpoint\n"
        "  fix:      --set networks.student.head=auto"
    )


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("ps-kd", ["losses.past.on=past", "losses.past.target=final"],
         "losses.past.on = 'past': signals.past has no gradient\n  expected: a point, or a signal with a gradient, "
         "such as kind = 'mean'\n  fix:      use it as a target: target = \"past\""),
        ("one-exits", ["losses.labels.on=all"],
         "signals.mix: kind = 'gated' has weights of its own that no loss teaches\n  expected: a loss on it: on = [\"all\", \"mix\"]"),
        ("bake", ["signals.neighbours.of=exit9"],
         "signals.neighbours.of = 'exit9': the network has no such point\n  expected: one of final"),
        ("bake", ["networks.student.exits=3", "losses.task.on=all", "signals.neighbours.of=all"],
         "signals.neighbours: kind = 'propagated' reads one point\n  expected: one point\n  fix:      of = \"final\""),
        ("ps-kd", ["batch.mixup=1.0"],
         "signals.past: kind = 'memory' needs one class per image, but batch.mixup or batch.cutmix mixes classes\n"
         "  expected: no mixup or cutmix, or another kind\n  fix:      --set batch.mixup=0 --set batch.cutmix=0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_data_are_looked_for(
    recipe: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    nowhere = Settings("test_resnet", str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(UserError) as error:
        prepare(nowhere, load_recipe([recipe], overrides), tmp_path / "run")
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


def test_views_are_mixed_with_the_images_whose_labels_they_share(tmp_path: Path) -> None:
    training = prepare(settings("convnet"), load_recipe(["ddgsd"], [*SHORT, "batch.mixup=1.0"]), tmp_path / "run")
    training.loader.set_epoch(1)
    plain = next(iter(training.loader)).views["view"]
    (batch,) = next_update(training, iter(training.loader))
    assert batch.labels.shape == (32, 10)
    own = batch.labels.max(dim=1).values
    partner = batch.labels.sum(dim=1) - own
    assert not torch.allclose(batch.views["view"], plain) and (partner > 0).any()


def test_a_phase_is_changed_by_its_number() -> None:
    recipe = load_recipe(["born-again"], ["phases.1.rounds=3"])
    assert [phase.rounds for phase in recipe.phases] == [1, 3]
    assert [phase.rounds for phase in load_recipe(["born-again"]).phases] == [1, 1]
    with pytest.raises(UserError) as error:
        load_recipe(["born-again"], ["phases.2.rounds=3"])
    assert (
        str(error.value) == "--set phases.2.rounds=3: there is no phases.2 with keys\n  expected: phases.0 to phases.1"
    )
    with pytest.raises(UserError) as error:
        load_recipe(["quick"], ["phases.0.epochs=3"])
    assert str(error.value) == (
        "--set phases.0.epochs=3: the recipe has no phases\n  expected: a recipe with [[phases]], like born-again"
    )


def test_what_has_no_effect_is_remarked_on(tmp_path: Path) -> None:
    tables = """
extends = "baseline"
[batch]
mixup_prob = 0.5
[batch.views.view]
of = "itself"
[signals.mix]
kind = "mean"
of = "all"
[losses.spare]
kind = "cross_entropy"
on = "final"
[networks.big]
model = "resnet34"
learns = false
[[phases]]
name = "first"
losses = ["task"]
[[phases]]
name = "second"
losses = ["task"]
teacher = true
"""
    assert remarks(losses_of(tables, tmp_path)) == [
        "signals.mix has no effect: no loss reads it",
        "batch.views.view has no effect but its images are loaded: no loss reads final@view",
        "networks.big has no effect but takes memory: nothing reads big.…",
        "phases: teacher = true has no effect: nothing reads teacher.…",
        "batch.mixup_prob has no effect: nothing is mixed",
        "losses.spare has no effect: no phase uses it",
    ]


def test_what_a_run_has_written_down_is_not_remarked_on(tmp_path: Path) -> None:
    (tmp_path / "resolved.toml").write_text(to_toml(completed(load_recipe(["bake"]))))
    assert remarks(load_recipe([str(tmp_path / "resolved.toml")])) == []


@pytest.mark.parametrize("name", recipe_names())
def test_nothing_in_a_recipe_that_comes_with_sdcli_is_without_effect(name: str) -> None:
    expected = ["losses.hint has no effect: its weight is 0"] if name == "byot-nohint" else []
    assert remarks(load_recipe([name])) == expected


def test_a_point_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        prepared('extends = "baseline"\n[losses.task]\non = ["all", "final"]\n', tmp_path)
    assert str(error.value) == "losses.task.on names final twice\n  expected: each point at most once"


def test_two_temperatures_that_belong_together_and_differ_are_remarked_on() -> None:
    assert remarks(load_recipe(["bake"])) == []
    assert remarks(load_recipe(["bake"], ["losses.soft.temperature=1.0"])) == [
        "losses.soft.temperature = 1 should equal signals.neighbours.temperature = 4"
    ]


def test_a_born_again_student_begins_anew_and_is_taught_by_the_one_before(tmp_path: Path) -> None:
    training = prepare(settings("convnet"), recipe_of("born-again"), tmp_path / "run")
    events = fit(training)
    for event in events:
        if isinstance(event, Epoch) and event.epoch == 2:
            break
    before = {name: tensor.clone() for name, tensor in training.learner.student.state_dict().items()}
    next(events)  # the first update of the second phase has been made
    teacher, student = training.learner.networks["teacher"].state_dict(), training.learner.student.state_dict()
    assert all(torch.equal(teacher[name], before[name]) for name in before)
    assert not torch.allclose(student["backbone.conv1.weight"], before["backbone.conv1.weight"], atol=0.05)
    assert [line["phase"] for line in outcome(tmp_path / "run")] == ["first", "first"]
    list(events)
    assert [line["phase"] for line in outcome(tmp_path / "run")] == ["first", "first", "again", "again"]


PHASES = """
extends = "ps-kd"
[networks.student]
exits = 2
[losses.exits]
kind = "cross_entropy"
on = "exits"
[losses.hint]
kind = "hint"
on = "exits"
target = "final"
adapt = "linear"
[[phases]]
name = "first"
epochs = 1
[[phases]]
name = "further"
epochs = 1
teacher = true
[[phases]]
name = "anew"
epochs = 1
fresh = true
"""


def test_a_phase_goes_on_from_what_was_learnt_and_a_fresh_one_from_nothing(tmp_path: Path) -> None:
    training = prepared(PHASES, tmp_path)
    events = fit(training)

    def learnt() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in training.learner.state_dict().items()}

    def ended() -> dict[str, torch.Tensor]:
        next(event for event in events if isinstance(event, Epoch))
        return learnt()

    # Before the first update of the next phase: its settings are what the epoch's end left behind.
    first, adapter = ended(), "objective.trained.0.adapt.weight"
    enter_phase(training, 1)
    assert torch.equal(learnt()[adapter], first[adapter])
    assert learnt()["derived.past.make.seen"].sum() == 64
    enter_phase(training, 2)
    assert not torch.equal(learnt()[adapter], first[adapter])
    assert learnt()["derived.past.make.seen"].sum() == 0


def test_a_run_goes_on_exactly_from_within_a_later_phase_and_round(tmp_path: Path) -> None:
    recipe = load_recipe(["born-again"], [*SHORT, "epochs=1", "phases.1.rounds=2"])
    list(fit(prepare(settings("convnet"), recipe, tmp_path / "whole")))
    log = outcome(tmp_path / "whole")
    assert [line["phase"] for line in log] == ["first", "again", "again"]
    # An epoch has two updates and one scored batch, each of which asks.
    for number, asked in enumerate((5, 8)):
        folder = tmp_path / f"parts{number}"
        assert isinstance(list(fit(prepare(settings("convnet"), recipe, folder), after(asked)))[-1], Stopped)
        training = resume(folder, *resumed(folder, {}, None, []))
        assert training.phase == number + 1
        list(fit(training))
        assert outcome(folder) == log
        whole, parts = (load_file(tmp_path / f / "last.safetensors") for f in ("whole", folder.name))
        assert all(torch.equal(whole[tensor], parts[tensor]) for tensor in whole)


def test_the_average_teaches_and_has_no_gradient(tmp_path: Path) -> None:
    training = prepare(settings("convnet"), recipe_of("ema-teacher"), tmp_path / "run")
    passes = {shown: set(points.values()) for shown, points in training.learner.passes.items()}
    assert passes == {("student", ""): {True}, ("ema", "view"): {False}}
    assert training.learner.networks["ema"] is training.ema.module
    list(fit(training))
    assert all(parameter.grad is None for parameter in training.ema.module.parameters())
    trained = {id(p) for group in training.optimizers["student"].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in training.ema.module.parameters()}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ('[losses.x]\nkind = "kl"\non = "final"\ntarget = "final@veiw"\n[batch.views.view]\nof = "itself"\n',
         "losses.x.target = 'final@veiw': there are no images 'veiw'\n  expected: one of view\n  fix:      did you mean 'view'?"),
        ('[losses.x]\nkind = "kl"\non = "final"\ntarget = "final@view"\n',
         "losses.x.target = 'final@view': there are no images 'view'\n  expected: a [batch.views.NAME] table\n"
         "  fix:      add a [batch.views.view] table"),
        ('[losses.x]\nkind = "kl"\non = "final"\ntarget = "mix"\n[signals.mixed]\nkind = "mean"\nof = "all"\n',
         "losses.x.target = 'mix'\n  expected: 'label', 'next' (the next deeper point), 'final', or one exit such as 'exit1', "
         "or a signal: mixed\n  fix:      did you mean 'mixed'?"),
        ('[[phases]]\nname = "a"\nlosses = ["tusk"]\n',
         "phases.0.losses: unknown loss 'tusk'\n  expected: one of task\n  fix:      did you mean 'task'?"),
        ('[[phases]]\nname = "a"\nlosses = []\n',
         "phases.0.losses = []\n  expected: one entry or more"),
        ('[signals.mix]\nkind = "mean"\nof = "final@veiw"\n[batch.views.view]\nof = "itself"\n',
         "signals.mix.of = 'final@veiw': there are no images 'veiw'\n  expected: one of view\n  fix:      did you mean 'view'?"),
        ('[signals.mix]\nkind = "mean"\nof = "finale"\n',
         "signals.mix.of = 'finale'\n  expected: 'final', 'exits', 'all', 'exit1', 'exit2', … or a list of these\n"
         "  fix:      did you mean 'final'?"),
        ('batch = { mixup = 1.0, views = { mate = { of = "class" } } }\n',
         "batch.views.mate shows another image of the class, and batch.mixup and batch.cutmix mix classes\n"
         "  expected: a recipe that mixes nothing, or views with of = 'itself'\n"
         "  fix:      --set batch.mixup=0 --set batch.cutmix=0"),
        ('[[phases]]\nname = "a"\nteacher = true\n',
         "phases.0.teacher = true: there is no student before the first phase\n  expected: a later phase"),
        ('[losses.x]\nkind = "kl"\non = "final"\ntarget = "teacher.final"\n[[phases]]\nname = "a"\n'
         '[[phases]]\nname = "b"\nteacher = true\n',
         "phases.0 has losses.x, which reads teacher.…, and there is no teacher yet\n"
         "  expected: losses without a teacher, until a phase has teacher = true\n"
         '  fix:      losses = ["task"] in this phase'),
        ('[[phases]]\nname = "a"\n[[phases]]\nname = "b"\nteacher = true\n[networks.teacher]\nmodel = "test_vit"\n',
         "[networks.teacher]: a phase with teacher = true makes this network\n  expected: another name"),
        ('[ema]\n[networks.ema]\nmodel = "test_vit"\n',
         "[networks.ema]: [ema] makes this network\n  expected: another name"),
        ('batch = { mates = 2 }\n',
         "batch.size = 32: batch.mates = 2 makes groups of 3 images\n  expected: a multiple of 3\n"
         "  fix:      --batch-size 30"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_method_is_explained(tables: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        losses_of('extends = "baseline"\n' + tables, tmp_path)
    assert str(error.value).endswith(message)


def logits_of(checkpoint: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return rebuild(checkpoint)[0].eval()(images)["final"].logits


@pytest.mark.parametrize("model", MODELS)
def test_exits_on_a_finished_network_leave_its_answers_bit_for_bit(
    model: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    recipe = load_recipe(
        ["exits-only"],
        [*SHORT, f"networks.student.weights={finished[model]}", "ema.decay=0.5", "epochs=5", "optimizer.lr=0.1"],
    )
    list(fit(prepare(settings(model), recipe, tmp_path / "run")))
    images = torch.randn(4, 3, 8, 8)
    before = logits_of(finished[model], images)
    assert torch.equal(logits_of(tmp_path / "run/last.safetensors", images), before)
    assert torch.equal(logits_of(tmp_path / "run/best.safetensors", images), before)
    first, last = (load_file(path) for path in (finished[model], tmp_path / "run/last.safetensors"))
    assert all(torch.equal(last[name], first[name]) for name in last if name.startswith("backbone."))
    log = outcome(tmp_path / "run")
    assert log[-1]["losses"]["exits"] < log[0]["losses"]["exits"]


def test_exits_need_a_network_that_knows_the_classes(finished: dict[str, Path], tmp_path: Path) -> None:
    weights = tmp_path / "others.safetensors"
    tensors, metadata = read_tensors(finished["convnet"])
    save_file({name: tensor for name, tensor in tensors.items() if ".fc." not in name}, weights, metadata)
    recipe = load_recipe(["exits-only"], [*SHORT, f"networks.student.weights={weights}"])
    with pytest.raises(UserError, match="no loss teaches the final classifier, which has random weights"):
        prepare(settings("convnet"), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the exits would read noise"):
        prepare(settings("convnet"), load_recipe(["exits-only"], ["networks.student.weights=random"]), tmp_path / "run")


def test_mixed_training_begins_without_its_exits(tmp_path: Path) -> None:
    training = prepare(settings("convnet"), recipe_of("exits-then-all"), tmp_path / "run")
    network = training.learner.student
    before = {name: tensor.clone() for name, tensor in network.heads.state_dict().items()}
    events = fit(training)
    while training.position.epoch < 3:
        next(events)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.heads.state_dict().items())
    list(events)
    assert not any(torch.equal(p, before[name]) for name, p in network.heads.named_parameters())


def test_found_weights_are_logged_kept_and_written_as_numbers(tmp_path: Path) -> None:
    changes = [*SHORT, "epochs=4", "losses.hint.weight.warmup=0.5"]
    training = prepare(settings("convnet"), load_recipe(["byot-auto"], changes), tmp_path / "run")
    end = list(fit(training))[-1]
    log = outcome(tmp_path / "run")
    assert set(end.weights) == {"soft", "hint"} and min(end.weights.values()) > 0
    # Measured at the first of eight updates, and no more.
    assert all(line["weights"] == end.weights for line in log)
    found = load_recipe([str(tmp_path / "run" / "found.toml")])
    assert found.losses["soft"].weight == end.weights["soft"]
    hint = found.losses["hint"].weight
    assert hint == WeightSchedule(value=end.weights["hint"], warmup=0.5)
    again = list(fit(prepare(settings("convnet"), found, tmp_path / "again")))[-1]
    assert again.weights == {} and not (tmp_path / "again" / "found.toml").exists()
    # The weight was measured before the first update, so that the runs are the same up to the rounding of the weight.
    for ours, theirs in zip(outcome(tmp_path / "again"), log, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


@pytest.mark.parametrize("stops_after", [5, 10, 26])
def test_shares_go_on_exactly_between_and_at_measurements(stops_after: int, tmp_path: Path) -> None:
    """Measured at updates 1, 10 and 25 of 32; what is found changes the weights of every later update."""
    recipe = load_recipe(["byot-auto"], ["epochs=2", "batch.size=4", "schedule.warmup_epochs=0", "optimizer.lr=0.01"])
    list(fit(prepare(settings("convnet"), recipe, tmp_path / "whole")))
    log = outcome(tmp_path / "whole")
    assert log[0]["weights"] != log[1]["weights"]
    list(fit(prepare(settings("convnet"), recipe, tmp_path / "parts"), after(stops_after)))
    torch.manual_seed(1)
    list(fit(resume(tmp_path / "parts", *resumed(tmp_path / "parts", {}, None, []))))
    assert outcome(tmp_path / "parts") == log
    first, second = (load_file(tmp_path / folder / "last.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
