"""Bars and curves as SVG, drawn by matplotlib."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

# A reader's dark page gets a dark picture; matplotlib draws in black on nothing.
DARK = "<style>@media (prefers-color-scheme:dark){svg{background:#0d1117} text{fill:#ddd}}</style>"
# The text stays text, and the same picture has the same bytes.
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "fixed", "font.size": 9}


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, how long it is, and the number as it shall stand behind it."""

    name: str
    value: float
    text: str


def as_svg(figure: Any) -> str:
    """A figure of matplotlib as text, for pages light and dark."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    head, _, body = out.getvalue().partition("<defs>")
    return f"{head}{DARK}<defs>{body}"


def bars(charts: list[tuple[str, list[Bar]]]) -> str:
    """Charts (title, bars) one below the other, each with a scale of its own from 0."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [len(chart) for _, chart in charts]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 0.24 * sum(rows) + 0.5 * len(rows)), layout="constrained")
        parts = figure.subplots(len(charts), height_ratios=[n + 1 for n in rows], squeeze=False)
        for axes, (title, chart) in zip(parts[:, 0], charts, strict=True):
            drawn = axes.barh([bar.name for bar in chart], [bar.value for bar in chart])
            axes.bar_label(drawn, [bar.text for bar in chart], padding=4)
            axes.set_title(title, loc="left", fontweight="bold", fontsize=9)
            axes.set_xlim(0, 1.3 * max((bar.value for bar in chart), default=1) or 1)
            axes.invert_yaxis()
            axes.set_xticks([])
            axes.spines[:].set_visible(False)
            axes.tick_params(left=False)
        return as_svg(figure)


@dataclass(frozen=True)
class Curve:
    """Points (x, y, name) of one kind; joined by a line, if they belong together."""

    name: str
    points: list[tuple[float, float, str]]
    joined: bool = True


def curves(some: list[Curve], marks: dict[str, float], axes_names: tuple[str, str]) -> str:
    """Curves over one axis, y by powers of ten; marks: name → x of an upright line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for curve in filter(lambda one: one.points, some):
            x, y, names = zip(*sorted(curve.points), strict=True)
            axes.plot(x, y, "o-" if curve.joined else "o", label=curve.name, markersize=4)
            for point in zip(x, y, names, strict=True):
                axes.annotate(point[2], point[:2], (4, 3), textcoords="offset points", fontsize=7)
        for name, x in marks.items():
            axes.axvline(x, linestyle=":", linewidth=1, color="gray")
            axes.annotate(name, (x, 0.02), (2, 0), xycoords=("data", "axes fraction"),
                          textcoords="offset points", rotation=90, fontsize=7)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)
