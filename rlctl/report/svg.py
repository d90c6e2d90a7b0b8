"""Charts as SVG text: small, styled by classes so that light and dark both work, with a title on everything drawn.

`panel` and `dots` give an `<svg>` for a page whose style sheet contains `style_sheet()`; `sheet` gives a file of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from rlctl.report.charts import DASHES, PALETTE, Dots, Line, Panel
from rlctl.report.stats import Floats

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 42
ROW = 32
MANY = 4
"""Bands from which on they are drawn fainter."""
MAX_MEMBERS = 6
"""Single runs drawn behind a mean; with more of them lines only hide each other."""


def style_sheet() -> str:
    """CSS of the charts: colours by class `k0`, `k1`, ... in light and in dark."""
    light = "".join(_colours(i, pair[0]) for i, pair in enumerate(PALETTE))
    dark = "".join(_colours(i, pair[1]) for i, pair in enumerate(PALETTE))
    dashes = "".join(f".d{i} .mean,.swatch.d{i} line{{stroke-dasharray:{d}}}" for i, d in enumerate(DASHES) if d)
    return (
        ".chart{font:11px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;color:#1c1e21}"
        ".chart text{fill:currentColor}.chart .title{font-weight:600;font-size:12.5px}"
        ".chart .axis{stroke:currentColor;stroke-opacity:.55;fill:none}"
        ".chart .grid{stroke:currentColor;stroke-opacity:.13}"
        ".chart .mean{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}"
        ".chart .member{fill:none;stroke-width:.8;stroke-opacity:.45}"
        ".chart .band{stroke:none;fill-opacity:.17}.chart.many .band{fill-opacity:.07}"
        ".chart .series:hover .band{fill-opacity:.3}.chart .whisker{stroke-width:2.4;stroke-linecap:round}"
        ".chart:hover .series:not(:hover){opacity:.4}.series:hover .mean{stroke-width:3}"
        + light
        + dashes
        + "@media (prefers-color-scheme:dark){.chart{color:#e6e6e6}"
        + dark
        + "}"
        "@media print{.chart{color:#000}" + light + "}"
    )


def _colours(i: int, colour: str) -> str:
    strokes = ",".join(f".k{i} .{part}" for part in ("mean", "member", "whisker"))
    return f"{strokes},.swatch.k{i} line{{stroke:{colour}}}.k{i} .band,.k{i} .dot{{fill:{colour}}}"


def classes(style: int) -> str:
    """CSS classes of a style: colour and dashes."""
    return f"k{style % len(PALETTE)} d{style // len(PALETTE) % len(DASHES)}"


def swatch(style: int) -> str:
    """A short piece of the line, for legends."""
    return f'<svg class="swatch {classes(style)}" width="26" height="10" aria-hidden="true">' + (
        '<line x1="1" y1="5" x2="25" y2="5" stroke-width="2.4"/></svg>'
    )


# -------------------------------------------------------------------------------------------------------------- curves
def panel(p: Panel) -> str:
    """One chart."""
    x_low, x_high, y_low, y_high = _ranges(p)
    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(x: Floats) -> Floats:
        return LEFT + (x - x_low) / (x_high - x_low) * inner_w

    def py(y: Floats) -> Floats:
        return TOP + (y_high - np.clip(y, y_low, y_high)) / (y_high - y_low) * inner_h

    kind = "chart many" if len(p.lines) > MANY else "chart"
    parts = [
        _open(WIDTH, HEIGHT, kind, f"{p.title}: {p.y_label} against {p.x_label}. " + "; ".join(x.note for x in p.lines))
    ]
    parts.append(f'<text class="title" x="{LEFT}" y="16">{escape(_clip(p.title, 52))}</text>')
    y_ticks, x_ticks = ticks(y_low, y_high), ticks(x_low, x_high, 5)
    y_text, x_text = number_labels(y_ticks, p.percent), number_labels(x_ticks)
    for at, text in zip(map(_n, py(np.array(y_ticks)).tolist()), y_text, strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".33em" text-anchor="end">{text}</text>')
    for at, text in zip(map(_n, px(np.array(x_ticks)).tolist()), x_text, strict=True):
        parts.append(f'<path class="axis" d="M{at} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = _n(TOP + inner_h / 2)
    parts.append(f'<text x="{LEFT + inner_w / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(p.x_label)}</text>')
    parts.append(
        f'<text x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})">{escape(p.y_label)}</text>'
    )
    for line in p.lines:
        body = [f"<title>{escape(line.note or line.label)}</title>"]
        if line.low is not None and line.high is not None:
            there = _path(px(line.x), py(line.high))
            back = _path(px(line.x[::-1]), py(line.low[::-1]))
            body.append(f'<path class="band" d="{there}L{back[1:]}Z"/>')
        elif 1 < len(line.members) <= MAX_MEMBERS:
            body += [f'<path class="member" d="{_path(px(x), py(y))}"/>' for x, y in line.members]
        if len(line.x) == 1:
            body.append(f'<circle class="dot" r="3" cx="{_n(float(px(line.x)[0]))}" cy="{_n(float(py(line.y)[0]))}"/>')
        body.append(f'<path class="mean" d="{_path(px(line.x), py(line.y))}"/>')
        parts.append(f'<g class="series {classes(line.style)}">{"".join(body)}</g>')
    return "".join([*parts, "</svg>"])


def _ranges(p: Panel) -> tuple[float, float, float, float]:
    xs = np.concatenate([line.x for line in p.lines])
    y_low, y_high = p.y_range or _y_range(p.lines)
    x_low, x_high = float(xs.min()), float(xs.max())
    if x_low > 0 and x_low < 0.25 * x_high:
        x_low = 0.0
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    return x_low, x_high, y_low, y_high


def _y_range(lines: Sequence[Line]) -> tuple[float, float]:
    """What the means and single runs need; a band may go half as far beyond before it is cut off."""
    core = [line.y for line in lines] + [y for line in lines if line.low is None for _, y in line.members]
    low, high = min(float(y.min()) for y in core), max(float(y.max()) for y in core)
    span = (high - low) or abs(high) or 1.0
    wide_low = min([low, *(float(x.low.min()) for x in lines if x.low is not None)])
    wide_high = max([high, *(float(x.high.max()) for x in lines if x.high is not None)])
    low, high = max(wide_low, low - span / 2), min(wide_high, high + span / 2)
    margin = 0.04 * ((high - low) or span)
    if 0 <= low < 0.3 * (high - low):
        return 0.0, high + margin
    return low - margin, high + margin


# ---------------------------------------------------------------------------------------------------------------- dots
def dots(d: Dots) -> str:
    """Estimates with intervals, one below the other, over a common axis."""
    height = TOP + ROW * len(d.rows) + 30
    left = 12
    low, high = min(i.low for *_, i in d.rows), max(i.high for *_, i in d.rows)
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    low, high = low - margin, high + margin
    width = 200

    def px(x: float) -> str:
        return _n(left + (x - low) / (high - low) * (width - left - 14))

    said = "; ".join(f"{name} {i.value:.1f} [{i.low:.1f}, {i.high:.1f}]" for name, _, i in d.rows)
    parts = [_open(width, height, "chart", f"{d.title}: {said}")]
    parts.append(f'<text class="title" x="{left}" y="16">{escape(d.title)}</text>')
    at = next(t for n in (3, 4, 5, 6) if len(t := ticks(low, high, n)) > 1 or n == 6)  # one number is no scale
    for x, text in zip(at, number_labels(at), strict=True):
        parts.append(f'<path class="grid" d="M{px(x)} {TOP}V{height - 22}"/>')
        parts.append(f'<text x="{px(x)}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for row, (name, style, i) in enumerate(d.rows):
        y = TOP + ROW * (row + 0.68)
        text = f"{name}: {i.value:.1f} [{i.low:.1f}, {i.high:.1f}]"
        parts.append(
            f'<g class="series {classes(style)}"><title>{escape(text)}</title>'
            f'<text x="{left}" y="{_n(y - 9)}">{escape(_clip(name, 30))}</text>'
            f'<path class="whisker" d="M{px(i.low)} {_n(y)}H{px(i.high)}"/>'
            f'<circle class="dot" cx="{px(i.value)}" cy="{_n(y)}" r="4.5"/></g>'
        )
    return "".join([*parts, "</svg>"])


# --------------------------------------------------------------------------------------------------------------- sheet
def sheet(panels: Sequence[Panel], legend: Sequence[tuple[str, int]]) -> str:
    """A file of its own: the panels side by side, up to three in a row, with a legend below."""
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    rows = _legend_rows(legend, across * WIDTH)
    width, height = across * WIDTH, down * HEIGHT + 24 * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'class="chart" role="img"><style>{style_sheet()}.paper{{fill:#fff}}'
        "@media (prefers-color-scheme:dark){.paper{fill:#16181c}}</style>"
        f'<rect class="paper" width="{width}" height="{height}"/>'
    ]
    for i, p in enumerate(panels):
        x, y = i % across * WIDTH, i // across * HEIGHT
        parts.append(panel(p).replace("<svg ", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    for r, row in enumerate(rows):
        y = down * HEIGHT + 24 * r + 14
        for x, name, style in row:
            parts.append(
                f'<g class="series {classes(style)}"><path class="mean" d="M{x} {y}h24"/>'
                f'<text x="{x + 30}" y="{y}" dy=".33em">{escape(name)}</text></g>'
            )
    return "".join([*parts, "</svg>\n"])


def _legend_rows(legend: Sequence[tuple[str, int]], width: int) -> list[list[tuple[int, str, int]]]:
    rows: list[list[tuple[int, str, int]]] = [[]]
    x = LEFT
    for name, style in legend:
        need = 52 + 7 * len(name)
        if rows[-1] and x + need > width:
            rows.append([])
            x = LEFT
        rows[-1].append((x, name, style))
        x += need
    return rows


# --------------------------------------------------------------------------------------------------------------- parts
def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number_labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """Short, with one unit for all: 200k, 1M, 0.25."""
    if percent:
        return [f"{100 * v:.0f}%" for v in values]
    largest = max(map(abs, values), default=0.0)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if largest >= size:
            size = 1e3 if unit == "k" else size
            return ["0" if v == 0 else f"{v / size:g}{unit}" for v in values]
    return [f"{v:g}".replace("-", "−") for v in values]


def _open(width: int, height: int, kind: str, label: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        'preserveAspectRatio="xMinYMin meet">'
    )


def _path(x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _n(x: float) -> str:
    return f"{x:.1f}".rstrip("0").rstrip(".")


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
