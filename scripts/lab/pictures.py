"""Bar charts as SVG, drawn by matplotlib."""

from __future__ import annotations

import io
from dataclasses import dataclass

# A reader's dark page gets a dark picture; matplotlib draws in black on nothing.
DARK = "<style>@media (prefers-color-scheme:dark){svg{background:#0d1117} text{fill:#ddd}}</style>"


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, how long it is, and the number as it shall stand behind it."""

    name: str
    value: float
    text: str


def bars(charts: list[tuple[str, list[Bar]]]) -> str:
    """Charts (title, bars) one below the other, each with a scale of its own from 0."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [len(chart) for _, chart in charts]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "fixed", "font.size": 9}
    with mpl.rc_context(settings):
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
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    head, _, body = out.getvalue().partition("<defs>")
    return f"{head}{DARK}<defs>{body}"
