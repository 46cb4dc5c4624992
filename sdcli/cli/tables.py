"""Tables for the terminal, and the same rows as CSV and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent, shorten
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sdcli.errors import counted
from sdcli.evaluation.columns import amount
from sdcli.recipe.about import needs
from sdcli.recipe.address import FINAL
from sdcli.toml import write_value

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sdcli.evaluation.bench import Bench
    from sdcli.evaluation.calibrate import Calibrated
    from sdcli.export.export import Exported
    from sdcli.method.catalogue import Item
    from sdcli.recipe.about import Difference, Overview
    from sdcli.run.tune import Search, Trial


def inspect_table(plan: Mapping[str, Any], console: Console) -> Table:
    """What `inspect` shows: `plan` as `Blueprint.summary` returns it, with as many columns as fit into the terminal."""
    table = _inspect_table(plan, ())
    for dropped in (("bar",), ("bar", "reduction")):
        if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
            break
        table = _inspect_table(plan, dropped)
    return table


def _inspect_table(plan: Mapping[str, Any], dropped: Sequence[str]) -> Table:
    size = "x".join(str(number) for number in plan["input_size"])
    table = plain_table(
        f"{plan['model']}  ·  {size}  ·  {amount(plan['params'])} parameters  ·  {amount(plan['macs'])} MACs"
    )
    table.add_column("exit", style="bold", no_wrap=True)
    table.add_column("module", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for title in ("reduction", "params", "MACs", "+ head\nparams", "+ head\nMACs", "share of\nMACs"):
        # Titles of two lines keep their columns narrow.
        if title not in dropped:
            table.add_column(title, justify="right", no_wrap=True)
    if "bar" not in dropped:
        table.add_column("", no_wrap=True)
    for stage in plan["stages"]:
        share = stage["exit_macs_fraction"]
        cells: dict[str, str | Text] = {
            # Notes on dominated exits begin with the same mark.
            "exit": stage["point"] + ("*" if stage["dominated_by"] else ""),
            "module": stage["module"],
            "shape": shape(stage),
            "reduction": f"/{stage['reduction']}",
            "params": amount(stage["params"]),
            "MACs": amount(stage["macs"]),
            "head params": amount(stage["head_params"]),
            "head MACs": amount(stage["head_macs"]),
            "share": f"{share:.1%}",
            "bar": Text("█" * min(16, max(1, round(share * 16))), style="cyan"),
        }
        table.add_row(*(cell for title, cell in cells.items() if title not in dropped))
    return table


def models_table(rows: Sequence[Mapping[str, Any]], console: Console) -> Table:
    """What `inspect` shows of a pattern: one row per model, with as many columns as the terminal has room for."""
    table = _models_table(rows, ())
    for dropped in (("channels",), ("channels", "family")):
        if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
            break
        table = _models_table(rows, dropped)
    return table


def _models_table(rows: Sequence[Mapping[str, Any]], dropped: Sequence[str]) -> Table:
    table = plain_table(counted(len(rows), "model"))
    for title in ("model", "family", "input", "params", "MACs", "stages", "channels"):
        if title not in dropped:
            right = title in ("input", "params", "MACs")
            table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        stages = row["stages"]
        cells = {
            "model": Text(row["model"], style="bold"),
            "family": row["family"],
            "input": "x".join(str(number) for number in row["input_size"][1:]),
            "params": amount(row["params"]),
            "MACs": amount(row["macs"]),
            "stages": " ".join(f"/{stage['reduction']}" for stage in stages),
            "channels": " ".join(str(stage["num_chs"]) for stage in stages),
        }
        table.add_row(*(cell for title, cell in cells.items() if title not in dropped))
    return table


GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Start here": (
        "quick, then default; finetune for your photos",
        ("quick", "default", "finetune"),
    ),
    "BYOT": (
        "the final exit teaches the others",
        ("byot", "byot-auto", "byot-journal", "byot-modern", "byot-nohint", "byot-scan"),
    ),
    "Step by step": ("exits on a network that is finished first", ("exits-only", "exits-then-all")),
    "Controls": ("to compare with", ("baseline", "deep-supervision", "random-weights")),
    "Between exits": (
        "exits or branches teach each other",
        ("at", "logit-standardization", "one", "one-exits", "sad", "scd", "sp", "wttm"),
    ),
    "A teacher": (
        "a trained network teaches: --teacher RUN",
        (
            *(
                "kd",
                "at-teacher",
                "byot-dkd",
                "ca-mkd",
                "crd",
                "dist",
                "dkd",
                "fitnet",
                "mix-kd",
                "nkd",
                "patient-teacher",
            ),
            *("prune-then-distill", "sp-teacher", "wttm-teacher"),
        ),
    ),
    "In one run": (
        "teachers and assistants are trained, or networks pruned, before the student learns",
        ("eskd", "prue", "prune", "takd"),
    ),
    "Peers": ("networks that learn at the same time", ("bd-kd", "dml", "sokd", "switokd")),
    "Over time": ("an earlier or averaged self teaches", ("born-again", "ema-teacher", "ps-kd")),
    "Other images": ("other views, or images of the class, teach", ("bake", "cs-kd", "ddgsd")),
    "Labels": ("softened, mixed or weighted", ("cutmix", "label-smoothing", "mixup", "tf-kd", "tf-nkd", "zipf")),
}
"""How `recipes list` groups the recipes: title, what they have in common, names."""


def recipes_table(recipes: Sequence[Overview], console: Console) -> Table:
    """What `recipes list` shows, by group; what no recipe needs gets no column, and papers only where there is room."""
    by_name = {recipe.name: recipe for recipe in recipes}
    asked = {recipe.name: needs(recipe.recipe) for recipe in recipes}
    has_needs, has_papers = any(asked.values()), console.width >= 100
    table = plain_table(counted(len(recipes), "recipe"))
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it is")
    if has_needs:
        table.add_column("also uses")
    if has_papers:
        table.add_column("paper", no_wrap=True)
    others = [name for name in by_name if not any(name in names for _, names in GROUPS.values())]
    for group, (words, names) in {**GROUPS, "Others": ("", others)}.items():
        chosen = [by_name[name] for name in names if name in by_name]
        if chosen:
            table.add_section()
            table.add_row(Text(group, style="not bold underline"), Text(words, style="dim"))
        for recipe in chosen:
            what = Text(recipe.recipe.title)
            if recipe.header.measured:
                what.append(f"\nmeasured: {shortened(recipe.header.measured)}", style="dim")
            table.add_row(
                recipe.name,
                what,
                *(["; ".join(asked[recipe.name]) or Text("-", style="dim")] if has_needs else []),
                *([_paper(recipe.recipe.paper)] if has_papers else []),
            )
    return table


def _paper(link: str) -> Text:
    """The paper's number or place, which a terminal opens."""
    short = re.sub(r"^https?://(arxiv\.org/abs/|doi\.org/|www\.)?", "", link)
    return Text(short, style=f"link {link}") if link else Text("-", style="dim")


