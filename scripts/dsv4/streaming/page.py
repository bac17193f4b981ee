"""The result of an evaluation as one HTML page: the tables, and two pictures.

The page needs nothing else, and its pictures take the colour of a dark page. The layout stands in
page.html.j2, which escapes every value.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.words import plain

TEMPLATE = Path(__file__).with_name("page.html.j2")
INK = "#010203"  # stands for the page's own colour of text until the picture is in the page
SHOWN = 200  # characters of a value


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    from jinja2 import Environment  # here: importing it takes longer than a page

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    bundles = result["bundles"]
    layers = zip(*(b["error_by_layer"] for b in bundles), strict=True)
    return template.render(
        result=result, name=Path(result["source"]).name, bundles=bundles, layers=list(layers),
        pictures=[error_picture(bundles), kl_picture(bundles)],
    )  # fmt: skip


def visible(value: Any) -> Any:
    """What the page shows of a value: text made plain; jinja2 then escapes it for HTML."""
    return plain(value, SHOWN) if type(value) is str else value


def label(bundle: dict[str, Any]) -> str:
    return plain(f"{bundle['name']} on {bundle['device']}", 40)


def error_picture(bundles: list[dict[str, Any]]) -> str:
    """Relative error of the hidden states after each layer, a line for each bundle."""

    def draw(axes: Any) -> None:
        for one in bundles:
            errors = one["error_by_layer"][1:]
            axes.plot(range(len(errors)), errors, marker=".", label=label(one))
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error")

    return picture(draw)


def kl_picture(bundles: list[dict[str, Any]]) -> str:
    """KL divergence at each token, a dot for each; what is below 1e-12 lies there."""

    def draw(axes: Any) -> None:
        for one in bundles:
            values = [max(kl, 1e-12) for kl in one["kl_by_token"]]
            axes.plot(range(len(values)), values, ".", markersize=2, label=label(one))
        axes.set_xlabel("token")
        axes.set_ylabel("KL (nats)")

    return picture(draw)


def picture(draw: Callable[[Any], None]) -> str:
    """An SVG without a size of its own, so that it fits a narrow window; logarithmic."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(inks, INK) | {"svg.fonttype": "none", "svg.hashsalt": "fixed"}
    settings |= {"text.parse_math": False, "font.size": 9, "legend.frameon": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5, 2.8), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_yscale("log", nonpositive="clip")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    _, _, body = out.getvalue().partition("<defs>")
    return f"<defs>{body}".replace(INK, "currentColor").replace("</svg>", "").strip()
