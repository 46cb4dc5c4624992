"""Charts as inline SVG: text that can be selected, tooltips, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

from sdcli.errors import counted
from sdcli.evaluation.metrics import Bin

WIDTH, HEIGHT = 400, 260
"""Of a chart, in units of which its letters are 12 high: narrow, so that they can be read on a phone too."""
LETTER, LINE = 7.0, 14.0
"""The mean width of a letter, and the least distance of two lines of text."""
LONGEST = 14
"""Letters of a label at the end of a line."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values of one thing: a line, or dots."""

    name: str
    points: Sequence[Range]
    look: Markup
    """The attributes that colour it: `look` makes them."""
    tips: Sequence[str] = ()
    """What a dot says when it is pointed at; a line has one for all."""
    spans: Sequence[Range] = ()
    """The interval of each dot."""
    dots: bool = False
    line: bool = True
    labels: Sequence[str] = ()
    """The text beside each dot."""


def look(kind: str, place: float = 0.0) -> Markup:
    """Attributes of a series: a class of the style sheet, and for a `shade` its place from first (0) to last (1)."""
    style = Markup(' style="--place:{:.3f}"').format(place) if kind == "shade" else Markup()
    return Markup('class="{}"').format(kind) + style


def shades(number: int) -> list[Markup]:
    """The looks of things that have an order, such as exits."""
    return [look("shade", place / max(1, number - 1)) for place in range(number)]


