"""verify.json as one HTML page that can be put beside a published bundle.

The layout stands in verify_page.html.j2, which escapes every value; here is what it is filled with.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsv4.storage.atomic import format_bytes
from dsv4.text import render_html
from dsv4.verification.report.schema import validate_result

TEMPLATE = Path(__file__).with_name("verify_page.html.j2")
SHOWN = 1000  # characters of one value
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The drawing, in pixels.
LEFT, RIGHT, PANEL, GAP, TOP, BOTTOM = 64, 16, 110, 34, 22, 40


def page(result: dict[str, Any]) -> str:
    """The whole page. Raises UserError for a verify.json of another format, or of other types."""
    validate_result(result)
    cells = result["errors"].get("experts") or []
    return render_html(
        TEMPLATE, SHOWN,
        result=result, name=Path(result["bundle"]).name, said=verdict_sentence(result),
        places=finding_rows, drawing=error_chart(cells) if cells else None,
        experts=expert_rows(cells), others=other_rows(result), kinds=kind_rows(result),
        checks=check_rows(result), sizes=size_rows(result), **provenance_rows(result),
    )  # fmt: skip


def verdict_sentence(result: dict[str, Any]) -> str:
    """The verdict in one sentence that says what it is about."""
    levels = "every number" if 2 in result["levels"] else "headers and JSON only"
    against = " against the FP4/FP8 source" if result["source"] and 2 in result["levels"] else ""
    asked = "" if result["loader_asked"] else "; the runtimes' loaders were not asked"
    word = "Passed" if result["verdict"] == "passed" else "Failed"
    return f"{word}: {levels} checked{against}{asked}."


def finding_rows(finding: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of one finding's table."""
    return [(p["where"], p["found"], p["expected"]) for p in finding["places"]]


def axis_ticks(most: float) -> list[float]:
    """About four round numbers from 0 to `most` or just beyond.

    >>> axis_ticks(0.087)
    [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    """
    if most <= 0:
        return [0.0, 0.01]
    power = 10.0 ** math.floor(math.log10(most / 2.5))
    step = max(power * factor for factor in (1, 2, 5) if power * factor <= most / 2.5)
    count = int(most / step) + 1
    return [round(i * step, 10) for i in range(count + 1)]


def error_chart(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The experts' relative RMS error: a panel for each projection, a bar for each layer.

    The bar is the error over all experts of the layer, the mark above it the worst single expert.
    """
    layers = sorted({(cell["block"], cell["layer"]) for cell in cells})
    marks = axis_ticks(max(cell["worst_tensor_rms"] for cell in cells))
    pitch = max(14, min(40, 840 // (len(layers) + 2)))
    # MTP layers stand apart, by the width of one bar.
    left = {place: LEFT + pitch * (i + (place[0] == "mtp")) for i, place in enumerate(layers)}
    width = max(left.values()) + 2 * pitch + RIGHT
    every = max(1, 34 // pitch)
    return {
        "width": width,
        "height": TOP + len(PROJECTIONS) * (PANEL + GAP) + BOTTOM - GAP,
        "left": LEFT,
        "right": width - RIGHT,
        "pitch": pitch,
        "panels": [chart_panel(number, name, cells, left, marks)
                   for number, name in enumerate(PROJECTIONS)],
        "names": [
            (left[place] + pitch / 2, f"{place[1]}" if place[0] == "layers" else f"mtp {place[1]}")
            for i, place in enumerate(layers)
            if place[0] == "mtp" or i % every == 0
        ],
    }  # fmt: skip


def chart_panel(
    number: int,
    projection: str,
    cells: list[dict[str, Any]],
    left: dict[tuple[str, int], int],
    marks: list[float],
) -> dict[str, Any]:
    """One projection: grid lines with their percentages, and a bar for each layer."""
    base, top = TOP + number * (PANEL + GAP) + PANEL, marks[-1]
    mine = [cell for cell in cells if cell["projection"] == projection]
    return {
        "name": projection,
        "top": base - PANEL - 6,
        "grid": [(base - PANEL * mark / top, f"{100 * mark:.3g}%") for mark in marks],
        "bars": [chart_bar(cell, left[cell["block"], cell["layer"]], base, top) for cell in mine],
    }


def chart_bar(cell: dict[str, Any], x: float, base: float, top: float) -> dict[str, Any]:
    """One layer's bar and its worst expert's mark; the numbers appear under the pointer."""
    height = round(PANEL * cell["relative_rms"] / top, 1)
    said = (f"{cell['block']} {cell['layer']} {cell['projection']}: {cell['relative_rms']:.3%}, "
            f"worst of {cell['tensors']} experts {cell['worst_tensor_rms']:.3%}")  # fmt: skip
    worst = round(base - PANEL * cell["worst_tensor_rms"] / top - 1, 1)
    return {"said": said, "x": x, "y": base - height, "height": height, "worst": worst}


def expert_rows(cells: list[dict[str, Any]]) -> list[tuple]:
    """The drawing's numbers as a table."""
    return [
        (c["block"], c["layer"], c["projection"], c["tensors"], f"{c['relative_rms']:.3%}",
         f"{c['worst_tensor_rms']:.3%}", c["groups"], c["groups_as_expected"], c["zeros_lost"])
        for c in cells
    ]  # fmt: skip


def other_rows(result: dict[str, Any]) -> list[tuple]:
    """Everything but routed experts, the worst first."""
    found = sorted(result["errors"].get("others") or [], key=lambda o: -o["relative_rms"])
    return [(o["name"], o["what"], o["stored_as"], o["numbers"], f"{o['relative_rms']:.3%}")
            for o in found]  # fmt: skip


def kind_rows(result: dict[str, Any]) -> list[tuple]:
    """How exact each kind of tensor is, the least exact first."""
    return [
        (row["kind"], row["tensors"], row["stored_as"], f"{row['relative_rms']:.3%}",
         f"{row['worst_tensor_rms']:.3%}", row["worst_tensor"],
         f"{row['groups_exact'] / row['groups']:.1%}" if row["groups"] else "")
        for row in result["errors"].get("kinds") or []
    ]  # fmt: skip


def check_rows(result: dict[str, Any]) -> list[tuple]:
    """What was looked at, and how much of it."""
    return [
        (one["number"], one["what"], "; ".join(n for n in (one["note"], one["worst"]) if n))
        for one in result["checks"]
    ]


def size_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Bytes by kind, of the bundle and the source; [] when they are not known."""
    known = result["sizes"]
    if not known:
        return []
    rows = [(kind, format_bytes(size)) for kind, size in known["by_kind"].items()]
    rows.append(("all files of the bundle", format_bytes(known["bundle_bytes"])))
    if known["source_shard_bytes"]:
        rows.append(("shards of the source", format_bytes(known["source_shard_bytes"])))
    return [*rows, ("tensors, shards", f"{known['tensors']:,}, {known['shards']:,}")]


def provenance_rows(result: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """Source, quantizer, versions and time, as pairs of a name and what is known."""
    source = result["source"] or {}
    mark = {k.removeprefix("requantize_"): v for k, v in result["quantizer"].items()}
    return {
        "source": [("repository", source.get("repo")), ("revision", source.get("revision")),
                   ("commit", source.get("commit") or "not recorded")],
        "made_by": [("layout", result.get("layout") or None),
                    ("quantizer", mark.get("quantizer") or "not recorded"),
                    ("its table", mark.get("table")),
                    ("fingerprint of the source", mark.get("source"))],
        "versions": [*result["versions"].items(), ("verified", result["time"])],
    }  # fmt: skip