def shortened(measured: str) -> str:
    """The first of what was measured, without how, seeds and machine."""
    return shorten(re.sub(r"^[^:;.]{0,60}: ", "", measured).split(" (")[0], 90, placeholder=" …")


def difference_table(one: str, other: str, found: Difference) -> Table:
    """What `recipes diff` shows: a row per value, table by table."""
    table = plain_table(f"{one} → {other}")
    table.add_column("key", no_wrap=True)
    for title in (one, other):
        table.add_column(title)
    rows = found.rows()
    for number, (key, *values) in enumerate(rows):
        of_table, _, name = key.rpartition(".")
        last = number + 1 == len(rows) or rows[number + 1][0].rpartition(".")[0] != of_table
        label = Text.assemble((f"{of_table}." if of_table else "", "dim"), (name, "bold"))
        cells = [Text("-", style="dim") if value is None else Text(write_value(value)) for value in values]
        table.add_row(label, *cells, end_section=last and number + 1 < len(rows))
    return table


def catalogue_table(title: str, one: str, items: Sequence[Item]) -> Table:
    """What `recipes losses` and its like show: a row per name, its keys below what it is."""
    table = plain_table(f"{len(items)} {title}")
    compare = any(item.against for item in items)
    table.add_column(one, style="bold", no_wrap=True)
    if compare:
        table.add_column("compares", no_wrap=True)
    table.add_column("what it is")
    table.add_column("arXiv", no_wrap=True)
    for item in items:
        cell = Text("\n").join([Text(without_papers(item.summary)), *_keys(item)])
        compared = [Text.assemble(item.reads, "\n", (f"with {item.against}", "dim"))] if compare else []
        papers = [Text(number, style=f"link https://arxiv.org/abs/{number}") for number in item.papers[:1]]
        table.add_row(item.name, *compared, cell, papers[0] if papers else Text("-", style="dim"))
        if any(item.keys for item in items):
            table.add_section()
    return table


