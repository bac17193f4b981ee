"""Draw curves as SVG with matplotlib."""

from __future__ import annotations

import io

# A dark background where the reader's pages are dark: the picture itself is transparent.
DARK = "<style>@media (prefers-color-scheme:dark){svg{background:#0d1117} text{fill:#ddd}}</style>"
# Text stays text. The same picture has the same bytes.
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "fixed", "font.size": 9}

Point = tuple[float, float, str]  # x, y, name


def draw_curves(
    curves: dict[str, list[Point]], marks: dict[str, float], axes_names: tuple[str, str]
) -> str:
    """Return an SVG of curves by name; y is logarithmic. marks: name → x of a vertical line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            x, y, names = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", label=name, markersize=4)
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
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    head, _, body = out.getvalue().partition("<defs>")
    return f"{head}{DARK}<defs>{body}"
