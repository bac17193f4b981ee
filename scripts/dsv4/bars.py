"""Bar charts as SVG text, without a plotting library."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

# A reader's dark page gets a dark picture.
STYLE = (
    "text{fill:#222} .paper{fill:#fff} "
    "@media (prefers-color-scheme:dark){text{fill:#ddd} .paper{fill:#0d1117}}"
)
WIDTH, ROW, LABEL, BAR, MARGIN = 640, 22, 210, 330, 14


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, how long it is, and the number as it shall stand behind it."""

    name: str
    value: float
    text: str


def bars(charts: list[tuple[str, list[Bar]]]) -> str:
    """Charts (title, bars) one below the other, each with a scale of its own from 0."""
    y, parts = MARGIN, []
    for title, rows in charts:
        longest = max((bar.value for bar in rows), default=0) or 1
        parts.append(_text(MARGIN, y + 15, title, "bold"))
        y += ROW + 4
        for bar in rows:
            length = max(BAR * bar.value / longest, 1)
            parts.append(_text(MARGIN, y + 15, bar.name))
            parts.append(
                f'<rect x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{ROW - 7}" '
                'fill="#4a8fd0"/>'
            )
            parts.append(_text(LABEL + length + 6, y + 15, bar.text))
            y += ROW
        y += MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="13">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="paper" width="{WIDTH}" height="{y}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}">{escape(text)}</text>'
