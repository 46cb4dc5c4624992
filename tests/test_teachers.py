"""Runs with more than one network: teachers, peers, phases, rules and pruning."""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import together
from safetensors.torch import load_file, save_file
from torch import nn

from sdcli.cli.choices import overrides_of
from sdcli.cli.train import train as train_command
from sdcli.data.batch import Batch
from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError
from sdcli.method.losses.features import ConfidentHint
from sdcli.method.pruning import Masks, left_in, uncertainty_scores, weights_of
from sdcli.method.rules import switokd
from sdcli.network.blueprint import Blueprint
from sdcli.network.foreign import Translation, columns_of, draft_foreign
from sdcli.network.multi_exit import build
from sdcli.network.signals import Signal
from sdcli.recipe.load import load_recipe, to_toml
from sdcli.recipe.schema import Network, Prune
from sdcli.run import prepare as preparing
from sdcli.run.events import Epoch, Finished, Step, Stopped
from sdcli.run.prepare import prepare
from sdcli.run.resume import resume, resumed
from sdcli.run.settings import Settings
from sdcli.run.state import load_state
from sdcli.run.train import fit, next_update, score_others, train_step
from sdcli.run.training import Training, enter_phase

SHORT = ("epochs=1", "batch.size=32", "schedule.warmup_epochs=0", "optimizer.lr=0.01")


def settings(**changed: Any) -> Settings:
    about = {"limit_train": 64, "limit_val": 20, "device": "cpu", "workers": 0} | changed
    return Settings("test_resnet", "digits", **about)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained a small network."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    list(fit(prepare(settings(), load_recipe(["baseline"], SHORT), run)))
    return run


def training_of(name: str, folder: Path, *overrides: str, **changed: Any) -> Training:
    return prepare(settings(**changed), load_recipe([name], [*SHORT, *overrides]), folder / "run")


def of_the_page(title: str, folder: Path) -> str:
    """The recipe of docs/teachers.md that has this title, as a file."""
    page = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text(encoding="utf-8")
    start = page.index(f'    title = "{title}"')
    indented = takewhile(lambda line: line.startswith("    ") or not line, page[start:].splitlines())
    (folder / "recipe.toml").write_text(dedent("\n".join(indented)), encoding="utf-8")
    return str(folder / "recipe.toml")


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# What a network that was trained elsewhere is shown, and what it means


def preprocess(size: int, mean: float, std: float) -> Preprocess:
    return Preprocess((3, size, size), (mean,) * 3, (std,) * 3, "bilinear", 1.0)


def test_a_teacher_sees_the_same_crops_in_its_own_colours_and_size():
    pixels = torch.rand(2, 3, 8, 8)
    ours, theirs = preprocess(8, 0.2, 0.5), preprocess(8, 0.6, 0.25)
    shown = Translation(ours, theirs, None).images((pixels - 0.2) / 0.5)
    torch.testing.assert_close(shown, (pixels - 0.6) / 0.25)
    larger = Translation(ours, preprocess(16, 0.2, 0.5), None).images(torch.ones(2, 3, 8, 8))
    assert larger.shape == (2, 3, 16, 16) and larger.eq(1).all()
    alike = torch.rand(2, 3, 8, 8)
    assert Translation(ours, ours, None).images(alike) is alike


def test_classes_are_found_by_name_whatever_their_order():
    assert columns_of(["a", "b"], ["a", "b"], "") is None
    assert columns_of(["sea_lion", "cat"], ["Cat", "dog", "sea lion"], "") == [2, 0]
    # Weights of timm's own format do not name their classes: as many are taken to be the same.
    assert columns_of(["a", "b"], ["0", "1"], "", named=False) is None
    # WordNet's names of ImageNet's classes, of which two are called crane.
    assert columns_of(["goldfish", "n01440764"], ["n01440764", "n01443537"], "") == [1, 0]
    assert columns_of(["n03126707"], ["n02012849", "n03126707"], "") == [1]
    signal = Signal(torch.ones(1, 1, 1, 1), torch.ones(1, 1), torch.tensor([[1.0, 2.0, 3.0]]), classify=nn.Identity())
    told = Translation(preprocess(8, 0, 1), preprocess(8, 0, 1), [2, 0]).signals({"final": signal})["final"]
    assert told.logits.tolist() == [[3.0, 1.0]]
    assert told.classify(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[3.0, 1.0]]


