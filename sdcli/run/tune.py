"""A search for the values of recipe keys: Optuna proposes them, and each trial is a run that can be resumed.

tune.json          what the search is, so that no other one is continued in its folder
search.db          Optuna's storage, unless `--storage` names one
trials/NNN/        the run folder of trial NNN, as `sdcli train` writes it
trials/NNN.lock    locked while a process trains the trial
best.toml          the best trial's recipe, which extends the first one
tune.png           the score against each key, if matplotlib is installed (`cli/plots.py`)

A trial that a killed process has left is known by its lock file: it is in this folder and nobody holds it. Optuna's
heartbeat would need a database and minutes of silence, and would start the trial again under another number; its run
folder has all that is needed to resume it at once, with any storage. On another machine, where the lock file is
missing, the trial is left alone: its run folder is not there either.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage, RDBStorage, journal
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from sdcli import toml
from sdcli.data.open import open_dataset
from sdcli.data.splits import training_splits
from sdcli.errors import UserError
from sdcli.evaluation.evaluate import Report
from sdcli.extensions import load_imports
from sdcli.method.check import check_files, check_names
from sdcli.recipe.explain import blaming
from sdcli.recipe.load import read_recipe
from sdcli.recipe.merge import Override
from sdcli.recipe.schema import Recipe
from sdcli.recipe.space import Tried, checked, extension
from sdcli.run.best import quality
from sdcli.run.events import Epoch, Finished, Step, Stopped
from sdcli.run.folder import check_output, read_log, state_file, write_text, writing
from sdcli.run.lock import Lock
from sdcli.run.prepare import accelerator_of, check, prepare, settled, without_paths
from sdcli.run.resume import first_difference, resume, resumed
from sdcli.run.settings import MAY_CHANGE, Settings
from sdcli.run.train import fit
from sdcli.run.training import Training
from sdcli.run.watch import NotFinite, Unfit

STUDY = "sdcli"
MARK = "tune.json"
OWN = ("lock", "trials", "search.db", "search.db-journal", MARK)
"""What is in the folder of a search before its first trial."""
ALSO = [setting for setting in MAY_CHANGE if setting != "track"]
"""Settings that may change when a search is continued."""
REDUCTION = 3
"""Successive halving goes on with one of this many trials, after a ninth and a third of their epochs."""
TIE = 1e-6
"""How much a nat of the NLL counts beside a point of top-1: it decides between equal accuracies only."""
HOPELESS = 3
"""So many trials that cannot be trained, and none that can, end a search."""
DRAWS = 100
"""How often a proposal that has been tried already is drawn again."""


@dataclass(frozen=True)
class Trial:
    """What is known of a trial."""

    number: int
    values: dict[str, Any]
    """By recipe key."""
    state: str
    """complete, pruned, diverged, refused or running."""
    top1: float | None = None
    """Of the best epoch on the validation split, as the recipe's `best` chooses it, in percent."""
    nll: float | None = None
    epochs: int = 0
    images: int = 0
    """Trained on, over all epochs."""
    seconds: float = 0.0
    num_train: int = 0
    """Images of the training split."""

    @property
    def score(self) -> float:
        """The one number that Optuna maximises."""
        if self.top1 is None or self.nll is None:
            return -math.inf
        return self.top1 - TIE * min(self.nll, 99.0)


@dataclass(frozen=True)
class Began:
    """A trial begins, or is resumed in the middle."""

    trial: Trial
    epochs: int
    epoch: int
    update: int
    """Updates of this epoch that are done."""
    notes: list[str]


@dataclass(frozen=True)
class Ended:
    """A trial has ended."""

    trial: Trial
    reason: str = ""
    """Why, where it was not its last epoch."""


Event: TypeAlias = Began | Ended | Step | Epoch | Stopped


