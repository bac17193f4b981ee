"""What accept found as one HTML page that needs nothing else.

The layout stands in acceptance_page.html.j2, which escapes every value; here is what it is filled
with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.storage.atomic import format_bytes
from dsv4.text import render_html

TEMPLATE = Path(__file__).with_name("acceptance_page.html.j2")
SHOWN = 2000  # characters of one value


def page(result: dict[str, Any]) -> str:
    """The whole page of what `accept` writes as JSON."""
    sides = [result["server"], *([result["against"]] if result["against"] else [])]
    return render_html(
        TEMPLATE, SHOWN,
        result=result, sides=sides, said=verdict(result), rows=rows(sides), speed=speeds(sides),
        drawings=speed_charts(sides), human=format_bytes,
    )  # fmt: skip


def verdict(result: dict[str, Any]) -> str:
    """The verdict in one sentence that says what it is about."""
    of = [one["verdict"] for one in result["server"]["cases"]]
    word = "Accepted" if result["verdict"] == "right" else "Not accepted"
    return (f"{word}: {of.count('right')} cases right, {of.count('wrong')} wrong, "
            f"{of.count('skipped')} skipped.")  # fmt: skip


def case_events(case: dict[str, Any], url: str) -> list[str]:
    """What came in a case, by what was sent, without the server's own address."""
    return [case_events.replace(url, "") for _, case_events in sorted(case["exchanges"])]


def sides_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True where two servers part: another verdict, or another answer to the same."""
    return one["verdict"] != other["verdict"] or one["came"] != other["came"]


def rows(sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A case each: both sides' outcomes, and whether they part.

    Needles beyond what one of them takes have no other side.
    """
    others = [{one["name"]: {**one, "came": case_events(one, side["url"])} for one in side["cases"]}
              for side in sides]  # fmt: skip
    found = []
    for case in sides[0]["cases"]:
        both = [other[case["name"]] for other in others if case["name"] in other]
        found.append({"case": case, "both": both, "parts": len(both) > 1 and sides_differ(*both)})
    return found


def _with_unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:,.3g} {unit}"


def matched_measurements(sides: list[dict[str, Any]]) -> list[tuple[dict[str, Any], ...]]:
    """The same measurement of each side; of one that was not measured an empty one."""
    longest = max((side["speed"] for side in sides), key=len)
    none = [{**one, "first": None, "rate": None, "why": "not measured"} for one in longest]
    return list(zip(*(side["speed"] or none for side in sides), strict=True))


def speeds(sides: list[dict[str, Any]]) -> list[tuple]:
    """A measurement each: prompt, requests at once, then time and rate of each side."""
    out = []
    for measured in matched_measurements(sides):
        about = measured[0]
        told = [(_with_unit(one["first"], "s"), _with_unit(one["rate"], "/s"), one["why"])
                for one in measured]  # fmt: skip
        out.append((about["prompt"], about["counted"], about["at_once"], told))
    return out


def speed_charts(sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two pictures: bars for the time to the first token, and for tokens a second."""
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
        said = f"{title}: " + "; ".join(f"{name}: {text}" for name, _, _, text in drawn)
        height = 22 * len(drawn) + 6
        out.append({"title": title, "bars": drawn, "height": height, "said": said})
    return [one for one in out if one["bars"]]