@pytest.mark.parametrize(
    ("ours", "theirs", "named", "words"),
    [
        (["a", "b"], ["a", "c"], True, "does not know 1 of the 2 classes: b\n"),
        (["a", "b"], ["0", "1"], True, "does not know 2 of the 2 classes: a, b\n"),
        (["a", "b"], ["0", "1", "2"], False, "tells 3 classes apart, whose names are not known, and the data have 2\n"),
        (["Crane"], ["n02012849", "n03126707"], True, "rename the data set's class Crane to n02012849 or n03126707"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(ours: list[str], theirs: list[str], named: bool, words: str) -> None:
    with pytest.raises(UserError, match=r"networks\.teacher\.weights") as error:
        columns_of(ours, theirs, "networks.teacher.weights", named=named)
    assert words in str(error.value)


def test_other_classes_are_refused_before_an_image_is_read(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        (tmp_path / "data" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"class{number % 2}" / f"{number}.png").write_bytes(b"not read")
    monkeypatch.setattr(preparing, "measure", lambda data: pytest.fail("images were read"))
    recipe = load_recipe(["kd"], [*SHORT, f"networks.teacher.weights={teacher}"])
    with pytest.raises(UserError, match="does not know 2 of the 2 classes: class0, class1"):
        prepare(Settings("test_resnet", str(tmp_path / "data"), device="cpu", workers=0), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_what_its_checkpoint_says(teacher: Path, tmp_path: Path) -> None:
    training = training_of("kd", tmp_path, f"networks.teacher.weights={teacher}")
    network = training.learner.networks["teacher"]
    assert network.plan.model == "test_resnet" and network.points == ["final"]
    training.module.train()
    saved = load_file(teacher / "best.safetensors")
    assert same(saved, network.state_dict())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    with pytest.raises(UserError, match="has the weights of test_resnet, not of resnet18"):
        draft_foreign(Network(model="resnet18", learns=False, weights=str(teacher)), "teacher", ["final"])


def test_stages_of_a_teacher_without_exits_are_tapped_where_a_loss_reads_them(teacher: Path, tmp_path: Path) -> None:
    training = training_of("at-teacher", tmp_path, f"networks.teacher.weights={teacher}")
    network = training.learner.networks["teacher"]
    assert network.classifiers == ["final"] and len(network.points) > 1


@pytest.mark.parametrize("of_timm", [False, True])
def test_a_teacher_keeps_its_own_size(teacher: Path, tmp_path: Path, of_timm: bool) -> None:
    """A file of timm's own format, and a checkpoint, that expect 160 pixels."""
    file = tmp_path / "weights.safetensors"
    model = build(Blueprint.draft(Network(exits="none"), "test_resnet", [str(n) for n in range(10)]))
    save_file({name: t.clone() for name, t in model.backbone.state_dict().items()}, file)
    given = [f"networks.teacher.weights={file}", "networks.teacher.model=test_resnet"]
    if not of_timm:
        list(fit(prepare(settings(image_size=16), load_recipe(["baseline"], SHORT), tmp_path / "large")))
        given = [f"networks.teacher.weights={tmp_path / 'large'}"]
    training = training_of("kd", tmp_path, *given)
    translation = dict(training.learner.translations.items())["teacher"]
    assert translation.size == ((160, 160) if of_timm else (16, 16))
    batch = next_update(training, iter(training.loader))[0]
    shown = []
    hook = training.learner.networks["teacher"].register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    training.learner(batch)
    hook.remove()
    assert batch.images.shape[-2:] == (8, 8) and shown[0].shape[-2:] == translation.size


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "the recipe has a network 'teacher', and it is not said which"),
        (["networks.teacher.model=resnet18"], "networks.teacher does not learn and has random weights"),
        (["networks.teacher.weights=./nothing"], "'nothing' does not exist"),
    ],
)
def test_a_teacher_that_knows_nothing_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        training_of("kd", tmp_path, *overrides)
    assert words in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("point", ["exit1", "final"])
def test_a_teacher_with_a_classifier_of_random_weights_is_refused(point: str, tmp_path: Path) -> None:
    """A file in timm's own format has nothing for an exit, and this one half of what it should have at the end."""
    model = build(Blueprint.draft(Network(exits="none"), "test_resnet", [str(n) for n in range(10)]))
    tensors = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    if point == "final":
        del tensors["fc.bias"]
    save_file(tensors, tmp_path / "weights.safetensors")
    given = [f"networks.teacher.weights={tmp_path / 'weights.safetensors'}", "networks.teacher.model=test_resnet"]
    given += [f"losses.soft.target=teacher.{point}", "networks.teacher.head=linear"]
    with pytest.raises(UserError) as error:
        training_of("kd", tmp_path, *given)
    assert str(error.value) == (
        f"networks.teacher does not learn, but its classifier at {point} has random weights: the file has no weights for "
        "these classes\n"
        "  expected: weights of a network with the data set's classes\n"
        "  fix:      --set networks.teacher.weights=CHECKPOINT, or --set networks.teacher.learns=true"
    )
    assert not (tmp_path / "run").exists()


def test_the_option_names_a_run_or_a_model(teacher: Path, tmp_path: Path, sdcli: Any) -> None:
    quick = ["--dataset", "digits", "--limit-train", 32, "--limit-val", 20, "--epochs", 1, "--batch-size", 32, "-j", 0]
    result = sdcli("train", "test_resnet", *quick, "--recipe", "kd", "--teacher", teacher, "-o", tmp_path / "run")
    assert result.code == 0 and f"teacher: weights from {teacher / 'best.safetensors'}" in result.err
    assert "validation top-1 %: final " in result.err and ", teacher " in result.err


@pytest.mark.parametrize(
    ("recipe", "named", "words"),
    [
        ("kd", "resnet1", ["--teacher resnet1: networks.teacher.model: unknown model 'resnet1'"]),
        ("kd", "cifar_resnet8", ["there are no pretrained weights of cifar_resnet8", "train it first"]),
        (
            "kd",
            "RUN/plain.safetensors",
            ["does not say of which model its weights are", "networks.teacher.model=MODEL"],
        ),
        ("baseline", "RUN", ["this recipe has no network 'teacher'", "--recipe kd"]),
        ("dml", "resnet18", ["this recipe has no network 'teacher'", "--recipe kd"]),
        ("eskd", "RUN", ["this recipe trains its teacher itself", "--teacher MODEL"]),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(
    recipe: str, named: str, words: list[str], teacher: Path, tmp_path: Path, sdcli: Any
) -> None:
    save_file({"a": torch.zeros(1)}, teacher / "plain.safetensors")
    start = ["train", "test_resnet", "--dataset", "digits", "-o", tmp_path / "x", "--recipe", recipe, "--teacher"]
    refused = sdcli(*start, named.replace("RUN", str(teacher)))
    assert refused.code == 2 and all(part in refused.err for part in words), refused.err
    assert not (tmp_path / "x").exists()


def test_a_recipe_that_trains_its_teacher_takes_the_name_of_its_model() -> None:
    given = dict.fromkeys(inspect.signature(train_command).parameters) | {"teacher": "cifar_resnet8"}
    recipe = load_recipe(["eskd"], overrides_of(given, ["eskd"]))
    assert (recipe.others["teacher"].model, recipe.others["teacher"].weights) == ("cifar_resnet8", "random")


def test_a_name_with_a_tag_is_a_model_and_no_path() -> None:
    given = dict.fromkeys(inspect.signature(train_command).parameters) | {"teacher": "resnet18.a1_in1k"}
    recipe = load_recipe(["kd"], overrides_of(given, ["kd"]))
    assert (recipe.others["teacher"].model, recipe.others["teacher"].weights) == ("resnet18.a1_in1k", "pretrained")


def test_a_public_resnet_for_small_images_teaches(tmp_path: Path) -> None:
    """Under the names of its repository: ten classes, which no name tells."""
    backbone = build(Blueprint.draft(Network(exits="none"), "cifar_resnet8", [str(n) for n in range(10)])).backbone
    public = {}
    for name, tensor in backbone.state_dict().items():
        name = re.sub(r"^stages\.(\d)", lambda stage: f"layer{int(stage[1]) + 1}", name.removeprefix("stem."))
        public[name.replace("head.fc", "linear")] = tensor.clone()
    save_file(public, tmp_path / "public.safetensors")
    of = ["networks.teacher.model=cifar_resnet8", f"networks.teacher.weights={tmp_path / 'public.safetensors'}"]
    training = training_of("kd", tmp_path, *of)
    assert same(backbone.state_dict(), training.learner.networks["teacher"].backbone.state_dict())
    assert (
        "teacher: its weights do not name their 10 classes, which are taken to be those of the data" in training.notes
    )


def test_a_run_needs_its_teacher_and_its_checkpoint_does_not(teacher: Path, tmp_path: Path, sdcli: Any) -> None:
    copied = tmp_path / "teacher.safetensors"
    copied.write_bytes((teacher / "best.safetensors").read_bytes())
    training = training_of("kd", tmp_path, f"networks.teacher.weights={copied}")
    assert isinstance(list(fit(training))[-1], Finished)
    state = load_state(tmp_path / "run" / "state" / "last.pt")
    assert not any("teacher" in name for name in state["learner"]) and list(state["optimizers"]) == ["student"]
    tensors = load_file(tmp_path / "run" / "best.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"backbone"}
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    scored = json.loads((teacher / "report.json").read_text())["exits"][-1]["top1"]
    assert line["networks"] == {"teacher": pytest.approx(scored)}
    copied.unlink()
    assert sdcli("eval", tmp_path / "run", "-j", 0).code == 0
    assert "teacher.safetensors" in sdcli("train", "--resume", tmp_path / "run", "--epochs", 2).err


def test_a_teacher_in_train_mode_uses_the_batchs_statistics_and_keeps_its_own(teacher: Path, tmp_path: Path) -> None:
    named = f"networks.teacher.weights={teacher}"
    quiet, loud = (training_of("kd", tmp_path / m, named, f"networks.teacher.mode={m}") for m in ("eval", "train"))
    said = []
    for training in (quiet, loud):
        before = weights(training.learner.networks["teacher"])
        training.module.train()
        batch = next_update(training, iter(training.loader))[0]
        said.append(training.learner(batch)[1]["soft"].item())
        after = weights(training.learner.networks["teacher"])
        assert same({n: t for n, t in before.items() if "num_batches" not in n}, after)
    assert said[0] != pytest.approx(said[1], rel=1e-3)


# Networks that learn together


def test_every_network_that_learns_has_its_own_optimizer_and_schedule(tmp_path: Path) -> None:
    own = ["networks.peer.model=test_resnet", "networks.peer.optimizer.lr=0.5", "networks.peer.schedule.sched=none"]
    training = training_of("bd-kd", tmp_path, *own, "schedule.sched=cosine")
    assert list(training.optimizers) == ["student", "peer"]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers.values()]
    assert rates == [0.01, 0.5]
    # What its table leaves out is the recipe's.
    assert training.optimizers["peer"].param_groups[0]["weight_decay"] == 5e-4
    for schedule in training.schedules.values():
        schedule.step(training.updates_per_epoch)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers.values()]
    assert rates == [pytest.approx(0.0), 0.5]


def mutual(own: torch.Tensor, others: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """DML's loss of one of K networks: cross entropy plus the mean of the divergences from the K - 1 others."""
    p, label = own.softmax(1), F.one_hot(labels, own.shape[1])
    divergences = [(q * (q / p).log()).sum(1).mean() for q in (other.detach().softmax(1) for other in others)]
    return -(label * p.log()).sum(1).mean() + sum(divergences) / len(others)


def by_hand(training: Training, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """DML's update as its paper has it: one network after the other, each after new predictions."""
    rate, momentum, decay = 0.01, 0.9, 5e-4
    networks = {name: copy.deepcopy(network).train() for name, network in training.learner.networks.items()}
    for name in networks:
        own = networks[name](batch.images)["final"].logits
        with torch.no_grad():
            others = [networks[other](batch.images)["final"].logits for other in networks if other != name]
        loss = mutual(own, others, batch.labels)
        learnt = [p for p in networks[name].parameters() if p.requires_grad]
        for parameter, gradient in zip(learnt, torch.autograd.grad(loss, learnt), strict=True):
            # The first step of Nesterov's momentum.
            step = (gradient + decay * parameter) * (1 + momentum)
            parameter.data.sub_(rate * step)
    return {name: weights(network.backbone) for name, network in networks.items()}


SMALL_PEERS = {2: ["networks.peer.model=test_resnet"]}
SMALL_PEERS[3] = [*SMALL_PEERS[2], "networks.third.model=test_resnet"]


def learning_together(number: int, folder: Path, *overrides: str) -> Training:
    recipe = "dml" if number == 2 else of_the_page("Deep mutual learning of three", folder)
    return training_of(recipe, folder, *SMALL_PEERS[number], "schedule.sched=none", *overrides)


def test_three_networks_teach_each_other_as_in_dmls_formula(tmp_path: Path) -> None:
    training = learning_together(3, tmp_path, "updates=simultaneous")
    training.module.train()
    batch = next_update(training, iter(training.loader))[0]
    networks = training.learner.networks
    logits = {name: network(batch.images)["final"].logits for name, network in networks.items()}
    assert len(logits) == 3
    wanted = {n: mutual(z, [logits[o] for o in logits if o != n], batch.labels) for n, z in logits.items()}
    total, _ = training.module(batch)
    torch.testing.assert_close(total, sum(wanted.values()))
    total.backward()
    for name, network in networks.items():
        learnt = [p for p in network.parameters() if p.requires_grad]
        for parameter, gradient in zip(learnt, torch.autograd.grad(wanted[name], learnt), strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", [2, 3])
def test_networks_take_turns_as_in_dmls_paper(number: int, tmp_path: Path) -> None:
    training = learning_together(number, tmp_path)
    training.module.train()
    batches = next_update(training, iter(training.loader))
    wanted = by_hand(training, batches[0])
    before = {name: weights(network) for name, network in training.learner.networks.items()}
    losses, _ = train_step(training, batches)
    assert losses.shape == (number,) and losses.isfinite().all()
    for name, network in training.learner.networks.items():
        found = dict(network.backbone.named_parameters())
        for parameter, tensor in found.items():
            torch.testing.assert_close(tensor.data, wanted[name][parameter], rtol=1e-4, atol=1e-6)
        assert not same(before[name], network.state_dict())


@pytest.mark.parametrize(
    ("about", "allowed", "words"),
    [
        (
            {"num_processes": 2},
            ["dml", "updates=simultaneous"],
            'updates = "sequential" with 2 processes\n'
            "  expected: one process: networks that take turns leave the others without gradients to exchange\n"
            '  fix:      --set updates="simultaneous"',
        ),
        (
            {"scaler": object()},
            ["baseline"],
            "--precision fp16 with several networks that learn: student, peer\n"
            "  expected: a precision without a gradient scaler, which all of them would share\n"
            "  fix:      --precision bf16",
        ),
    ],
    ids=["processes", "fp16"],
)
def test_what_networks_that_learn_together_cannot_do_is_refused(
    about: dict[str, Any], allowed: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = SimpleNamespace(device="cpu", is_main_process=True, **({"num_processes": 1, "scaler": None} | about))
    monkeypatch.setattr(preparing, "accelerator_of", lambda settings, folder: accelerator)
    monkeypatch.setattr(preparing, "from_first", lambda accelerator, value: value)
    monkeypatch.setattr(preparing, "open_dataset", lambda *given, **named: pytest.fail("images were read"))
    with pytest.raises(UserError) as error:
        training_of("dml", tmp_path, "networks.peer.model=test_resnet")
    assert str(error.value) == words and not (tmp_path / "run").exists()
    preparing._check_many(load_recipe(allowed[:1], allowed[1:]), accelerator)


MUTUAL_CRD = 'losses.crd={kind="crd", on=["final", "peer.final"], target=["peer.final", "final"], weight=0.5, dim=8}'


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_loss_with_weights_learns_with_the_network_that_it_teaches(opt: str, tmp_path: Path) -> None:
    how = ["networks.peer.model=test_resnet", MUTUAL_CRD, f"optimizer.opt={opt}"]
    training = training_of("dml", tmp_path / "whole", *how, "updates=sequential")
    losses = {term.on: term.compare for term in training.learner.objective.terms if term.name == "crd"}
    for name in ("student", "peer"):
        assert losses[f"{name}.final".removeprefix("student.")] in training.learner.parts_of(name)
    before = {on: weights(module) for on, module in losses.items()}
    training.module.train()
    train_step(training, next_update(training, iter(training.loader)))
    for on, module in losses.items():
        assert any(not torch.equal(p, before[on][name]) for name, p in module.named_parameters()), on
        assert all(p.grad is None for p in module.parameters()), on
    whole = training_of("dml", tmp_path / "a", *how, "updates=sequential")
    assert isinstance(list(fit(whole))[-1], Finished)
    parts = training_of("dml", tmp_path / "b", *how, "updates=sequential")
    assert isinstance(list(fit(parts, lambda: 15 if parts.position.update == 1 else None))[-1], Stopped)
    again = resume(tmp_path / "b" / "run", *resumed(tmp_path / "b" / "run", {}, None, []))
    assert isinstance(list(fit(again))[-1], Finished)
    assert same(weights(whole.learner), weights(again.learner))


def test_the_recipe_of_a_run_lets_networks_follow_its_optimizer_as_the_original_does(tmp_path: Path) -> None:
    original = load_recipe(["switokd"])
    (tmp_path / "recipe.toml").write_text(to_toml(original))
    written = load_recipe([str(tmp_path / "recipe.toml")])
    assert written.model_dump() == original.model_dump()
    changes = ["optimizer.weight_decay=0.1", "schedule.warmup_epochs=0.2"]
    found = load_recipe([str(tmp_path / "recipe.toml")], changes)
    assert found.model_dump() == load_recipe(["switokd"], changes).model_dump()
    assert found.optimizer_of("peer").weight_decay == 0.1 and found.optimizer_of("peer").lr == 0.1


def test_turns_cost_a_forward_pass_more_for_each_network(tmp_path: Path) -> None:
    together, turns = (
        training_of("dml", tmp_path / how, "networks.peer.model=test_resnet", f"updates={how}").learner
        for how in ("simultaneous", "sequential")
    )
    forward = 2 * together.student.blueprint.plan.macs
    assert together.training_macs == 3 * forward and turns.training_macs == 4 * forward


def test_a_teacher_costs_one_forward_pass(teacher: Path, tmp_path: Path) -> None:
    learner = training_of("kd", tmp_path, f"networks.teacher.weights={teacher}").learner
    assert learner.training_macs == 4 * learner.student.blueprint.plan.macs


@pytest.mark.parametrize("name", ["switokd", "switokd_expert_mode_case"])
def test_switokd_decides_as_the_authors_code(case: Any, name: str) -> None:
    of = case(name)
    for condition in ("code", "paper"):
        learns = switokd(of["T"], of["S"], torch.tensor(of.inputs["y"]), condition=condition)
        assert bool(learns) is not of.expected["expert_mode (pause teacher)"]


def test_switokds_second_condition_lets_a_teacher_learn_that_is_behind() -> None:
    teacher, student, labels = torch.tensor([[-4.0, 4.0]]), torch.tensor([[4.0, -4.0]]), torch.tensor([0])
    assert bool(switokd(teacher, student, labels, condition="code"))
    assert not bool(switokd(teacher, student, labels, condition="paper"))


@pytest.mark.parametrize("learns", [True, False])
def test_a_network_that_rests_takes_no_step(learns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdcli.method.learner as module

    monkeypatch.setattr(module, "rule_of", lambda table: lambda own, behind, labels: torch.tensor(learns))
    training = training_of("switokd", tmp_path, "networks.peer.model=test_resnet")
    training.module.train()
    batches = next_update(training, iter(training.loader))
    before = {name: dict(copy.deepcopy(n).named_parameters()) for name, n in training.learner.networks.items()}
    train_step(training, batches)
    moved = {
        name: any(not torch.equal(p, before[name][at]) for at, p in network.named_parameters())
        for name, network in training.learner.networks.items()
    }
    assert moved == {"student": True, "peer": learns}


def test_the_bridge_learns_on_a_teacher_that_stays_as_it_is(teacher: Path, tmp_path: Path) -> None:
    training = training_of("sokd", tmp_path, f"networks.teacher.weights={teacher}")
    before = weights(training.learner.networks["teacher"])
    assert isinstance(list(fit(training))[-1], Finished)
    after = training.learner.networks["teacher"].state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"heads"}


# Phases


def test_a_chain_of_assistants_learns_one_after_the_other(teacher: Path, tmp_path: Path) -> None:
    training = training_of(
        "takd", tmp_path, f"networks.teacher.weights={teacher}", "networks.assistant.model=test_resnet"
    )
    assert list(training.optimizers) == ["assistant"]
    first = {name: weights(network) for name, network in training.learner.networks.items()}
    events = fit(training)
    seen = [next(event for event in events if not isinstance(event, Step))]
    second = {name: weights(network) for name, network in training.learner.networks.items()}
    seen += [event for event in events if not isinstance(event, Step)]
    third = {name: weights(network) for name, network in training.learner.networks.items()}
    assert [name for name in first if not same(first[name], second[name])] == ["assistant"]
    assert [name for name in first if not same(second[name], third[name])] == ["student"]
    # The student is scored once it learns.
    assert seen[0].validation is None and set(seen[0].networks) == {"teacher", "assistant"}
    assert seen[1].validation is not None


def test_each_of_two_assistants_learns_from_the_one_before(teacher: Path, tmp_path: Path) -> None:
    small = [f"networks.{name}.model=test_resnet" for name in ("assistant", "second")]
    recipe = of_the_page("Two teacher assistants", tmp_path)
    training = training_of(recipe, tmp_path, f"networks.teacher.weights={teacher}", *small)
    said, seen = {}, []
    for name, network in training.learner.networks.items():
        network.register_forward_hook(lambda _, __, signals, name=name: said.update({name: signals["final"].logits}))

    def check(_: nn.Module, given: tuple[Batch], found: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
        name, above = [("assistant", "teacher"), ("second", "assistant"), ("student", "second")][training.phase]
        p, q = (said[network].detach() / 4 for network in (name, above))
        soft = 0.5 * 16 * (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean()
        torch.testing.assert_close(found[0], 0.5 * F.cross_entropy(said[name], given[0].labels) + soft)
        # Little, while the networks are new.
        torch.testing.assert_close(found[1]["soft" if name == "student" else f"{name}-soft"], soft, rtol=1e-3, atol=0)
        assert set(said) == {name, above}
        seen.append(name)
        said.clear()

    training.module.register_forward_hook(check)
    moved, before = [], {name: weights(network) for name, network in training.learner.networks.items()}
    for event in fit(training):
        if isinstance(event, Epoch):
            said.clear()
            after = {name: weights(network) for name, network in training.learner.networks.items()}
            moved.append([name for name in after if not same(before[name], after[name])])
            before = after
    assert isinstance(event, Finished)
    assert moved == [["assistant"], ["second"], ["student"]]
    assert seen == ["assistant"] * 2 + ["second"] * 2 + ["student"] * 2


def test_an_early_stopped_teacher_gets_a_share_of_the_epochs() -> None:
    assert load_recipe(["eskd"], ["epochs=100"]).phase_epochs == [35, 100]
    assert load_recipe(["eskd"], ["epochs=1"]).phase_epochs == [1, 1]


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("takd", ['phases=[{ name = "only", learns = ["assistant"], losses = ["assistant-task"] }]'],
         "the student does not learn in the last phase"),
        ("takd", ['phases=[{ name = "a", learns = ["teacher"] }]'], "unknown network 'teacher'"),
        ("takd", ['phases=[{ name = "a", learns = ["student"] }]'], "teaches assistant, and assistant does not learn in it"),
        ("switokd", ["rules.peer.network=nobody"], "rules.peer.network: of those that learn: unknown network 'nobody'"),
        ("switokd", ["rules.peer.behind=exit"], "rules.peer.behind = 'exit'"),
        ("dml", ['optimizer.nonfinite="skip"'], "half of an update cannot be skipped"),
        ("prune", ['phases=[{ name = "a", prune = { amount = 0.5, network = "x" } }]'], "unknown network 'x'"),
        ("baseline", ["networks.student.optimizer.lr=0.1"], "[networks.student.optimizer]: the recipe's [optimizer] is"),
    ],
)  # fmt: skip
def test_networks_phases_and_rules_that_contradict_each_other_are_refused(
    recipe: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError) as error:
        load_recipe([recipe], overrides)
    assert words in str(error.value)


# Pruning


def test_a_fifth_of_what_is_left_goes_in_every_round_and_stays_away(tmp_path: Path) -> None:
    training = training_of("prune", tmp_path, 'phases=[{ name = "a", rounds = 3, prune = { amount = 0.2 } }]')
    masks = training.learner.masks["student"]
    assert isinstance(masks, Masks) and masks.kept == pytest.approx(0.8, abs=1e-4)
    assert isinstance(list(fit(training))[-1], Finished)
    assert masks.kept == pytest.approx(0.8**3, abs=1e-4)
    kept = weights_of(training.learner.student)
    assert all(torch.equal(weight != 0, masks.of(name)) for name, weight in kept.items())
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert not any("mask" in name for name in saved)
    assert saved["backbone.conv1.weight"].ne(0).float().mean().item() == masks.density["conv1"]


def test_the_smallest_weights_of_all_layers_go_first() -> None:
    network = build(Blueprint.draft(Network(), "test_resnet", ["a", "b"]))
    masks, before = Masks(network), {name: weight.clone() for name, weight in weights_of(network).items()}
    masks.prune(network, Prune(amount=0.3))
    flat = torch.cat([weight.abs().flatten() for weight in before.values()])
    limit = flat.sort().values[int(0.3 * len(flat))]
    assert all(torch.equal(masks.of(name), weight.abs() >= limit) for name, weight in before.items())


@pytest.mark.parametrize(
    ("model", "argument", "widths"),
    [("resnet18", "channels", [64, 128, 256, 512]), ("cifar_resnet20", "widths", [16, 16, 32, 64])],
)
def test_what_is_left_is_told_with_the_width_of_a_dense_network(model: str, argument: str, widths: list[int]) -> None:
    blueprint = Blueprint.draft(Network(exits="none"), model, ["a", "b"], image_size=32)
    network = build(blueprint)
    masks = Masks(network)
    whole, told = left_in(network, masks).split(f"; a dense network with as many: model_args.{argument}=")
    assert whole.endswith("by stage 100%, 100%, 100%, 100%") and json.loads(told) == widths
    masks.prune(network, Prune(amount=0.6, by="random"))
    text = left_in(network, masks)
    assert text.startswith("40.0% of its weights are left")
    narrow = Network(exits="none", model_args={argument: json.loads(text.rpartition("=")[2])})
    dense = Blueprint.draft(narrow, model, ["a", "b"], image_size=32)
    assert dense.plan.params / blueprint.plan.params == pytest.approx(0.4, rel=0.05)
    # The last stage is narrower than the one before it.
    with torch.no_grad():
        for name in masks.names:
            masks.of(name)[0:] = not name.startswith(("layer4", "stages.2"))
            masks.of(name)[:1] = True
    found = json.loads(left_in(network, masks).rpartition("=")[2])
    assert found[-1] < found[-2] == widths[-2]
    narrow = build(Blueprint.draft(Network(model_args={argument: found}), model, ["a", "b"], image_size=32)).eval()
    assert narrow(torch.zeros(1, 3, 32, 32))["final"].logits.shape == (1, 2)


class Linear(nn.Module):
    """A linear model in the place of a network with exits."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(*weight.T.shape, bias=False))
        self.backbone[0].weight.data = weight
        self.plan, self.classes = SimpleNamespace(unused=()), ("a", "b")

    def forward(self, images: torch.Tensor, points: object) -> dict[str, Signal]:
        return {"final": Signal(images, images, self.backbone(images))}


def test_prue_scores_weights_by_how_certain_they_make_predictions(case: Any) -> None:
    of = case("prue_saliency")
    network: Any = Linear(of["W"])
    batches = [of["X"][:2], of["X"][2:]]
    labels = torch.tensor(of.inputs["y"])
    shown = [Batch(x, y, torch.arange(len(x))) for x, y in zip(batches, labels.split([2, 3]), strict=True)]
    scores = uncertainty_scores(network, shown)
    rough = 10 if of.dtype == torch.float32 else 1e3  # probabilities are taken in float32
    assert torch.allclose(
        scores["0"].double(), torch.tensor(of.expected["score"]).double(), atol=1e-6, rtol=rough * 1e-6
    )
    masks = Masks(network)
    masks.prune(network, Prune(amount=0.5, by="prue"), scores)
    assert masks.of("0").double().tolist() == of.expected["mask"]


def test_a_pruned_teacher_stays_pruned_while_it_and_its_student_learn(tmp_path: Path) -> None:
    training = training_of("prue", tmp_path, "networks.teacher.model=test_resnet")
    news = [text for event in fit(training) if isinstance(event, Step) for text in event.notes]
    assert any(text.startswith("teacher pruned by prue: 5") for text in news)
    kept = weights_of(training.learner.networks["teacher"])
    zeros = sum(int((w == 0).sum()) for w in kept.values()) / sum(w.numel() for w in kept.values())
    assert zeros == pytest.approx(0.5, abs=0.02)
    enter_phase(training, 2, begins=False)
    assert training.learner.frozen == {"teacher"}


def test_the_average_begins_with_the_first_update_of_the_student(tmp_path: Path) -> None:
    phases = ["phases.0.epochs=3", "phases.1.epochs=2", "networks.teacher.model=test_resnet"]
    training = training_of("eskd", tmp_path, *phases, "ema.decay=0.99")
    seen = []
    for event in fit(training):
        if isinstance(event, Step) and training.position.update == 1:
            seen.append((training.phase, training.updates_averaged))
    assert seen == [(0, 1), (0, 3), (0, 5), (1, 1), (1, 3)], "two updates an epoch; the teacher's do not count"


def test_a_pruned_teacher_is_scored_again(tmp_path: Path) -> None:
    prune = ['phases.1.prune={amount=0.99, network="teacher"}', "phases.0.epochs=2", "phases.1.epochs=1"]
    training = training_of("eskd", tmp_path, *prune, "networks.teacher.model=test_resnet", limit_train=200)
    epochs = [event for event in fit(training) if isinstance(event, Epoch)]
    training.known_scores.clear()
    assert epochs[-1].networks["teacher"] == score_others(training)["teacher"]
    assert epochs[-1].networks["teacher"] != epochs[-2].networks["teacher"]


def test_what_is_pruned_stays_so_where_a_network_starts_afresh(tmp_path: Path) -> None:
    phases = 'phases=[{ name = "a" }, { name = "b", prune = { amount = 0.5 } }, { name = "c", fresh = true }]'
    training = training_of("baseline", tmp_path, phases, "ema.decay=0.9")
    enter_phase(training, 1)
    enter_phase(training, 2)
    masks = training.learner.masks["student"]
    assert isinstance(masks, Masks) and masks.kept == pytest.approx(0.5, abs=1e-4)
    for network in (training.learner.student, training.network):
        for name, weight in weights_of(network).items():
            assert not weight[~masks.of(name)].any() and weight[masks.of(name)].all()


@pytest.mark.parametrize("name", ["takd", "eskd", "prue", "prune"])
def test_a_run_goes_on_exactly_from_the_middle_of_each_of_its_phases(name: str, teacher: Path, tmp_path: Path) -> None:
    # Two rounds of pruning show what four do.
    fewer = ['phases=[{ name = "first" }, { name = "pruned", rounds = 2, prune = { amount = 0.2 } }]']
    fewer = fewer if name == "prune" else []
    recipe = load_recipe([name], [*SHORT, *fewer])
    small = [f"networks.{other}.model=test_resnet" for other, table in recipe.others.items() if table.model]
    small += fewer
    small += [f"networks.{other}.weights={teacher}" for other in recipe.awaited]
    whole = training_of(name, tmp_path / "whole", *small)
    assert isinstance(list(fit(whole))[-1], Finished)
    wanted = weights(whole.learner)
    for phase in range(len(recipe.all_phases)):
        folder = tmp_path / f"phase{phase}"
        training = training_of(name, folder, *small)

        def told(training: Training = training, phase: int = phase) -> int | None:
            return 15 if (training.phase, training.position.update) == (phase, 1) else None

        assert isinstance(list(fit(training, told))[-1], Stopped)
        resumed_run = resume(folder / "run", *resumed(folder / "run", {}, None, []))
        assert resumed_run.phase == phase
        assert isinstance(list(fit(resumed_run))[-1], Finished)
        assert same(wanted, weights(resumed_run.learner)), phase


def test_maps_of_several_teachers_weigh_by_what_their_classifiers_make_of_the_students() -> None:
    torch.manual_seed(0)
    loss = ConfidentHint(3, [(4, 4), (5, 5)]).double().eval()
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, 0]), torch.arange(2))
    student = Signal(torch.randn(2, 3, 4, 4).double().requires_grad_(), torch.ones(2, 3), None)
    classify = [nn.Linear(width, 3).double() for width in (4, 5)]
    maps = [torch.randn(2, width, 2, 2).double() for width in (4, 5)]
    sources = tuple(Signal(m, m.mean(dim=(2, 3)), None, classify=c) for m, c in zip(maps, classify, strict=True))
    found = loss(student, replace(sources[0], sources=sources), batch)
    convolutions = [adapt[0].weight for adapt in loss.adapt]

    def naive(constant: bool) -> torch.Tensor:
        wrong, far = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
        pooled = student.features.reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5))
        for k in range(2):
            # A new batch norm divides by the root of 1 + 1e-5.
            mapped = torch.einsum("oc,bchw->bohw", convolutions[k][:, :, 0, 0], pooled).relu() / (1 + 1e-5) ** 0.5
            for image in range(2):
                wrong[k, image] = -classify[k](mapped[image].mean(dim=(1, 2))).log_softmax(0)[batch.labels[image]]
                far[k, image] = (mapped[image] - maps[k][image]).pow(2).mean()
        v = 1 - wrong.softmax(0)
        return ((v.detach() if constant else v) * far).sum(0)

    torch.testing.assert_close(found, naive(False))
    learnt = [student.features, *convolutions]
    gradients, wanted, others = (torch.autograd.grad(v.sum(), learnt) for v in (found, naive(False), naive(True)))
    for gradient, own, other in zip(gradients, wanted, others, strict=True):
        torch.testing.assert_close(gradient, own)
        assert (gradient - other).abs().max() > 1e-3, "gradients pass through the weights too"
    with pytest.raises(UserError, match="two or more ends of networks"):
        ConfidentHint(3, [(4, 4)])


# Shared out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "dml", "switokd"])
def test_two_processes_teach_as_one_does(name: str, teacher: Path, tmp_path: Path) -> None:
    """A student without batch statistics; each process has the whole teacher, or peer, and half of the batch."""
    own = {
        "kd": [f"networks.teacher.weights={teacher}"],
        "dml": ["networks.peer.model=test_vit", "updates=simultaneous"],
        "switokd": ["networks.peer.model=test_vit"],
    }
    more = [*SHORT, *own[name]]
    about = replace(settings(limit_train=192, limit_val=60), model="test_vit")
    one = prepare(about, load_recipe([name], more), tmp_path / "one" / "run")
    assert isinstance(list(fit(one))[-1], Finished)
    sets = [part for override in more for part in ("--set", override)]
    two = together(2, "train", "test_vit", "--dataset", "digits", "--recipe", name, *sets, "--limit-train", 192,
                   "--limit-val", 60, "--device", "cpu", "--workers", 0, "--output", tmp_path / "two")  # fmt: skip
    assert [process.wait() for process in two] == [0, 0], two[0].err
    alone, shared = (json.loads((tmp_path / run / "log.jsonl").read_text()) for run in ("one/run", "two"))
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert shared["networks"] == alone["networks"], "their top-1 on the same images"
    for ours, theirs in zip(alone["validation"]["exits"], shared["validation"]["exits"], strict=True):
        assert theirs["nll"] == pytest.approx(ours["nll"], rel=1e-4)