@dataclass(frozen=True)
class Found:
    """What a search has found, and what it has cost."""

    trials: list[Trial]
    """The best first."""
    best: Trial | None
    """The best complete one."""
    images: int
    """That were trained on, in all trials."""
    hours: float
    """In all trials, with what was done beside training."""
    epochs: int
    """Of a full run, which is one of the best recipe."""
    full_runs: float
    """The images, as multiples of those of a full run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Search:
    """Everything that is the same for all trials of a search."""

    settings: Settings
    names: list[str]
    """Of the recipes."""
    overrides: list[Override]
    space: list[Tried]
    output: Path
    budget: int
    prune: bool = True
    storage: str | None = None
    study: Any = field(default=None, compare=False)

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial; raises UserError for values that do not go together."""
        return self.compose([tried.override(values[tried.key]) for tried in self.space])

    def compose(self, tried: Sequence[Override]) -> Recipe:
        """The recipe with further overrides, checked without a model."""
        recipe, origins = read_recipe(self.names, [*self.overrides, *tried])
        with blaming(origins):
            check_names(recipe)
            check_files(recipe)
        return recipe

    @property
    def first(self) -> Recipe:
        """The recipe with the first value of each key."""
        return self.recipe({tried.key: tried.values[0] for tried in self.space})

    @property
    def size(self) -> float:
        """How many combinations there are."""
        spans = [len(t.choices) or (t.ends[1] - t.ends[0] + 1 if t.whole else math.inf) for t in self.space]
        return math.prod(spans)

    def trials(self) -> list[Trial]:
        """All trials of the search, on all machines, the best first."""
        found = [self.known(frozen) for frozen in self.frozen()]
        order = ("complete", "pruned", "running", "diverged", "refused")
        return sorted(found, key=lambda trial: (order.index(trial.state), -trial.score, trial.number))

    def frozen(self) -> list[FrozenTrial]:
        """All trials as Optuna has them."""
        # Withdrawn trials are the only ones that Optuna knows as failed.
        states = [state for state in TrialState if state != TrialState.FAIL]
        return list(self.study.get_trials(deepcopy=False, states=states))

    def known(self, frozen: FrozenTrial) -> Trial:
        """A trial from what Optuna has stored of it."""
        state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(frozen.state, "running")
        state = frozen.user_attrs.get("ended", state)
        values = {
            tried.key: _value(tried, frozen.params[tried.key]) for tried in self.space if tried.key in frozen.params
        }
        return Trial(frozen.number, values, state, **frozen.user_attrs.get("done", {}))

    def folder(self, trial: Trial) -> Path:
        """The run folder of a trial; on the machine that trained it, it exists."""
        return self.output / "trials" / f"{trial.number:03d}"

    def best(self) -> tuple[Trial, Recipe] | None:
        """The best complete trial and its recipe as it was trained."""
        best = next((trial for trial in self.trials() if trial.state == "complete"), None)
        return (best, settled(self.recipe(best.values))) if best else None

    def found(self) -> Found:
        """The trials so far, of all processes, and their cost."""
        trials, best = self.trials(), self.best()
        recipe = best[1] if best else self.first
        num_train = max((trial.num_train for trial in trials), default=0)
        images, epochs = sum(trial.images for trial in trials), sum(recipe.phase_epochs)
        return Found(
            trials=trials,
            best=best[0] if best else None,
            images=images,
            hours=sum(trial.seconds for trial in trials) / 3600,
            epochs=epochs,
            full_runs=images / (epochs * num_train) if num_train else 0.0,
        )

    def write_best(self) -> Path | None:
        """Writes `best.toml`; None while no trial is complete."""
        if (found := self.best()) is None:
            return None
        trial, recipe = found
        file = self.output / "best.toml"
        text = extension(self.names, recipe, trial.values, self.output, settled)
        dataset = Path(self.settings.dataset).name
        about = f"# Found by sdcli tune: trial {trial.number}, validation top-1 {trial.top1:.2f} % on {dataset}.\n"
        with writing(file):
            write_text(file, f"{about}{text}")
        return file


