"""Summarize a bundle's headers in one row of a table, for `make inspect` of several bundles."""

from __future__ import annotations

import math
from itertools import groupby

from dsv4.model import mtp
from dsv4.storage.atomic import format_bytes
from dsv4.text import escape_line
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.checks.stored_formats import label_at, module_parts, shape_of
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

HEAD = ("bundle", "size", "layout", "bits a weight", "loaded by", "weights in memory", "faults")
# The kinds of matrix whose bits are shown, and the substrings of their storage names.
KINDS = (
    ("experts", ".ffn.experts."), ("shared", ".shared_experts."), ("attention", ".attn.w"),
    ("embedding", "embed"), ("head", "head"),
)  # fmt: skip
WIDTH = 60  # characters of a cell


def summary_row(repo: str, size: int, bundle: Scan | None, findings: Findings) -> tuple[str, ...]:
    """Return the cells of one bundle, in the order of HEAD; without a scan, only its faults.

    size: bytes of all its files.
    """
    faults = ", ".join(finding.name for finding in findings.errors) or "none"
    if bundle is None or not bundle.view.recognized.known:
        return repo, format_bytes(size), "", "", "", "", faults
    loads = [name for name, why in runtime_verdicts(bundle, findings).items() if not why]
    tensors = bundle.tensors.values()
    loaded = sum(tensor.nbytes for tensor in tensors) - mtp.unloaded_bytes(tensors)
    layout = "unknown" if "layout-unknown" in findings else bundle.scheme.name
    runtimes = ", ".join(loads) or "none known"
    bits, memory = bits_by_kind(bundle), format_bytes(loaded)
    return repo, format_bytes(size), layout, bits, runtimes, memory, faults


def failed_row(repo: str, why: str) -> tuple[str, ...]:
    """Return the cells of a bundle that could not be read."""
    return repo, *[""] * (len(HEAD) - 2), why


def bits_by_kind(bundle: Scan) -> str:
    """Return each kind of matrix with its mode and its bits a weight, scales included, as text."""
    found: dict[str, dict[str, list[int]]] = {}
    for base in {name.rpartition(".")[0]: None for name in bundle.tensors}:
        kind = next((kind for kind, part in KINDS if part in f".{base}" or base == part), None)
        if kind is None or mtp.is_mtp(base):
            continue
        mode, weights, nbytes = matrix_bits(bundle, base)
        cell = found.setdefault(kind, {}).setdefault(mode, [0, 0])
        cell[0] += weights
        cell[1] += nbytes
    cells = []
    for kind, _ in KINDS:
        modes = found.get(kind, {})
        bits = [f"{m} {8 * nbytes / max(1, n):.2f}" for m, (n, nbytes) in sorted(modes.items())]
        if bits:
            cells.append((kind, " and ".join(bits)))
    return "; ".join(
        f"{', '.join(kind for kind, _ in same)} {bits}"
        for bits, same in groupby(cells, key=lambda cell: cell[1])
    )


def matrix_bits(bundle: Scan, base: str) -> tuple[str, int, int]:
    """Return (mode, number of weights, bytes) of one matrix."""
    parts = [*module_parts(bundle, base).values()]
    label, nbytes = label_at(bundle, base), sum(part.nbytes for part in parts)
    if not parts or label is None:
        return (parts[0].dtype if parts else "?"), sum(math.prod(p.shape) for p in parts), nbytes
    return label["mode"], math.prod(shape_of(parts[0], label, label["group_size"])), nbytes


def summary_table(rows: list[tuple[str, ...]]) -> str:
    """Return the rows below HEAD as a Markdown table for the terminal."""
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join(
        "| " + " | ".join(escape_line(c, 4 * WIDTH) for c in line) + " |" for line in lines
    )