@dataclass(frozen=True)
class Axis:
    """Values on one side of a chart, from `low` to `high`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between both ends, in [0, 1]."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def linear(values: Sequence[float], count: int = 5, *, least: float | None = None, whole: bool = False) -> Axis:
    """An axis around the values, whose ends are ticks; `least` is included.

    `whole`: its ticks are whole numbers, and it ends where the values end.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = low if least is None else min(low, least)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _step((high - low) / count)
    if whole:
        step = max(1.0, step)
        return Axis(low, high, tuple(_multiples(math.ceil(low / step), math.floor(high / step), step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, tuple(_multiples(first, last, step)))


def logarithmic(values: Sequence[float]) -> Axis:
    """An axis of powers of ten, or of 1, 2 and 5 times those where there are few."""
    low, high = min(values), max(values)
    low, high = (low / 1.2, high * 1.2) if high < low * 1.5 else (low, high)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), tuple(range(1, 10))):
        ticks = tuple(f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high)
        if len(ticks) >= 3:
            break
    return Axis(low, high, ticks[:: max(1, len(ticks) // 6)], log=True)


def _multiples(first: int, last: int, step: float) -> Iterator[float]:
    return (number * step for number in range(first, last + 1))


def _step(least: float) -> float:
    """1, 2 or 5 times a power of ten: the smallest that is as large as `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


class Box(NamedTuple):
    """The place of a text."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass
class Frame:
    """The axes of a chart, and what is drawn between them."""

    x: Axis
    y: Axis
    title: str
    x_title: str
    format_x: Callable[[float], str] = "{:g}".format
    format_y: Callable[[float], str] = "{:g}".format
    right: float = 26.0
    """The margin for labels."""
    parts: list[Markup] = field(default_factory=list)

    left, top, bottom = 44.0, 12.0, 42.0

    def at(self, x: float, y: float) -> Range:
        """A point in the units of the picture."""
        width, height = WIDTH - self.left - self.right, HEIGHT - self.top - self.bottom
        return self.left + width * self.x.share(x), self.top + height * (1 - self.y.share(y))

    def add(self, text: str, *values: object) -> None:
        """One more element; values are escaped."""
        self.parts.append(Markup(text).format(*values))

    def axes(self) -> None:
        """Ticks, lines at those of y, and the title of x."""
        floor, end = HEIGHT - self.bottom, WIDTH - self.right
        for value in self.y.ticks:
            _, y = self.at(self.x.low, value)
            self.add('<path class="grid" d="M{:.1f},{:.1f}H{:.1f}"/>', self.left, y, end)
            text = self.format_y(value)
            self.add('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>', self.left - 6, y + 4, text)
        for value in self.x.ticks:
            x, _ = self.at(value, self.y.low)
            self.add('<path class="tick" d="M{:.1f},{:.1f}v4"/>', x, floor)
            text = self.format_x(value)
            self.add('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>', x, floor + 17, text)
        middle = (self.left + end) / 2
        self.add('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>', middle, HEIGHT - 6, self.x_title)

    def svg(self) -> Markup:
        """The picture."""
        return picture(WIDTH, HEIGHT, self.title, self.parts)


def picture(width: float, height: float, title: str, parts: Sequence[Markup]) -> Markup:
    """An SVG element with a text alternative."""
    inside = Markup("\n").join(parts)
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">\n{}\n</svg>').format(
        width, height, title, inside
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    x_title: str,
    *,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines with their names at their ends; `marks` are upright lines with a text."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points if math.isfinite(y) and (y > 0 or not log)]
    if not ys:
        return Markup()
    longest = max(len(_short(one.name)) for one in series)
    y_axis = logarithmic(ys) if log else linear(ys)
    frame = Frame(linear(xs, whole=True), y_axis, title, x_title, right=16 + LETTER * longest)
    frame.axes()
    for x, text in marks:
        _mark(frame, x, text)
    for one in series:
        _line(frame, one)
    _end_labels(frame, series)
    return frame.svg()


def _mark(frame: Frame, x: float, text: str) -> None:
    at, top = frame.at(x, frame.y.high)
    frame.add('<path class="mark" d="M{:.1f},{:.1f}V{:.1f}"/>', at, top, HEIGHT - frame.bottom)
    frame.add('<text class="phase" x="{:.1f}" y="{:.1f}">{}</text>', at + 4, top + 9, _short(text))


def _line(frame: Frame, one: Series) -> None:
    """The line, broken where a value is missing, and its dots."""
    drawn = [(place, frame.at(x, y)) for place, (x, y) in enumerate(one.points) if _drawable(frame.y, y)]
    steps = [
        ("L" if number and drawn[number - 1][0] == place - 1 else "M") + f"{x:.1f},{y:.1f}"
        for number, (place, (x, y)) in enumerate(drawn)
    ]
    if one.line and steps:
        tip = one.tips[0] if one.tips and not one.dots else one.name
        frame.add('<path {} d="{}"><title>{}</title></path>', one.look, "".join(steps), tip)
    # A line of one point would not be seen.
    if one.dots or len(drawn) == 1:
        _dots(frame, one)


def _dots(frame: Frame, one: Series) -> None:
    radius = 3 if one.line else 5
    for place, (x, y) in enumerate(one.points):
        if one.spans:
            (at, low), (_, high) = (frame.at(x, end) for end in one.spans[place])
            frame.add('<path class="span" d="M{:.1f},{:.1f}V{:.1f}"/>', at, low, high)
        tip = one.tips[place] if place < len(one.tips) else one.name
        dot = '<circle {} cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
        frame.add(dot, one.look, *frame.at(x, y), radius, tip)


def _drawable(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _end_labels(frame: Frame, series: Sequence[Series]) -> None:
    """Names where the lines end, moved apart where they would overlap."""
    ends = []
    for one in series:
        last = [(x, y) for x, y in one.points if _drawable(frame.y, y)][-1:]
        ends += [(frame.at(*last[0])[1], one)] if last else []
    ends.sort(key=lambda end: end[0])
    heights = _apart([height for height, _ in ends], 8, HEIGHT - frame.bottom)
    for (end, one), height in zip(ends, heights, strict=True):
        x = WIDTH - frame.right
        frame.add('<path {} d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>', one.look, x + 2, end, x + 9, height)
        frame.add('<text x="{:.1f}" y="{:.1f}">{}</text>', x + 12, height + 4, _short(one.name))


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Sorted heights, moved as little as needed so that no two are nearer than a line of text."""
    gap = min(LINE, (bottom - top) / max(1, len(heights) - 1))
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        # Groups whose lines would overlap become one, around the mean of their heights.
        while len(groups) > 1 and _first(groups[-1], gap) < _first(groups[-2], gap) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    found: list[float] = []
    for group in groups:
        found += [_first(group, gap) + gap * place for place in range(len(group))]
    for place in range(len(found)):
        found[place] = max(found[place], top + gap * place)
    for place in reversed(range(len(found))):
        found[place] = min(found[place], bottom - gap * (len(found) - 1 - place))
    return found


def _first(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def dot_chart(
    title: str,
    series: Sequence[Series],
    x_title: str,
    *,
    format_x: Callable[[float], str],
) -> Markup:
    """Dots and lines with a text beside each dot that has one."""
    points = [point for one in series for point in one.points]
    ends = [end for one in series for span in one.spans for end in span]
    y_axis = linear([*(y for _, y in points), *ends])
    frame = Frame(linear([x for x, _ in points], least=0.0), y_axis, title, x_title, format_x)
    frame.axes()
    for one in series:
        _line(frame, one)
    _beside_dots(frame, series)
    return frame.svg()


def _beside_dots(frame: Frame, series: Sequence[Series]) -> None:
    """Each label where it covers least of dots, lines, intervals and other labels."""
    taken = [box for one in series for box in _drawn(frame, one)]
    # The labels of single dots first: that of a line may stand at any of its dots.
    for one in sorted(series, key=lambda one: one.line):
        for point, text in zip(one.points, map(_short, one.labels), strict=False):
            if text:
                places = _places(*frame.at(*point), LETTER * len(text))
                box = min(places, key=lambda box: sum(box.overlap(other) for other in taken))
                taken.append(box)
                frame.add('<text class="beside" x="{:.1f}" y="{:.1f}">{}</text>', box.left, box.bottom - 3, text)


def _drawn(frame: Frame, one: Series) -> Iterator[Box]:
    """What a series covers."""
    points = [frame.at(*point) for point in one.points]
    yield from (Box(x - 5, y - 5, x + 5, y + 5) for x, y in points)
    for (x, _), span in zip(points, one.spans, strict=False):
        low, high = (frame.at(frame.x.low, end)[1] for end in span)
        yield Box(x - 1, high, x + 1, low)
    for (x, y), (to_x, to_y) in pairwise(points if one.line else []):
        for share in (part / 24 for part in range(24)):
            at, height = x + (to_x - x) * share, y + (to_y - y) * share
            yield Box(at - 2, height - 2, at + 2, height + 2)


SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
"""Where a label may stand beside its dot, the best first."""


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """Places of a label beside a dot, the best first, inside the picture."""
    for far in (8, 16, 26):
        for across, down in SIDES:
            left = x - width / 2 + across * (far + width / 2)
            top = y - 7 + down * (far + (0 if across else 4))
            if left >= 4 and left + width <= WIDTH - 2 and 2 <= top <= HEIGHT - Frame.bottom - 14:
                yield Box(left, top, left + width, top + 14)
    yield Box(x + 8, y - 7, x + 8 + width, y + 7)


def reliability(title: str, bars: Sequence[Bin], kind: Markup) -> Markup:
    """Accuracy by confidence: bars that end on the diagonal are right; the fuller, the more images."""
    side, left, top = 120.0, 26.0, 8.0
    floor = top + side
    parts = [Markup('<path class="grid" d="M{0},{1}h{2}v{2}h-{2}z"/>').format(left, top, side)]
    most = max((bar.images for bar in bars), default=1)
    for bar in bars:
        x, width, height = left + side * bar.low + 0.5, side * (bar.high - bar.low) - 1, side * bar.accuracy
        full = 0.25 + 0.75 * math.sqrt(bar.images / most)
        parts.append(Markup("<g {}><title>{}</title>").format(kind, _bar_tip(bar)))
        box = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}"/>'
        parts.append(Markup(box).format(x, floor - height, width, height, full))
        parts.append(Markup('<path d="M{:.1f},{:.1f}h{:.1f}"/></g>').format(x, floor - height, width))
    parts.append(Markup('<path class="mark" d="M{},{}l{},-{}"/>').format(left, floor, side, side))
    for value in (0.0, 0.5, 1.0):
        number = Markup('<text x="{}" y="{}" text-anchor="{}">{:g}</text>')
        parts.append(number.format(left - 5, floor - side * value + 4, "end", value))
        parts.append(number.format(left + side * value, floor + 15, "middle", value))
    return picture(left + side + 8, floor + 20, title, parts)


def _bar_tip(bar: Bin) -> str:
    return (
        f"confidence {bar.low:.2f} to {bar.high:.2f}: {counted(bar.images, 'image')}, "
        f"mean confidence {bar.confidence:.1%}, {bar.accuracy:.1%} right"
    )


@dataclass(frozen=True)
class Row:
    """One line of a chart of rows: dots for shares in percent."""

    name: str
    tip: str
    values: Sequence[float]
    """In the order of the looks that the chart is given."""


ROW, ROWS_LEFT, ROWS_WIDTH = 21.0, 128.0, WIDTH - 142.0
"""The height of a row, and where its values begin and how wide they are."""


def row_chart(title: str, rows: Sequence[Row], looks: Sequence[Markup], axis: Axis, x_title: str) -> Markup:
    """A line per row, from its least to its largest value, with a dot for each, that of the last value the largest."""
    top, floor = 6.0, 6.0 + ROW * len(rows)
    parts = []
    for value in axis.ticks:
        x = ROWS_LEFT + ROWS_WIDTH * axis.share(value)
        parts.append(Markup('<path class="grid" d="M{:.1f},{}V{}"/>').format(x, top, floor))
        parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(x, floor + 16, value))
    parts += [_row(row, top + ROW * (number + 0.5), looks, axis) for number, row in enumerate(rows)]
    middle = ROWS_LEFT + ROWS_WIDTH / 2
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, floor + 34, x_title))
    return picture(WIDTH, floor + 40, title, parts)


def _row(row: Row, y: float, looks: Sequence[Markup], axis: Axis) -> Markup:
    xs = [ROWS_LEFT + ROWS_WIDTH * axis.share(value) for value in row.values]
    parts = [
        Markup("<g><title>{}</title>").format(row.tip),
        Markup('<rect class="row" x="0" y="{}" width="{}" height="{}"/>').format(y - ROW / 2, WIDTH, ROW),
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(ROWS_LEFT - 10, y + 4, _short(row.name, 17)),
        Markup('<path class="span" d="M{:.1f},{}H{:.1f}"/>').format(min(xs), y, max(xs)),
    ]
    for place, (x, kind) in enumerate(zip(xs, looks, strict=True), start=1):
        radius = 5.5 if place == len(xs) else 3.5
        parts.append(Markup('<circle {} cx="{:.1f}" cy="{}" r="{}"/>').format(kind, x, y, radius))
    return Markup("").join([*parts, Markup("</g>")])


def legend(names: Sequence[str], looks: Sequence[Markup]) -> Markup:
    """The colours and what they stand for."""
    dot = '<svg class="key" viewBox="0 0 12 12" aria-hidden="true"><circle {} cx="6" cy="6" r="5"/></svg>'
    keys = (Markup(f"<li>{dot}{{}}</li>").format(kind, name) for name, kind in zip(names, looks, strict=True))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(keys))


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
