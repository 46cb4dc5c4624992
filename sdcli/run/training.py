"""A run in memory: its settings, networks and position; entering phases, saving and restoring the state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from sdcli.data.augment import Mixing
from sdcli.data.batch import Batch
from sdcli.data.dataset import Split
from sdcli.data.loaders import Loader
from sdcli.data.resident import ResidentLoader
from sdcli.devices import interleaved
from sdcli.errors import UserError, counted
from sdcli.method.learner import Learner, what_trains
from sdcli.method.objective import Objective
from sdcli.method.optimizer import complete_momentum, create_optimizer, create_schedule
from sdcli.method.pruning import Masks, left_in, uncertainty_scores
from sdcli.network.checkpoint import Description
from sdcli.network.multi_exit import MultiExit
from sdcli.network.weights import build_network
from sdcli.recipe.address import AVERAGE, STUDENT, TEACHER
from sdcli.recipe.schema import Prune, Recipe
from sdcli.run.folder import Run
from sdcli.run.settings import Settings, unchanging
from sdcli.run.state import Position, random_states, restore_random_states, save_state, unusable
from sdcli.run.still import Stillness
from sdcli.run.verify import check_optimizer, check_scaler, check_tensors


@dataclass
class Training:
    """Everything that a run needs; it can train once `enter_phase` has been called."""

    settings: Settings
    recipe: Recipe
    accelerator: Accelerator
    learner: Learner
    """The networks and their objective, without accelerate's wrapper: this is what is measured and saved."""
    ema: Any
    """timm's moving average of the student's weights (ModelEmaV3), or None."""
    loader: Loader | ResidentLoader
    """This process's training batches; `set_epoch` gives the next epoch its own order and augmentation."""
    scored_loader: Loader | ResidentLoader
    """Batches of the split that is scored: validation, or test if nothing is held out."""
    scored_split: str
    description: Description
    run: Run
    updates_per_epoch: int
    images_per_epoch: int
    """Of the training split, without those of a last batch that is left out or made smaller."""
    splits: dict[str, Split]
    """The splits as the run uses them: "train", and "validation" and "test" if they exist."""
    num_train: int
    num_val: int
    mixing: Mixing | None
    data: dict[str, Any]
    """Counts and checksums that identify the training split."""
    imports: dict[str, str]
    """The user's own Python files and their sha256."""
    loaded: dict[str, str]
    """The networks that do not learn, with the digest of their tensors: a resumed run loads them again."""
    objectives: list[Objective]
    """One per phase."""
    phase: int = -1
    """The current phase, counted from 0; -1 before the first. Each has its own module, optimizer and schedule."""
    module: nn.Module = field(default_factory=nn.Module)
    """The learner as accelerate wraps it for training."""
    optimizers: dict[str, Any] = field(default_factory=dict)
    """Of each network that learns in this phase, the student first; that also has the weights of losses and signals."""
    schedules: dict[str, Any] = field(default_factory=dict)
    position: Position = field(default_factory=Position)
    notes: list[str] = field(default_factory=list)
    known_scores: dict[str, float] = field(default_factory=dict)
    """The top-1 of networks that do not learn, once they are scored."""
    news: list[str] = field(default_factory=list)
    """Remarks on what a new phase has done, not yet reported."""
    stillness: Stillness | None = None
    """Watches the first updates of a phase; None where a run was resumed within them."""

    @property
    def network(self) -> MultiExit:
        """The network that is scored and saved: the student, or the moving average of its weights."""
        network = self.learner.student if self.ema is None else self.ema.module
        assert isinstance(network, MultiExit)
        return network

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return sum(self.recipe.phase_epochs)

    @property
    def phase_of(self) -> int:
        """The phase to which the current epoch belongs."""
        ends = accumulate(self.recipe.phase_epochs)
        return next(number for number, end in enumerate(ends) if self.position.epoch <= end)

    @property
    def epoch_in_phase(self) -> int:
        """The current epoch, counted from 1 within its phase."""
        return self.position.epoch - sum(self.recipe.phase_epochs[: self.phase])

    @property
    def updates_done(self) -> int:
        """Updates done in the current phase."""
        return (self.epoch_in_phase - 1) * self.updates_per_epoch + self.position.update

    @property
    def updates_averaged(self) -> int:
        """Updates of the student since it was last initialised: those that the average of its weights covers."""
        recipe, phases = self.recipe, self.recipe.all_phases
        began = max((number for number in range(self.phase + 1) if phases[number].fresh), default=0)
        before = sum(recipe.phase_epochs[n] for n in range(began, self.phase) if STUDENT in recipe.learning(n))
        return before * self.updates_per_epoch + self.updates_done

    @property
    def found_weights(self) -> dict[str, float]:
        """The weights that have found themselves in this phase, by loss."""
        shares = self.learner.objective.shares
        return {} if shares is None else dict(shares.found)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return bool(self.accelerator.is_main_process)


