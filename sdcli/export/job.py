"""One export: the network, what of it is exported, and what the user should know about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdcli.errors import UserError, unknown
from sdcli.export import graphs
from sdcli.export.formats import ALL, STAGED, Kind, kind_of
from sdcli.export.prepare import prepare, without_fused_attention
from sdcli.network.checkpoint import Description
from sdcli.network.multi_exit import MultiExit
from sdcli.recipe.address import FINAL


@dataclass
class Job:
    """What a format's `write` and `read` are given."""

    checkpoint: Path
    network: MultiExit
    """As it was trained: what the exported file is compared with."""
    about: Description
    exit: str
    """The name of an exit, `ALL` or `STAGED`."""
    license: str = ""
    small: float | None = None
    """The share of the data's images that are small and so shown whole; None where it is not known."""
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Exits that are not in a staged export, and why."""
    cuts: tuple[str, ...] = ()
    """The exits after which a staged export is cut."""
    _ready: MultiExit | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an unknown exit, and for a staged export of a network that cannot be cut anywhere."""
        self.network.eval()
        if self.kind == "one" and self.exit not in self.network.classifiers:
            raise unknown("exit", self.exit, [*self.network.classifiers, ALL, STAGED]).within("--exit", key="--exit")
        if self.kind == "staged":
            self._choose_cuts()

    def _choose_cuts(self) -> None:
        exits = self.network.classifiers[:-1]
        if not exits:
            raise UserError("--exit staged: this network has no exits", "a network with exits", f"--exit {FINAL}")
        self.left_out = {point: self.network.why_not[point] for point in exits if self.network.why_not[point]}
        self.cuts = tuple(point for point in exits if point not in self.left_out)
        if not self.cuts:
            first, reason = next(iter(self.left_out.items()))
            raise UserError(
                f"--exit staged: {self.network.plan.model} cannot be cut at any exit ({first}: {reason})",
                "a model with clean cuts",
                "--exit all, or --exit NAME",
            )
        for point, reason in self.left_out.items():
            self.notes.append(f"{point} is left out: {reason}")
        calibration = self.network.calibration
        for point in calibration.policy.exits if calibration else ():
            if point in self.left_out:
                raise UserError(
                    f"--exit staged: the policy of this checkpoint uses {point}, which is no clean cut: "
                    f"{self.left_out[point]}",
                    "a policy of " + ", ".join(self.cuts),
                    "sdcli calibrate",
                )

    @property
    def kind(self) -> Kind:
        """One exit, all of them in one graph, or a graph per section."""
        return kind_of(self.exit)

    @property
    def points(self) -> Sequence[str]:
        """The points whose logits are exported."""
        if self.kind == "one":
            return (self.exit,)
        return (*self.cuts, FINAL) if self.kind == "staged" else self.network.classifiers

    @property
    def ready(self) -> MultiExit:
        """The network as it is traced."""
        if self._ready is None:
            self._ready, notes = prepare(self.network)
            self.notes += notes
        return self._ready

    def parts(self, *, fixed: bool = False) -> Sequence[graphs.Part]:
        """The graphs to write: for batches of any size, or for one image where `fixed`."""
        if self.kind == "staged":
            return graphs.sections(self.ready, self.cuts, fixed)
        return [
            graphs.one_exit(self.ready, self.exit, fixed) if self.kind == "one" else graphs.all_exits(self.ready, fixed)
        ]

    def write_out_attention(self) -> None:
        """From now on attention is traced as matrix products, for a converter without the fused operator."""
        self._ready = without_fused_attention(self.ready)
        self.notes.append("attention is written out as matrix products: the converter has no fused operator for it")
