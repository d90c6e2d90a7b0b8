"""The same charts as a PNG, drawn by matplotlib (extra `plots`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlctl.errors import UsageError
from rlctl.report.charts import DASHES, PALETTE, Dots, Panel
from rlctl.report.svg import MAX_MEMBERS, number_labels


def write_png(file: Path, panels: Sequence[Panel | Dots], legend: Sequence[tuple[str, int]], title: str = "") -> None:
    """Panels in rows of three with one legend below. UsageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UsageError("PNG needs matplotlib: pip install 'rlctl[plots]', or write .svg, which needs nothing") from e
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    names = math.ceil(len(legend) / (2 * across))
    figure = Figure(figsize=(4.3 * across, 3.0 * down + 0.25 * names + 0.3 * bool(title)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, p in zip(axes, panels, strict=False):
        if isinstance(p, Panel):
            _panel(ax, p)
        else:
            _dots(ax, p)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **_look(style)) for name, style in legend]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * across, frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=150)


def _look(style: int) -> dict[str, Any]:
    dash = DASHES[style // len(PALETTE) % len(DASHES)]
    pattern: Any = (0, tuple(float(x) for x in dash.split())) if dash else "-"
    return {"color": PALETTE[style % len(PALETTE)][0], "linestyle": pattern, "linewidth": 1.6}


def _panel(ax: Any, p: Panel) -> None:
    from matplotlib.ticker import FuncFormatter

    for line in p.lines:
        look = _look(line.style)
        if line.low is not None and line.high is not None:
            ax.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.17, linewidth=0)
        elif 1 < len(line.members) <= MAX_MEMBERS:
            for x, y in line.members:
                ax.plot(x, y, color=look["color"], alpha=0.4, linewidth=0.7)
        ax.plot(line.x, line.y, marker="o" if len(line.x) == 1 else "", markersize=4, **look)
    ax.set_title(p.title, fontsize=9, fontweight="bold", loc="left")
    ax.set_xlabel(p.x_label, fontsize=8)
    ax.set_ylabel(p.y_label, fontsize=8)
    if p.y_range:
        ax.set_ylim(*p.y_range)
    largest = max(float(line.x.max()) for line in p.lines)
    unit = number_labels([largest])[0][-1]
    size = {"k": 1e3, "M": 1e6, "G": 1e9}.get(unit)
    if size is not None:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == 0 else f"{v / size:g}{unit}"))
    if p.percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}%"))
    _frame(ax)


def _dots(ax: Any, d: Dots) -> None:
    for row, (_, style, i) in enumerate(d.rows):
        colour = PALETTE[style % len(PALETTE)][0]
        ax.plot([i.low, i.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
        ax.plot([i.value], [row], "o", color=colour, markersize=6)
    ax.set_yticks(range(len(d.rows)), [name for name, *_ in d.rows], fontsize=8)
    ax.set_ylim(len(d.rows) - 0.5, -0.5)
    ax.set_title(d.title, fontsize=9, fontweight="bold", loc="left")
    _frame(ax)


def _frame(ax: Any) -> None:
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.2)
    ax.spines[["top", "right"]].set_visible(False)