def begin(search: Search) -> Search:
    """Checks the whole search, then creates its folder and storage, or joins the search that is there.

    Raises UserError before anything is written for a key or value that the recipe refuses, a data set that cannot be
    opened or has no validation split, and an output or storage that holds another search.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a trial of a search runs in one process",
            "no launcher",
            "start sdcli tune several times with the same --output or --storage",
        )
    if not search.space:
        raise UserError("nothing to try", "--try KEY=A..B or --try KEY=A,B,C", "--try optimizer.lr=0.01..1")
    load_imports(search.settings.imports)
    search = replace(search, space=checked(search.space, search.compose))
    first = {tried.key: tried.values[0] for tried in search.space}
    for tried in search.space:
        # Numbers outside of [networks] change neither exits nor widths.
        numbers = all(isinstance(value, int | float) for value in tried.values)
        for value in tried.values[:1] if numbers and not tried.key.startswith("networks.") else tried.values:
            recipe = search.recipe({**first, tried.key: value})
            with blaming({tried.key: tried.source}):
                check(search.settings, recipe, begins=True)
    settings = search.settings
    accelerator_of(settings, search.output)
    data = open_dataset(settings.dataset, image_key=settings.image_key, label_key=settings.label_key)
    if training_splits(data, settings.val_fraction, settings.seed)[1] is None:
        raise UserError(
            "trials are compared on a validation split, and there is none with --val-fraction 0",
            "images that are held out of training",
            "--val-fraction 0.1",
        )
    return _joined(search)


def _joined(search: Search) -> Search:
    """The search with its study, after its folder and storage are created or compared with it."""
    output, mark, own = search.output, search.output / MARK, _identity(search)
    left = [path.name for path in output.iterdir()] if output.is_dir() else []
    # Another process may be creating the same search.
    if not mark.exists() and not all(name in OWN or name.endswith(".tmp") for name in left):
        check_output(output, search.settings.dataset)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output '{output}' cannot be created: {error.strerror}", "a writable folder") from None
    try:
        with _one_at_a_time(output):
            if mark.exists():
                _check_same(f"output '{output}'", _read(mark), own)
            study = _open_study(search)
            _check_same(f"storage '{_shown(search)}'", study.user_attrs.get("search", own), own)
            study.set_user_attr("search", own)
            with writing(mark):
                write_text(mark, json.dumps(own, indent=2) + "\n")
            (output / "trials").mkdir(exist_ok=True)
    except UserError:
        if not mark.exists():
            with suppress(OSError):
                (output / "lock").unlink()
                output.rmdir()
        raise
    return replace(search, study=study)


def _identity(search: Search) -> dict[str, Any]:
    """What makes it this search on any machine: paths are cut to their names."""
    settings = {name: value for name, value in asdict(search.settings).items() if name not in MAY_CHANGE}
    settings["dataset"] = Path(search.settings.dataset).name
    recipe = without_paths(settled(search.first)).model_dump(exclude_none=True, exclude={"title", "paper"})
    # As JSON has it.
    plain: dict[str, Any] = json.loads(
        json.dumps({**settings, "try": {t.key: list(t.values) for t in search.space}, "recipe": recipe})
    )
    return plain


def _read(mark: Path) -> Any:
    try:
        return json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"'{mark}' is damaged: {error}", "the file as sdcli tune wrote it", "another --output"
        ) from None


def _check_same(where: str, there: Any, own: dict[str, Any]) -> None:
    if changed := first_difference(there, own):
        key, was, now = changed
        raise UserError(
            f"{where} holds another search: {key} = {was!r} there, {now!r} here",
            f"the same search; only --budget, --no-pruning, {', '.join(map(_flag, ALSO))} may change",
            "the same options, or another --output and --storage",
        )


def _flag(setting: str) -> str:
    return "--import" if setting == "imports" else f"--{setting.replace('_', '-')}"


def _shown(search: Search) -> str:
    """The storage without its password."""
    return re.sub(r"(://[^:/]*):.*@", r"\1:***@", search.storage or str(search.output / "search.db"))


def _open_study(search: Search) -> Any:
    """Optuna's study, which is created where it is missing. A storage is a URL of a database or of Redis, or a file for
    Optuna's journal, which a shared network drive can hold."""
    # A run of one epoch has nothing to prune.
    least = math.ceil(sum(search.first.phase_epochs) / REDUCTION**2)
    pruner: Any = optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=REDUCTION)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempts_left in (2, 1, 0):
        try:
            return optuna.create_study(
                study_name=STUDY,
                storage=_storage(search),
                direction="maximize",
                pruner=pruner if search.prune else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        except Exception as error:  # each database has errors of its own
            # Another machine may be creating the same tables.
            if attempts_left and isinstance(error, DBAPIError | optuna.exceptions.StorageInternalError):
                time.sleep(0.5)
                continue
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"storage '{_shown(search)}' cannot be used: {reason}",
                "a URL such as sqlite:///search.db or mysql://USER:PASSWORD@HOST/NAME, or a file for a journal",
            ) from None
    raise AssertionError


def _storage(search: Search) -> Any:
    name = search.storage
    if name is None:
        name = f"sqlite:///{search.output.resolve() / 'search.db'}"
    if "://" in name and not name.startswith("redis"):
        # SQLite has one writer at a time; the others wait so many seconds.
        wait = {"connect_args": {"timeout": 60}} if name.startswith("sqlite") else {}
        return RDBStorage(name, engine_kwargs=wait)
    redis = name.startswith("redis")
    backend = journal.JournalRedisBackend(name) if redis else journal.JournalFileBackend(name)
    return JournalStorage(backend)