def enter_phase(training: Training, number: int, begins: bool = True) -> None:
    """Prepares the run for a phase: its losses, a new optimizer and schedule.

    `begins` is False for a phase that is resumed; otherwise the phase's `teacher` and `fresh` are applied to the
    networks.
    """
    phase = training.recipe.all_phases[number]
    learner, accelerator = training.learner, training.accelerator
    if begins and phase.teacher:
        learner.networks[TEACHER].load_state_dict(training.network.state_dict())
    if begins and phase.fresh:
        set_seed(training.settings.seed + number)
        new, _ = build_network(training.recipe.student, training.description.blueprint)
        learner.student.load_state_dict(new.state_dict())
        learner.mask(STUDENT, learner.student)
        learner.renew_signals()
        if training.ema is not None:
            training.ema.module.load_state_dict(learner.student.state_dict())
        set_seed(training.settings.seed + number + accelerator.process_index)
    if begins and phase.prune:
        training.news.append(_prune(training, phase.prune))
    objective = training.objectives[number].to(accelerator.device)
    if begins and number and not phase.fresh:
        objective.go_on_from(training.objectives[number - 1])
    recipe, epochs = training.recipe, training.recipe.phase_epochs[number]
    learner.teach(objective, what_trains(recipe, number), recipe.learning(number))
    made = {name: create_optimizer(learner.parts_of(name), recipe.optimizer_of(name)) for name in learner.learning}
    training.schedules = {
        name: create_schedule(optimizer, recipe.schedule_of(name), epochs, training.updates_per_epoch)
        for name, optimizer in made.items()
    }
    if training.optimizers or accelerator.device.type != "cpu":
        # The phase before, and on a GPU what an earlier run of this process has left: slow, garbage is collected.
        accelerator.free_memory()
    with warnings.catch_warnings():
        # accelerate has no other argument for it yet, and every process would print the warning.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        training.module, *prepared = accelerator.prepare(learner, *made.values())
    training.optimizers = dict(zip(made, prepared, strict=True))
    training.phase = number


def _prune(training: Training, table: Prune) -> str:
    """Prunes a network; returns what is left of it, in words."""
    network, masks = training.learner.networks[table.network], training.learner.masks[table.network]
    assert isinstance(network, MultiExit) and isinstance(masks, Masks)
    scores = None
    if table.by == "prue":
        scores = uncertainty_scores(network, Again(training), training.accelerator.reduce)
    masks.prune(network, table, scores)
    training.known_scores.pop(table.network, None)
    return f"{table.network} pruned by {table.by}: {left_in(network, masks)}"


@dataclass
class Again:
    """The training batches of this epoch on the device, as often as they are asked for."""

    training: Training

    def __iter__(self) -> Iterator[Batch]:
        loader, device = self.training.loader, self.training.accelerator.device
        loader.set_epoch(self.training.position.epoch)
        return (batch.to(device) for batch in loader)


def save(training: Training) -> None:
    """Saves the training state. All processes must call it, and the first one writes.

    It gives all processes the first one's buffers, because a resumed run starts with those in every process.
    """
    share_buffers(training)
    everyones = interleaved(training.accelerator, [random_states()])
    sums = training.position.sums
    if sums is not None:
        sums = training.accelerator.reduce(sums.clone())
    if not training.is_first:
        return
    scaler = training.accelerator.scaler
    save_state(
        training.run.state,
        {
            "position": {**asdict(training.position), "sums": sums},
            "learner": saved_tensors(training),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in training.optimizers.items()},
            "ema": training.ema.module.state_dict() if training.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "random": everyones,
            "threads": torch.get_num_threads(),
            "data": training.data,
            "images_per_epoch": training.images_per_epoch,
            "imports": training.imports,
            "loaded": training.loaded,
            "phase": training.phase,
            "made": unchanging(training.settings, training.recipe),
        },
    )


def saved_tensors(training: Training) -> dict[str, Tensor]:
    """The learner's tensors, without those that a resumed run gets from elsewhere: networks that are loaded again, and
    the average, which is saved separately."""
    elsewhere = [*training.loaded, *([AVERAGE] if training.ema else [])]
    start = tuple(f"networks.{name}." for name in elsewhere)
    return {name: tensor for name, tensor in training.learner.state_dict().items() if not name.startswith(start)}


