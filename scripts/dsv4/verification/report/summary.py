"""A bundle in one row, by its headers: what it is, what it takes, who loads it, what is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from dsv4.storage.atomic import format_bytes
from dsv4.text import escape_line
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.checks.stored_formats import PARTS, label_at, shape_of
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

HEAD = ("bundle", "size", "layout", "bits a weight", "loaded by", "weights in memory", "faults")
# Kinds of matrix whose width a user asks for, by what their storage names hold.
KINDS = (
    ("experts", ".ffn.experts."), ("shared", ".shared_experts."), ("attention", ".attn.w"),
    ("embedding", "embed"), ("head", "head"),
)  # fmt: skip
WIDTH = 60  # characters of a cell


@dataclass(frozen=True)
class Row:
    """Cells in the order of HEAD."""

    cells: tuple[str, ...]


def summary_row(repo: str, size: int, bundle: Scan | None, findings: Findings) -> Row:
    """One bundle; size: bytes of all its files; without a scan, its faults alone."""
    faults = ", ".join(finding.name for finding in findings.errors) or "none"
    if bundle is None or not bundle.view.recognized.known:
        return Row((repo, format_bytes(size), "", "", "", "", faults))
    loads = [name for name, why in runtime_verdicts(bundle, findings).items() if not why]
    loaded = sum(t.nbytes for name, t in bundle.tensors.items() if not name.startswith("mtp."))
    named = "unknown" if "layout-unknown" in findings else bundle.scheme.name
    runtimes = ", ".join(loads) or "none known"
    bits, memory = bits_by_kind(bundle), format_bytes(loaded)
    return Row((repo, format_bytes(size), named, bits, runtimes, memory, faults))


def failed_row(repo: str, why: str) -> Row:
    """A bundle that could not be read at all."""
    return Row((repo, "", "", "", "", "", why))


def bits_by_kind(bundle: Scan) -> str:
    """Each kind of matrix with its mode, and the bits that a weight of it takes with its scales."""
    found: dict[str, dict[str, list[int]]] = {}
    for base in {name.rpartition(".")[0]: None for name in bundle.tensors}:
        kind = next((kind for kind, part in KINDS if part in f".{base}" or base == part), None)
        if kind is None or base.startswith("mtp."):
            continue
        mode, weights, nbytes = matrix_bits(bundle, base)
        cell = found.setdefault(kind, {}).setdefault(mode, [0, 0])
        cell[0] += weights
        cell[1] += nbytes
    cells = []
    for kind, _ in KINDS:
        modes = found.get(kind, {})
        said = [f"{m} {8 * nbytes / max(1, n):.2f}" for m, (n, nbytes) in sorted(modes.items())]
        if said:
            cells.append((kind, " and ".join(said)))
    return "; ".join(
        f"{', '.join(kind for kind, _ in same)} {said}"
        for said, same in groupby(cells, key=lambda cell: cell[1])
    )


def matrix_bits(bundle: Scan, base: str) -> tuple[str, int, int]:
    """(mode, weights, bytes) of one matrix."""
    tensors = bundle.tensors
    parts = [tensors[f"{base}.{part}"] for part in PARTS if f"{base}.{part}" in tensors]
    label, nbytes = label_at(bundle, base), sum(part.nbytes for part in parts)
    if not parts or label is None:
        return (parts[0].dtype if parts else "?"), sum(math.prod(p.shape) for p in parts), nbytes
    return label["mode"], math.prod(shape_of(parts[0], label, label["group_size"])), nbytes


def markdown_table(rows: list[Row]) -> str:
    """All rows as a Markdown table."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells for row in rows)]
    return "\n".join(
        "| " + " | ".join(escape_line(c, 4 * WIDTH) for c in line) + " |" for line in lines
    )