def catalogue_details(items: Sequence[Item]) -> Text:
    """All that is known of a few names."""
    text = Text()
    for item in items:
        text.append(item.name, style="bold")
        if item.against:
            text.append(f"  compares {item.reads} with the {item.against}", style="dim")
        text.append(f"\n\n{item.summary}.\n")
        if item.formula:
            text.append("\n" + indent(item.formula, "    ") + "\n")
        for paragraph in filter(None, item.details.split("\n\n")):
            text.append(f"\n{paragraph}\n")
        for number, line in enumerate(_keys(item)):
            text.append("\n" * (number == 0)).append_text(line).append("\n")
        for number, paper in enumerate(item.papers):
            text.append("\n" * (number == 0)).append(f"https://arxiv.org/abs/{paper}\n", style="dim")
        text.append("\n")
    text.rstrip()
    return text


def _keys(item: Item) -> list[Text]:
    """One line per key, as a recipe would have it, and what else it may be."""
    settings = [f"{key.name} = {'…' if key.required else write_value(key.default)}" for key in item.keys]
    wide = max(map(len, settings), default=0) + 2
    pairs = zip(settings, item.keys, strict=True)
    return [Text.assemble((f"{setting:<{wide}}", "cyan"), (key.type, "dim")) for setting, key in pairs]


def without_papers(summary: str) -> str:
    """A docstring's first sentence without its references and shapes."""
    return re.sub(r" \([^()]*(?:arXiv|\b(?:19|20)\d\d)[^()]*\)|,? (?:per image )?\[B\]$", "", summary)


def plain_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        pad_edge=False,
        collapse_padding=True,
    )


