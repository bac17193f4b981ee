"""Render the result of accept as one self-contained HTML page.

The template acceptance_page.html.j2 escapes every value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.storage.atomic import format_bytes
from dsv4.text import render_html

TEMPLATE = Path(__file__).with_name("acceptance_page.html.j2")
SHOWN = 2000  # characters of one value


def page(result: dict[str, Any]) -> str:
    """Return the page for a result of accept."""
    sides = [result["server"], *([result["against"]] if result["against"] else [])]
    return render_html(
        TEMPLATE, SHOWN,
        result=result, sides=sides, verdict=verdict(result), rows=rows(sides), speed=speeds(sides),
        drawings=speed_charts(sides), human=format_bytes,
    )  # fmt: skip


def verdict(result: dict[str, Any]) -> str:
    """Return the verdict with the number of cases in one sentence."""
    verdicts = [case["verdict"] for case in result["server"]["cases"]]
    word = "Accepted" if result["verdict"] == "right" else "Not accepted"
    return (f"{word}: {verdicts.count('right')} cases right, {verdicts.count('wrong')} wrong, "
            f"{verdicts.count('skipped')} skipped.")  # fmt: skip


def responses(case: dict[str, Any], url: str) -> list[str]:
    """Return a case's responses in the order of its requests, without the server's URL."""
    return [response.replace(url, "") for _, response in sorted(case["exchanges"])]


def sides_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True when verdict or responses of two servers differ."""
    return one["verdict"] != other["verdict"] or one["responses"] != other["responses"]


def rows(sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each case: the results of both sides, and whether they differ.

    Needles beyond the context of one side have one result.
    """
    by_name = [
        {
            case["name"]: {**case, "responses": responses(case, side["url"])}
            for case in side["cases"]
        }
        for side in sides
    ]
    found = []
    for case in sides[0]["cases"]:
        both = [cases[case["name"]] for cases in by_name if case["name"] in cases]
        found.append({"case": case, "both": both, "differ": len(both) > 1 and sides_differ(*both)})
    return found


def _with_unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:,.3g} {unit}"


def matched_measurements(sides: list[dict[str, Any]]) -> list[tuple[dict[str, Any], ...]]:
    """Return tuples with the measurement of each side, an empty one where it was not measured."""
    longest = max((side["speed"] for side in sides), key=len)
    none = [{**one, "first": None, "rate": None, "why": "not measured"} for one in longest]
    return list(zip(*(side["speed"] or none for side in sides), strict=True))


def speeds(sides: list[dict[str, Any]]) -> list[tuple]:
    """Return (prompt, counted tokens, requests at once, time and rate of each side) tuples."""
    out = []
    for measured in matched_measurements(sides):
        prompt = measured[0]
        sides_measured = [(_with_unit(one["first"], "s"), _with_unit(one["rate"], "/s"), one["why"])
                for one in measured]  # fmt: skip
        out.append((prompt["prompt"], prompt["counted"], prompt["at_once"], sides_measured))
    return out


def speed_charts(sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return bar charts of the time to the first token and of tokens per second."""
    out = []
    for title, key, unit in (("Time to the first token", "first", "s"),
                             ("Tokens a second, all requests together", "rate", "/s")):  # fmt: skip
        bars = [
            (f"{one['prompt']:,} × {one['at_once']}", number, one[key])
            for measured in matched_measurements(sides)
            for number, one in enumerate(measured)
            if one[key] is not None
        ]
        most = max((value for _, _, value in bars), default=0) or 1
        drawn = [(name, side, round(210 * value / most, 1), _with_unit(value, unit))
                 for name, side, value in bars]  # fmt: skip
        label = f"{title}: " + "; ".join(f"{name}: {text}" for name, _, _, text in drawn)
        height = 22 * len(drawn) + 6
        out.append({"title": title, "bars": drawn, "height": height, "label": label})
    return [one for one in out if one["bars"]]