@contextmanager
def _one_at_a_time(output: Path) -> Iterator[None]:
    """Only one process at a time opens the storage, or takes a trial, in a search's folder."""
    lock = Lock(output / "lock")
    lock.take(output, wait=True)
    try:
        yield
    finally:
        lock.release()


class _Sampler(optuna.samplers.TPESampler):
    """The tree-structured Parzen estimator, seeded by search and trial, which proposes nothing twice.

    A trial's proposal then depends only on the trials before it: processes that share a search draw different values,
    and a search that is continued draws what it would have drawn.
    """

    def __init__(self, search: Search, number: int) -> None:
        # Optuna's ten random trials would be most of a small search.
        startup = min(10, max(1, search.budget // 3))
        super().__init__(seed=search.settings.seed * 100_003 + number, n_startup_trials=startup, multivariate=False)
        self.search = search

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return _distributions(self.search.space)

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        tried = [other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        for _ in range(DRAWS):
            drawn = {key: self.sample_independent(study, trial, key, of) for key, of in search_space.items()}
            if drawn not in tried:
                return drawn
        spans = [t.choices or range(int(t.ends[0]), int(t.ends[1]) + 1) for t in self.search.space]
        every = (dict(zip(search_space, map(_label, values), strict=True)) for values in product(*spans))
        return next((values for values in every if values not in tried), drawn)


def _distributions(space: Sequence[Tried]) -> dict[str, BaseDistribution]:
    return {tried.key: _distribution(tried) for tried in space}


def _distribution(tried: Tried) -> BaseDistribution:
    if tried.choices:
        return CategoricalDistribution([_label(choice) for choice in tried.choices])
    if tried.whole:
        return IntDistribution(int(tried.ends[0]), int(tried.ends[1]), log=tried.log)
    return FloatDistribution(*tried.ends, log=tried.log)


def _label(choice: Any) -> Any:
    """A choice as Optuna stores it."""
    return choice if isinstance(choice, bool | int | float | str) else toml.write_value(choice)


def _value(tried: Tried, param: Any) -> Any:
    """The value of a key from what Optuna has stored."""
    return next((choice for choice in tried.choices if _label(choice) == param), tried.rounded(param))


def tune(search: Search, told_to_stop: Callable[[], int | None] = lambda: None) -> Iterator[Event]:
    """Runs trials until the search has as many as its budget, those of other processes included."""
    try:
        while (number := told_to_stop()) is None:
            if (taken := _take(search)) is None:
                return
            trial, lock = taken
            try:
                for event in _run(search, trial, told_to_stop):
                    yield event
                    if isinstance(event, Stopped):
                        return
                lock.path.unlink(missing_ok=True)
            finally:
                lock.release()
        yield Stopped(0, 0, number)
    except optuna.exceptions.StorageInternalError as error:
        raise UserError(
            f"storage '{_shown(search)}' has failed: {error}",
            "a storage that answers",
            "repair it; the same command then continues the search",
        ) from error


def _take(search: Search) -> tuple[optuna.Trial, Lock] | None:
    """A trial that a killed process has left, or else a new one, locked; None where the budget is used up."""
    study, budget = search.study, min(search.budget, search.size)
    with _one_at_a_time(search.output):
        for frozen in search.frozen():
            lock = _lock_of(search, frozen.number)
            if frozen.state != TrialState.RUNNING or not (lock.path.exists() or search.storage is None):
                continue
            try:
                lock.take(search.output)
            except UserError:
                continue
            # It may have ended since it was listed.
            if study.get_trials(deepcopy=False)[frozen.number].state == TrialState.RUNNING:
                # The only way to a trial that somebody else has begun.
                return optuna.Trial(study, frozen._trial_id), lock
            lock.path.unlink(missing_ok=True)
            lock.release()
        if len(search.frozen()) >= budget:
            return None
        trial = study.ask()
        # Another machine may have taken the last one at the same time.
        if sum(other.number < trial.number for other in search.frozen()) >= budget:
            study.tell(trial, state=TrialState.FAIL)
            return None
        lock = _lock_of(search, trial.number)
        lock.take(search.output)
        return trial, lock


def _lock_of(search: Search, number: int) -> Lock:
    return Lock(search.output / "trials" / f"{number:03d}.lock")


def _run(search: Search, trial: optuna.Trial, told_to_stop: Callable[[], int | None]) -> Iterator[Event]:
    """One trial, from where it is to its end."""
    study, began = search.study, time.monotonic()
    study.sampler = _Sampler(search, trial.number)
    for key, distribution in _distributions(search.space).items():
        _suggest(trial, key, distribution)
    before = _current(search, trial)
    try:
        recipe = search.recipe(before.values)
    except UserError as error:
        yield _end(search, trial, "refused", error.wrong)
        return
    try:
        training = _training(search, search.folder(before), recipe)
    except UserError as error:
        yield _refused(search, trial, error)
        return
    position = training.position
    yield Began(before, training.epochs, position.epoch, position.update, training.notes)
    events = fit(training, told_to_stop)
    try:
        pruned = _report(search, trial, training, before, began)
        while not pruned and (event := next(events, None)) is not None:
            if isinstance(event, Finished):
                study.tell(trial, _current(search, trial).score, skip_if_finished=True)
                yield Ended(_current(search, trial))
                return
            yield event
            if isinstance(event, Stopped):
                return
            pruned = isinstance(event, Epoch) and _report(search, trial, training, before, began)
    except NotFinite as error:
        yield _end(search, trial, "diverged", error.wrong)
        return
    except Unfit as error:
        yield _refused(search, trial, error)
        return
    finally:
        events.close()
    yield _end(search, trial)


def _suggest(trial: optuna.Trial, key: str, of: BaseDistribution) -> None:
    if isinstance(of, CategoricalDistribution):
        trial.suggest_categorical(key, of.choices)
    elif isinstance(of, IntDistribution):
        trial.suggest_int(key, of.low, of.high, log=of.log)
    elif isinstance(of, FloatDistribution):
        trial.suggest_float(key, of.low, of.high, log=of.log)


def _current(search: Search, trial: optuna.Trial) -> Trial:
    return search.known(search.study.get_trials(deepcopy=False)[trial.number])


def _end(search: Search, trial: optuna.Trial, how: str = "", reason: str = "") -> Ended:
    """Ends a trial before its last epoch. The sampler learns from it as from one that was pruned."""
    if how:
        trial.set_user_attr("ended", how)
    search.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    return Ended(_current(search, trial), reason)


def _refused(search: Search, trial: optuna.Trial, error: UserError) -> Ended:
    """Ends a trial that cannot be trained; raises the error where the first ones cannot, whatever their values."""
    ended = _end(search, trial, "refused", error.wrong)
    others = [search.known(other) for other in search.study.get_trials(deepcopy=False)]
    if len(others) >= HOPELESS and all(other.top1 is None for other in others):
        raise error
    return ended


def _training(search: Search, folder: Path, recipe: Recipe) -> Training:
    """The run of a trial: resumed where it has a state, else begun."""
    if not state_file(folder).exists():
        return prepare(search.settings, recipe, folder)
    given = {name: getattr(search.settings, name) for name in MAY_CHANGE}
    return resume(folder, *resumed(folder, given, recipe, []))


def _report(search: Search, trial: optuna.Trial, training: Training, before: Trial, began: float) -> bool:
    """Reports the epochs of the run's log that the storage does not have yet; returns whether to prune the trial.

    What counts is the best epoch of the phase so far, as in the checkpoint that the run keeps.
    """
    log, ends = read_log(training.run.folder), set(accumulate(training.recipe.phase_epochs))
    if not log:
        return False
    reported = search.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    best: tuple[float, float] | None = None
    done: Trial | None = None
    for line in log:
        if not line["validation"]:
            # The student rests in this phase.
            continue
        own = quality(Report.from_dict(line["validation"]), training.recipe.best)
        best = own if best is None or own > best or line["epoch"] - 1 in ends else best
        done = Trial(trial.number, {}, "", best[0], -best[1])
        if line["epoch"] not in reported:
            trial.report(done.score, line["epoch"])
    if done is None:
        return False
    numbers = {
        "top1": done.top1,
        "nll": done.nll,
        "epochs": len(log),
        "images": sum(line["num_images"] for line in log),
        "seconds": round(before.seconds + time.monotonic() - began, 3),
        "num_train": training.num_train,
    }
    trial.set_user_attr("done", numbers)
    return len(log) < training.epochs and trial.should_prune()
