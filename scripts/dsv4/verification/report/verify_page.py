"""Render verify.json as one HTML page, which can be published beside the bundle.

This module computes the values; verify_page.html.j2 is the template, which escapes each of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsv4.storage.atomic import format_bytes
from dsv4.text import render_html
from dsv4.verification.report.schema import validate_result

TEMPLATE = Path(__file__).with_name("verify_page.html.j2")
VALUE_LENGTH = 1000  # characters of one value
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The chart, in pixels.
LEFT, RIGHT, PANEL, GAP, TOP, BOTTOM = 64, 16, 110, 34, 22, 40


def page(result: dict[str, Any]) -> str:
    """Return the page. Raises UserError for a verify.json of another format or with wrong types."""
    validate_result(result)
    cells = result["errors"].get("experts") or []
    return render_html(
        TEMPLATE, VALUE_LENGTH,
        result=result, name=Path(result["bundle"]).name, verdict=verdict_sentence(result),
        finding_rows=finding_rows, chart=error_chart(cells) if cells else None,
        experts=expert_rows(cells), others=other_rows(result), kinds=kind_rows(result),
        checks=check_rows(result), sizes=size_rows(result), **provenance_rows(result),
    )  # fmt: skip


def verdict_sentence(result: dict[str, Any]) -> str:
    """Return the verdict and what was checked, in one sentence."""
    levels = "every number" if 2 in result["levels"] else "headers and JSON only"
    against = " against the FP4/FP8 source" if result["source"] and 2 in result["levels"] else ""
    loaders = "" if result["loader_asked"] else "; the runtimes' loaders were not run"
    verdict = "Passed" if result["verdict"] == "passed" else "Failed"
    return f"{verdict}: {levels} checked{against}{loaders}."


def finding_rows(finding: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of one finding's table."""
    return [(p["where"], p["found"], p["expected"]) for p in finding["places"]]


def axis_ticks(most: float) -> list[float]:
    """Return about four round numbers from 0 to `most` or just beyond.

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
    """Return the chart of the experts' relative RMS error: a panel a projection, a bar a layer.

    The bar is the error over all experts of the layer, the line above it the worst single expert.
    """
    layers = sorted({(cell["block"], cell["layer"]) for cell in cells})
    ticks = axis_ticks(max(cell["worst_tensor_rms"] for cell in cells))
    pitch = max(14, min(40, 840 // (len(layers) + 2)))
    # A gap of one bar separates the MTP layers.
    left = {key: LEFT + pitch * (i + (key[0] == "mtp")) for i, key in enumerate(layers)}
    width = max(left.values()) + 2 * pitch + RIGHT
    every = max(1, 34 // pitch)
    return {
        "width": width,
        "height": TOP + len(PROJECTIONS) * (PANEL + GAP) + BOTTOM - GAP,
        "left": LEFT,
        "right": width - RIGHT,
        "pitch": pitch,
        "panels": [chart_panel(number, name, cells, left, ticks)
                   for number, name in enumerate(PROJECTIONS)],
        "names": [
            (left[block, layer] + pitch / 2, f"{layer}" if block == "layers" else f"mtp {layer}")
            for i, (block, layer) in enumerate(layers)
            if block == "mtp" or i % every == 0
        ],
    }  # fmt: skip


def chart_panel(
    number: int,
    projection: str,
    cells: list[dict[str, Any]],
    left: dict[tuple[str, int], int],
    ticks: list[float],
) -> dict[str, Any]:
    """Return one projection's panel: grid lines with percentages, and a bar for each layer."""
    base, top = TOP + number * (PANEL + GAP) + PANEL, ticks[-1]
    own = [cell for cell in cells if cell["projection"] == projection]
    return {
        "name": projection,
        "top": base - PANEL - 6,
        "grid": [(base - PANEL * tick / top, f"{100 * tick:.3g}%") for tick in ticks],
        "bars": [chart_bar(cell, left[cell["block"], cell["layer"]], base, top) for cell in own],
    }


def chart_bar(cell: dict[str, Any], x: float, base: float, top: float) -> dict[str, Any]:
    """Return one layer's bar, the line of its worst expert, and their numbers as a tooltip."""
    height = round(PANEL * cell["relative_rms"] / top, 1)
    tooltip = (f"{cell['block']} {cell['layer']} {cell['projection']}: {cell['relative_rms']:.3%}, "
            f"worst of {cell['tensors']} experts {cell['worst_tensor_rms']:.3%}")  # fmt: skip
    worst = round(base - PANEL * cell["worst_tensor_rms"] / top - 1, 1)
    return {"tooltip": tooltip, "x": x, "y": base - height, "height": height, "worst": worst}


def expert_rows(cells: list[dict[str, Any]]) -> list[tuple]:
    """Return the chart's numbers as a table."""
    return [
        (c["block"], c["layer"], c["projection"], c["tensors"], f"{c['relative_rms']:.3%}",
         f"{c['worst_tensor_rms']:.3%}", c["groups"], c["groups_as_expected"], c["zeros_lost"])
        for c in cells
    ]  # fmt: skip


def other_rows(result: dict[str, Any]) -> list[tuple]:
    """Return the rows of everything but routed experts, the largest error first."""
    found = sorted(result["errors"].get("others") or [], key=lambda o: -o["relative_rms"])
    return [(o["name"], o["what"], o["stored_as"], o["numbers"], f"{o['relative_rms']:.3%}")
            for o in found]  # fmt: skip


def kind_rows(result: dict[str, Any]) -> list[tuple]:
    """Return the error of each kind of tensor, the largest first."""
    return [
        (row["kind"], row["tensors"], row["stored_as"], f"{row['relative_rms']:.3%}",
         f"{row['worst_tensor_rms']:.3%}", row["worst_tensor"],
         f"{row['groups_exact'] / row['groups']:.1%}" if row["groups"] else "")
        for row in result["errors"].get("kinds") or []
    ]  # fmt: skip


def check_rows(result: dict[str, Any]) -> list[tuple]:
    """Return the checks: number of items, what they are, notes."""
    return [
        (one["number"], one["what"], "; ".join(n for n in (one["note"], one["worst"]) if n))
        for one in result["checks"]
    ]


def size_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return bytes by kind, of the bundle and of the source; [] when they are unknown."""
    sizes = result["sizes"]
    if not sizes:
        return []
    rows = [(kind, format_bytes(size)) for kind, size in sizes["by_kind"].items()]
    rows.append(("all files of the bundle", format_bytes(sizes["bundle_bytes"])))
    if sizes["source_shard_bytes"]:
        rows.append(("shards of the source", format_bytes(sizes["source_shard_bytes"])))
    return [*rows, ("tensors, shards", f"{sizes['tensors']:,}, {sizes['shards']:,}")]


def provenance_rows(result: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """Return source, quantizer, versions and time, each as pairs of a name and its value."""
    source = result["source"] or {}
    record = {k.removeprefix("requantize_"): v for k, v in result["quantizer"].items()}
    return {
        "source": [("repository", source.get("repo")), ("revision", source.get("revision")),
                   ("commit", source.get("commit") or "not recorded")],
        "made_by": [("layout", result.get("layout") or None),
                    ("quantizer", record.get("quantizer") or "not recorded"),
                    ("its table", record.get("table")),
                    ("fingerprint of the source", record.get("source"))],
        "versions": [*result["versions"].items(), ("verified", result["time"])],
    }  # fmt: skip