def share_buffers(training: Training) -> None:
    """Gives all processes the first one's buffers, which differ because their batch norms see different images."""
    if training.accelerator.num_processes > 1:
        parts = [*training.learner.networks.children(), *([training.ema.module] if training.ema else [])]
        for part in parts:
            for buffer in part.buffers():
                broadcast(buffer)


def restore(training: Training, state: Mapping[str, Any]) -> None:
    """Restores everything from a saved state; raises UserError for the state of another run, before any tensor is
    changed."""
    _check_length(training, state["images_per_epoch"])
    _check_place(training, Position(**state["position"]), state["phase"])
    enter_phase(training, state["phase"], begins=False)
    path = training.run.state
    _check_loaded(training, state["loaded"])
    check_tensors(path, "learner", state["learner"], saved_tensors(training))
    check_tensors(path, "ema", state["ema"] or {}, training.ema.module.state_dict() if training.ema else {})
    # accelerate's wrapper holds torch's optimizer.
    optimizers = {name: wrapper.optimizer for name, wrapper in training.optimizers.items()}
    if list(state["optimizers"]) != list(optimizers):
        raise unusable(path, f"optimizers of {', '.join(state['optimizers'])}, not of {', '.join(optimizers)}")
    for name, optimizer in optimizers.items():
        check_optimizer(path, name, state["optimizers"][name], optimizer)
    check_scaler(path, state["scaler"], training.accelerator.scaler)
    training.learner.load_state_dict(state["learner"], strict=False)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
        if isinstance(optimizer, torch.optim.SGD):
            complete_momentum(optimizer)
    if training.ema:
        training.ema.module.load_state_dict(state["ema"])
    if state["scaler"] and training.accelerator.scaler:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    training.position = Position(**state["position"])
    sums = training.position.sums
    if sums is not None:
        # The saved sums are those of all processes together, so that only the first one starts from them.
        sums = sums.to(training.accelerator.device)
        training.position.sums = sums if training.is_first else torch.zeros_like(sums)
    for schedule in training.schedules.values():
        schedule.step(training.updates_done)
    everyones = state["random"]
    if len(everyones) == training.accelerator.num_processes:
        restore_random_states(everyones[training.accelerator.process_index])
    else:
        training.notes.append(
            f"{len(everyones)} processes before, {training.accelerator.num_processes} now: "
            "the run continues with different random numbers"
        )


def _check_length(training: Training, before: int) -> None:
    """Raises UserError where micro-batches or processes leave out more or fewer images of an epoch than before."""
    if training.images_per_epoch != before:
        steps, processes = training.settings.grad_accum_steps, training.accelerator.num_processes
        raise UserError(
            f"--grad-accum-steps {steps} with {counted(processes, 'process', 'processes')}: an epoch has "
            f"{training.images_per_epoch:,} images, not {before:,} as until now",
            "as many images per epoch, so that the run goes on as it began",
            "the --grad-accum-steps and the number of processes that the run was started with, or a new run",
        )


def _check_loaded(training: Training, digests: Mapping[str, str]) -> None:
    """Raises UserError if a network that does not learn has other weights than when the run was started."""
    if digests.keys() != training.loaded.keys():
        raise unusable(training.run.state, f"loaded: {', '.join(digests)}, not {', '.join(training.loaded)}")
    for name, digest in digests.items():
        if training.loaded[name] != digest:
            source = training.recipe.networks[name].weights
            raise UserError(
                f"networks.{name}, which does not learn, has other weights than when the run was started",
                f"the same weights from {source}" if source != "pretrained" else "the same pretrained weights of timm",
                "restore the file" if source != "pretrained" else "resume with the timm version of its start",
            )


def _check_place(training: Training, position: Position, phase: int) -> None:
    """Raises UserError for a position that this run cannot have."""
    epochs = training.recipe.phase_epochs
    if phase >= len(epochs):
        raise unusable(training.run.state, f"phase {phase + 1} of {len(epochs)}")
    first, last = sum(epochs[:phase]) + 1, sum(epochs[: phase + 1])
    # After the last epoch of a phase, the position is the next epoch but the phase is still the old one.
    begun = position.update > 0
    if not first <= position.epoch <= last + (0 if begun else 1):
        raise unusable(training.run.state, f"epoch {position.epoch} in a phase of epochs {first} to {last}")
    if position.update > training.updates_per_epoch:
        raise unusable(training.run.state, f"update {position.update} of {training.updates_per_epoch}")
    num_losses = len(training.objectives[phase].names)
    if begun != (position.sums is not None) or (position.sums is not None and position.sums.shape != (num_losses,)):
        raise unusable(training.run.state, f"position.sums is not one number for each of {num_losses} losses")
