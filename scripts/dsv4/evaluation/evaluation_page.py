"""The result of an evaluation as one HTML page: the tables, and two pictures.

The page needs nothing else, and its pictures take the colour of a dark page. The layout stands in
evaluation_page.html.j2, which escapes every value.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from dsv4.text import escape_line, render_html

TEMPLATE = Path(__file__).with_name("evaluation_page.html.j2")
INK = "#010203"  # stands for the page's own colour of text until the picture is in the page
SHOWN = 200  # characters of a value
LEAST = 1e-9  # what is less lies there in a picture: nothing to float32


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    bundles = result["bundles"]
    layers = zip(*(b["error_by_layer"] for b in bundles), strict=True)
    return render_html(
        TEMPLATE, SHOWN,
        result=result, name=Path(result["source"]).name, bundles=bundles, layers=list(layers),
        pictures=[error_picture(bundles), kl_picture(bundles)],
    )  # fmt: skip


def label(bundle: dict[str, Any]) -> str:
    return escape_line(f"{bundle['name']} on {bundle['device']}", 40)


def error_picture(bundles: list[dict[str, Any]]) -> str:
    """Relative error of the hidden states after each layer, a line for each bundle."""
    lines = [(label(one), one["error_by_layer"][1:]) for one in bundles]
    return picture(lines, ".-", "layer", "relative error")


def kl_picture(bundles: list[dict[str, Any]]) -> str:
    """KL divergence at each token, a dot for each."""
    lines = [(label(one), one["kl_by_token"]) for one in bundles]
    return picture(lines, ".", "token", "KL (nats)")


def picture(lines: list[tuple[str, list[float]]], marks: str, x: str, y: str) -> str:
    """What goes into an SVG of 360 × 201.6, logarithmic in y, over whole powers of ten."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(inks, INK) | {"svg.fonttype": "none", "svg.hashsalt": y}
    settings |= {"text.parse_math": False, "font.size": 9, "legend.frameon": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5, 2.8), layout="constrained")
        axes = figure.subplots()
        for name, values in lines:
            axes.plot([max(value, LEAST) for value in values], marks, label=name, markersize=2)
        axes.set(xlabel=x, ylabel=y, yscale="log", ylim=decades(lines))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper left", fontsize=7, markerscale=3)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    _, _, body = out.getvalue().partition("<defs>")
    return f"<defs>{body}".replace(INK, "currentColor").replace("</svg>", "").strip()


def decades(lines: list[tuple[str, list[float]]]) -> tuple[float, float]:
    """The powers of ten around all values."""
    every = [max(value, LEAST) for _, values in lines for value in values]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    return 10.0**low, 10.0 ** max(high, low + 1)
