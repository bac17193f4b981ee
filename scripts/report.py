"""Turn verify.json into one HTML page that can be put beside a published bundle.

The page needs nothing else: no script, no font, no picture from elsewhere. It shows the verdict,
what was checked and how much of it, the routed experts' error by layer and projection as a drawing,
sizes, the source's revision, the toolchain's versions, and the SHA-256 of every file that the
verdict is about.

    .venv/bin/python scripts/report.py --json build/KEY/verify.json --out build/KEY/verify.html
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from dsv4.checkpoint import read_json
from dsv4.durable import human, write_bytes
from dsv4.stop import Stop, run
from verify import FORMAT

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The drawing, in pixels.
LEFT, RIGHT, PANEL, GAP, TOP, BOTTOM = 64, 16, 110, 34, 22, 40

STYLE = """
:root { color-scheme: light dark; --bar: #3b6ea5; --worst: #c0562b; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { padding: .6rem 1rem; border-left: .5rem solid; font-weight: 600; }
.passed { border-color: #2e7d32; } .failed { border-color: #c62828; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
         border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .85em; overflow-wrap: anywhere; } summary { cursor: pointer; margin: .5rem 0; }
.scroll { overflow-x: auto; } svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
.mark { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
@media print { details:not([open]) { display: none; } }
"""


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """An HTML table; whole numbers and percentages stand on the right."""
    out = ["<div class=scroll><table><tr>", *(f"<th>{escape(h)}" for h in head)]
    for row in rows:
        out.append("<tr>")
        for cell in row:
            text = f"{cell:,}" if isinstance(cell, int) else str(cell)
            numeric = isinstance(cell, int) or text.endswith("%")
            out.append(f"<td{' class=number' if numeric else ''}>{escape(text)}")
    return "".join([*out, "</table></div>"])


def pairs(values: dict[str, Any]) -> str:
    """A table of names and values, those that are known."""
    return table(("", ""), ((k, str(v)) for k, v in values.items() if v is not None))


def ticks(most: float) -> list[float]:
    """About four round numbers from 0 to `most` or just beyond.

    >>> ticks(0.087)
    [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    """
    if most <= 0:
        return [0.0, 0.01]
    power = 10.0 ** math.floor(math.log10(most / 2.5))
    step = max(power * factor for factor in (1, 2, 5) if power * factor <= most / 2.5)
    count = int(most / step) + 1
    return [round(i * step, 10) for i in range(count + 1)]


def drawing(cells: list[dict[str, Any]]) -> str:
    """The routed experts' relative RMS error: a panel for each projection, a bar for each layer.

    The bar is the error over all experts of the layer, the mark above it the worst single expert.
    """
    layers = sorted({(cell["block"], cell["layer"]) for cell in cells})
    by_place = {(cell["projection"], cell["block"], cell["layer"]): cell for cell in cells}
    marks = ticks(max(cell["worst_tensor_rms"] for cell in cells))
    pitch = max(14, min(40, 840 // (len(layers) + 2)))
    # MTP layers stand apart, by the width of one bar.
    left = {place: LEFT + pitch * (i + (place[0] == "mtp")) for i, place in enumerate(layers)}
    width = max(left.values()) + 2 * pitch + RIGHT
    height = TOP + len(PROJECTIONS) * (PANEL + GAP) + BOTTOM - GAP
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
             f'aria-label="relative RMS error by layer and projection">']  # fmt: skip
    for number, projection in enumerate(PROJECTIONS):
        base = TOP + number * (PANEL + GAP) + PANEL
        parts.append(axis(projection, base, width, marks))
        for place in layers:
            cell = by_place.get((projection, *place))
            if cell:
                parts.append(bar(cell, left[place], pitch, base, marks[-1]))
    every = max(1, 34 // pitch)
    for i, (block, layer) in enumerate(layers):
        if block == "mtp" or i % every == 0:
            text = f"{layer}" if block == "layers" else f"mtp {layer}"
            x, y = left[block, layer] + pitch / 2, height - BOTTOM + 16
            parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">layer</text></svg>')
    return "".join(parts)


def axis(projection: str, base: float, width: int, marks: list[float]) -> str:
    """A panel's title, grid lines and their percentages."""
    parts = [f'<text x="{LEFT}" y="{base - PANEL - 6}" font-weight="600">{projection}</text>']
    for mark in marks:
        y = base - PANEL * mark / marks[-1]
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                     f'stroke="var(--line)"/>')  # fmt: skip
        said = f"{100 * mark:.3g}%"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    return "".join(parts)


def bar(cell: dict[str, Any], x: float, pitch: float, base: float, top: float) -> str:
    """One layer's bar and its worst expert's mark; the numbers appear under the pointer."""
    height = PANEL * cell["relative_rms"] / top
    worst = base - PANEL * cell["worst_tensor_rms"] / top
    said = (f"{cell['block']} {cell['layer']} {cell['projection']}: {cell['relative_rms']:.3%}, "
            f"worst of {cell['tensors']} experts {cell['worst_tensor_rms']:.3%}")  # fmt: skip
    return (
        f'<g><title>{escape(said)}</title><rect x="{x + 2:.1f}" y="{base - height:.1f}" '
        f'width="{pitch - 4:.1f}" height="{height:.1f}" fill="var(--bar)"/>'
        f'<rect x="{x + 1:.1f}" y="{worst - 1:.1f}" width="{pitch - 2:.1f}" height="2" '
        f'fill="var(--worst)"/></g>'
    )


def verdict(result: dict[str, Any]) -> str:
    """The verdict in one sentence that says what it is about."""
    levels = "every number" if 2 in result["levels"] else "headers and JSON only"
    against = " against the FP4/FP8 source" if result["source"] and 2 in result["levels"] else ""
    asked = "" if result["loader_asked"] else "; the runtimes' loaders were not asked"
    word = "Passed" if result["verdict"] == "passed" else "Failed"
    said = f"{word}: {levels} checked{against}{asked}."
    return f"<p class='verdict {escape(result['verdict'])}'>{escape(said)}</p>"


def findings(result: dict[str, Any]) -> str:
    """What is wrong, why it matters and what repairs it; '' when nothing is."""
    if not result["findings"]:
        return ""
    parts = ["<h2>Found</h2>"]
    for one in result["findings"]:
        parts.append(f"<p><b>{escape(one['name'])}</b> ({escape(one['severity'])}, "
                     f"{one['count']:,}×): {escape(one['why'])}<br>Repair: "
                     f"<code>{escape(one['repair'])}</code></p>")  # fmt: skip
        rows = ((p["where"], p["found"], p["expected"]) for p in one["places"])
        parts.append(table(("where", "found", "expected"), rows))
    return "".join(parts)


def checks(result: dict[str, Any]) -> str:
    """What was looked at, and how much of it."""
    rows = (
        (one["number"], one["what"], "; ".join(n for n in (one["note"], one["worst"]) if n))
        for one in result["checks"]
    )
    return "<h2>Checked</h2>" + table(("number", "what", ""), rows)


def errors(result: dict[str, Any]) -> str:
    """The experts' errors as a drawing and a table, then the other tensors."""
    cells = result["errors"].get("experts") or []
    if not cells:
        return "<h2>Error</h2><p>Not measured: level 2 with the source measures it.</p>"
    head = ("block", "layer", "projection", "experts", "relative RMS", "worst expert", "groups",
            "as expected", "zeros lost")  # fmt: skip
    rows = (
        (c["block"], c["layer"], c["projection"], c["tensors"], f"{c['relative_rms']:.3%}",
         f"{c['worst_tensor_rms']:.3%}", c["groups"], c["groups_as_expected"], c["zeros_lost"])
        for c in cells
    )  # fmt: skip
    others = result["errors"].get("others") or []
    worst = sorted(others, key=lambda o: -o["relative_rms"])
    more = ((o["name"], o["what"], o["stored_as"], o["numbers"], f"{o['relative_rms']:.3%}")
            for o in worst)  # fmt: skip
    return "".join([
        "<h2>Error of the routed experts, relative RMS</h2>",
        "<p><span class=mark style='background:var(--bar)'></span>all experts of a layer ",
        "<span class=mark style='background:var(--worst)'></span>its worst expert</p>",
        f"<div class=scroll>{drawing(cells)}</div>",
        "<details><summary>The same as a table</summary>", table(head, rows), "</details>",
        f"<details><summary>The other {len(others):,} tensors</summary>",
        table(("tensor", "what", "stored as", "numbers", "relative RMS"), more), "</details>",
    ])  # fmt: skip


def sizes(result: dict[str, Any]) -> str:
    """Bytes by kind, of the bundle and the source."""
    known = result["sizes"]
    if not known:
        return ""
    rows = [(kind, human(size)) for kind, size in known["by_kind"].items()]
    rows.append(("all files of the bundle", human(known["bundle_bytes"])))
    if known["source_shard_bytes"]:
        rows.append(("shards of the source", human(known["source_shard_bytes"])))
    rows.append(("tensors, shards", f"{known['tensors']:,}, {known['shards']:,}"))
    return "<h2>Sizes</h2>" + table(("", ""), rows)


def provenance(result: dict[str, Any]) -> str:
    """Source, quantizer, versions, time, and the files' hashes."""
    source = dict(result["source"] or {})
    source.pop("folder", None)
    mark = {k.removeprefix("requantize_"): v for k, v in result["quantizer"].items()}
    files = result["hashes"]
    parts = [
        "<h2>Source</h2>",
        pairs({"repository": source.get("repo"), "revision": source.get("revision"),
               "commit": source.get("commit") or "not recorded"}),
        "<h2>Made by</h2>",
        pairs({"quantizer": mark.get("quantizer") or "not recorded", "its table": mark.get("table"),
               "fingerprint of the source": mark.get("source")}),
        "<h2>Versions</h2>", pairs({**result["versions"], "verified": result["time"]}),
    ]  # fmt: skip
    if files:
        shown = ((name, digest) for name, digest in sorted(files.items()))
        parts += [f"<details><summary>SHA-256 of {len(files):,} files</summary>",
                  table(("file", "SHA-256"), shown), "</details>"]  # fmt: skip
    return "".join(parts)


def page(result: dict[str, Any]) -> str:
    """The whole page. Raises Stop for a verify.json of another format."""
    if result.get("format") != FORMAT:
        raise Stop("verify.json", f"format {result.get('format')}", f"{FORMAT}", "verify again")
    name = Path(result["bundle"]).name
    return "".join([
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(name)}, verified</title><style>{STYLE}</style>",
        f"<h1>{escape(name)}</h1>", verdict(result), findings(result), errors(result),
        checks(result), sizes(result), provenance(result), "</html>\n",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="what verify wrote")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    args = parser.parse_args()
    if not args.json.is_file():
        raise Stop(f"{args.json}", "no such file", "verify's result", "make verify")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(args.out, page(read_json(args.json)).encode())
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