def export_table(exported: Exported) -> Table:
    """What `export` shows: how each exit of the file compares with the checkpoint."""
    size = sum(exported.files.values())
    files = counted(len(exported.files), "file")
    table = plain_table(f"{exported.output}  ·  {exported.format}  ·  {files}  ·  {size / 1e6:.1f} MB")
    table.add_column("exit", style="bold", no_wrap=True)
    table.add_column("compared on", no_wrap=True)
    for title in ("images", "largest\nlogit", "largest\ndifference", "same\nclass", "mean KL"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in exported.figures:
        table.add_row(
            row.exit,
            row.images,
            str(row.num_images),
            f"{row.largest:.3g}",
            f"{row.difference:.1e}",
            f"{row.agree}/{row.num_images}",
            f"{row.kl:.1e}",
        )
    return table


def routed_table(exported: Exported) -> Table:
    """What `export` shows of a runner: whether images leave where they leave in the network."""
    table = plain_table("run.py: images that leave at the same exit, with the same class")
    for title in ("policy", "compared on"):
        table.add_column(title, no_wrap=True)
    table.add_column("same", justify="right", no_wrap=True)
    table.add_column("they leave at")
    for row in exported.routed:
        shares = ", ".join(f"{exit} {share:.0%}" for exit, share in row.shares.items())
        table.add_row(row.policy, row.images, f"{row.same}/{row.num_images}", shares)
    return table


def shape(stage: Mapping[str, Any]) -> str:
    """A stage's output for one image in the model's own layout: 64x56x56, 56x56x96, or tokens as 14x14+1 x 384."""
    height, width = stage["size"]
    channels, prefix = stage["num_chs"], stage["num_prefix_tokens"]
    if stage["output_fmt"] == "NCHW":
        return f"{channels}x{height}x{width}"
    if stage["output_fmt"] == "NHWC":
        return f"{height}x{width}x{channels}"
    return f"{height}x{width}" + (f"+{prefix}" if prefix else "") + f" x {channels}"


def exits_table(found: Calibrated, num_images: int) -> Table:
    """What `calibrate` shows of every exit alone."""
    table = plain_table(f"exits on {counted(num_images, 'held-out image')}")
    table.add_column("exit", no_wrap=True)
    for title in ("top-1 %", "AUROC", "temperature", "ECE", "ECE at this\ntemperature"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.exits:
        auroc = "-" if row.auroc is None else f"{row.auroc:.3f}"
        cells = (f"{row.top1:.2f}", auroc, f"{row.temperature:.2f}", f"{row.ece:.3f}", f"{row.scaled_ece:.3f}")
        table.add_row(row.point, *cells)
    return table


def trade_off_table(found: Calibrated, confidence: float, *, change: bool) -> Table:
    """What `calibrate` shows of its settings, the chosen one in bold, and below it what the columns mean."""
    table = plain_table("early exit: settings of " + found.calibration.policy.kind)
    points = list(found.trade_offs[-1].shares)
    for row in found.trade_offs:
        points += [point for point in row.shares if point not in points]
    # exit10 comes after exit9, and final last.
    points = sorted(points, key=lambda point: (point == FINAL, len(point), point))
    timed = any(row.latency_ms is not None for row in found.trade_offs)
    table.add_column("", no_wrap=True)
    lost = "changed" if change else "drop"
    for title in ("mean MACs", "p95", *(["ms"] if timed else []), "same %" if change else "top-1 %", lost, f"{lost} ≤"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in points:
        table.add_column(point, justify="right", no_wrap=True)
    written: dict[tuple[str, ...], bool] = {}
    for row in found.trade_offs:
        cells = (
            f"{row.cost:.3f} ± {row.cost_error:.3f}",
            f"{row.p95_cost:.2f}",
            *([f"{row.latency_ms:.2f}" if row.latency_ms is not None else "-"] if timed else []),
            f"{row.top1:.2f}",
            f"{row.drop:.2f}",
            f"{row.certified:.2f}",
            *(f"{row.shares[point]:.0%}" if point in row.shares else "" for point in points),
        )
        # Settings that were different on the other half may do the same here.
        written[cells] = written.get(cells, False) or row.chosen
    for cells, chosen in written.items():
        table.add_row("→" if chosen else "", *cells, style="bold" if chosen else "")
    return table


def bench_tables(bench: Bench) -> Iterator[Table]:
    """What `bench` shows: a table for each batch size and mode."""
    for batch_size, mode in dict.fromkeys((timing.batch_size, timing.mode) for timing in bench.timings):
        table = plain_table(f"{bench.model}  ·  {mode}, batch size {batch_size}")
        table.add_column("network", no_wrap=True)
        for title in ("median ms", "p95 ms", "images/s", "time\nvs plain", "MACs\nvs plain"):
            table.add_column(title, justify="right", no_wrap=True)
        for own in bench.timings:
            if (own.batch_size, own.mode) == (batch_size, mode):
                table.add_row(
                    own.subject,
                    f"{own.median_ms:.2f}",
                    f"{own.p95_ms:.2f}",
                    f"{own.images_per_s:,.0f}",
                    f"{own.ratio:.2f}x",
                    f"{own.macs_ratio:.2f}x",
                )
        yield table


def search_table(search: Search, trials: Sequence[Trial]) -> Table:
    """What `tune` shows of its trials: the best first, each with the values that it tried."""
    about = f"{search.settings.model} on {Path(search.settings.dataset).name}"
    table = plain_table(f"{about}  ·  {counted(len(trials), 'trial')}, scored by {search.first.best}")
    table.add_column("trial", justify="right", no_wrap=True)
    for tried in search.space:
        # In two lines, so that columns stay narrow.
        around, _, last = tried.key.rpartition(".")
        table.add_column(f"{around}\n{last}" if around else last, justify="right", no_wrap=True)
    for title in ("validation\ntop-1 %", "NLL", "epochs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for place, trial in enumerate(trials):
        values = [write_value(trial.values[t.key]) if t.key in trial.values else "" for t in search.space]
        scores = (trial.top1, "{:.2f}"), (trial.nll, "{:.3f}")
        cells = [style.format(score) if score is not None else "-" for score, style in scores]
        best = place == 0 and trial.state == "complete"
        table.add_row(str(trial.number), *values, *cells, str(trial.epochs), trial.state, style="bold" if best else "")
    return table
