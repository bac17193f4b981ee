"""Aggregate level 2's results into findings, checks and the tables of verify.json."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from dsv4.model import mtp
from dsv4.model.labels import TURBO
from dsv4.model.names import PROJECTION, parse_expert
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.verification.numbers.compare_all import Numbers
from dsv4.verification.numbers.tasks import TensorResult
from dsv4.verification.report.findings import Check, Findings

# Share of wrong groups in the median tensor above which the tool used another formula. A fault
# affects one tensor or a few.
OTHER_FORMULA = 0.01
# Share of the groups at a tie above which another device rounded them. A fault at a tie is rare.
OTHER_DEVICE = 0.01


def aggregate(numbers: Numbers, findings: Findings) -> list[Check]:
    """Report the faults of all tensors, and return the checks of level 2."""
    for result in numbers.results:
        for fault in result.faults:
            findings.add(*fault)
    for tensor, at in numbers.holes.items():
        where = f"{tensor.path}: {tensor.name}"
        findings.add("zeros-run", where, f"zeros from byte {at:,} of the file on", "numbers")
    if not numbers.compared:
        read = sum(result.numbers for result in numbers.results)
        return [Check("numbers without NaN or Inf", read, "no source to compare them with")]
    groups = {
        what: [r for r in numbers.results if r.what == what]
        for what in ("expert", "module", "control", "passthrough")
    }
    for what in ("expert", "module"):
        recorded = numbers.recorded is not None
        for how in dict.fromkeys(result.how for result in groups[what]):
            alike = [result for result in groups[what] if result.how == how]
            report_groups(alike, what, findings, recorded)
    for name in numbers.left_out:
        findings.add("not-compared", name, "no counterpart of its kind and shape", "one")
    if numbers.recorded and not numbers.recomputable:
        findings.add(
            "quantizer-unknown", numbers.recorded, "another table than this version's", "its bytes"
        )
    return [
        *(check_experts(block, groups["expert"]) for block in ("layers", "mtp")),
        check_modules(groups["module"]),
        Check("control numbers equal to the source", count_values(groups["control"])),
        Check("passthrough numbers equal to the source", count_values(groups["passthrough"])),
        *check_lossless(numbers),
    ]


def check_lossless(numbers: Numbers) -> list[Check]:
    """Return the check that a lossless bundle holds exactly the source's numbers; [] if not."""
    lossy = any(r.faults or r.wrong or r.explained or r.error for r in numbers.results)
    if not quantizer_properties(numbers.recorded).lossless or lossy or numbers.left_out:
        return []
    what = "numbers in all, lossless: each one is the source's"
    return [Check(what, count_values(numbers.results))]


def count_values(results: Iterable[TensorResult]) -> int:
    """Return the number of values in these tensors."""
    return sum(result.numbers for result in results)


def report_groups(
    results: list[TensorResult], what: str, findings: Findings, recorded: bool = False
) -> None:
    """Report groups that differ from MLX's formula as faults, another device or another formula.

    recorded: whether the bundle names its quantizer, whose promises then hold. Tensors of another
    formula have made none: their errors' size is judged (AffineBlock.check_size, check_whole).
    """
    by_formula = [r for r in results if r.groups and not r.recomputed]
    shares = [r.wrong / r.groups for r in by_formula]
    other_formula = bool(shares) and median(shares) > OTHER_FORMULA
    fragile = sum(r.fragile for r in by_formula)
    device = sum(r.explained for r in by_formula) > OTHER_DEVICE * fragile
    for result in results:
        free = other_formula and not result.recomputed
        if recorded or not free:
            for fault in result.promised.values():
                findings.add(*fault)
        if free:
            continue
        for place in result.wrong_places:
            report_group(result, f"{what}-differs", place, result.wrong, findings)
        name = f"{what}-other-device" if device else f"{what}-differs"
        for place in result.explained_places:
            report_group(result, name, place, result.explained, findings)
    if other_formula:
        where = f"{what}s, {results[0].how}"
        findings.add("quantizer-unknown", where, "another formula than MLX's", "MLX's")
        lost = sum(result.zeros_lost for result in results)
        if lost and what == "expert" and not recorded:
            findings.add("zeros-moved", where, f"{lost:,} zeros", "0")


def report_group(
    result: TensorResult, name: str, place: tuple[str, str, str], groups: int, findings: Findings
) -> None:
    """Report a tensor's first differing group, and the number of further ones."""
    where, found, expected = place
    more = f" and {groups - 1:,} more groups" if groups > 1 else ""
    findings.add(name, f"{result.display_name}: {where}{more}", found, expected)


def check_experts(block: str, results: list[TensorResult]) -> Check:
    """Return the check of the experts in the main layers (`block` layers) or in MTP (mtp)."""
    mine = [r for r in results if r.name.startswith(f"{block}.")]
    where = "in the main layers" if block == "layers" else "in MTP layers"
    what = f"routed-expert weights {where} against FP4"
    if not mine:
        return Check(what, 0, optional=block == "mtp")
    exact, groups = sum(r.exact for r in mine), sum(r.groups for r in mine)
    how = " and ".join(sorted({r.how for r in mine}))
    turbo = all(r.how.startswith(TURBO) for r in mine)
    right = "rows of nearest levels" if turbo else "groups byte for byte as expected"
    note = f"{len(mine):,} tensors stored as {how}; {exact:,} of {groups:,} {right}"
    note += f"; relative RMS {rms_of(mine):.3%}, worst tensor {max(r.relative for r in mine):.3%}"
    if not turbo:
        zeros, lost = sum(r.zeros for r in mine), sum(r.zeros_lost for r in mine)
        note += f"; {lost:,} of {zeros:,} zeros lost"
    return Check(what, count_values(mine), note, describe_worst(mine))


def check_modules(results: list[TensorResult]) -> Check:
    """Return the check of the 8-bit modules."""
    what = "module weights against FP8 and BF16"
    if not results:
        return Check(what, 0)
    exact, groups = sum(r.exact for r in results), sum(r.groups for r in results)
    copied = all(r.recomputed for r in results if r.groups)
    note = f"{len(results):,} tensors, {exact:,} of {groups:,} groups byte for byte as "
    note += "in the source" if copied else "MLX's CPU code"
    note += f"; relative RMS {rms_of(results):.3%}"
    return Check(what, count_values(results), note, describe_worst(results))


def describe_worst(results: list[TensorResult]) -> str:
    """Return the largest error of a weight and its place, as text."""
    worst = max(results, key=lambda r: r.worst)
    if worst.worst == 0:
        return "no weight off by more than rounding"
    if not worst.worst_at:
        return f"no weight off by more than {worst.worst:.3f} steps"
    return f"worst weight off by {worst.worst:.3f} steps ({worst.name}, {worst.worst_at})"


def rms_of(results: list[TensorResult]) -> float:
    """Return the relative RMS error over several tensors."""
    energy, error = sum(r.energy for r in results), sum(r.error for r in results)
    return (error / energy) ** 0.5 if energy else 0.0


def by_layer(results: list[TensorResult]) -> list[dict[str, Any]]:
    """Return the errors of routed experts by block, layer and projection, for verify.json."""
    cells: dict[tuple[str, int, str], list[TensorResult]] = {}
    for result in results:
        expert = parse_expert(result.name)
        if expert and result.what == "expert":
            block, layer, _, matrix, _ = expert
            cells.setdefault((block, layer, PROJECTION[matrix]), []).append(result)
    return [
        {
            "block": block,
            "layer": layer,
            "projection": projection,
            "tensors": len(mine),
            "weights": count_values(mine),
            "relative_rms": rms_of(mine),
            "worst_tensor_rms": max(r.relative for r in mine),
            "worst_steps": json_number(max(r.worst for r in mine)),
            "groups": sum(r.groups for r in mine),
            "groups_as_expected": sum(r.exact for r in mine),
            "zeros": sum(r.zeros for r in mine),
            "zeros_lost": sum(r.zeros_lost for r in mine),
        }
        for (block, layer, projection), mine in sorted(cells.items())
    ]


# Kinds of tensor, and two substrings of their storage names; the first match counts.
KINDS = (
    ("experts gate_proj", ".experts.", ".w1"), ("experts up_proj", ".experts.", ".w3"),
    ("experts down_proj", ".experts.", ".w2"), ("shared experts", ".shared_experts.", ""),
    ("compressor, indexer", ".compressor.", ""), ("compressor, indexer", ".indexer.", ""),
    ("norms", "norm.", ""), ("attention", ".attn.w", ""), ("router", ".ffn.gate.weight", ""),
    ("embedding", "embed.", ""), ("head", "head.weight", ""),
)  # fmt: skip


def tensor_kind(result: TensorResult) -> str:
    """Return the kind of a tensor for reports; MTP's are kinds of their own."""
    name = result.name
    matches = (kind for kind, first, second in KINDS if first in name and second in name)
    kind = "controls" if result.what == "control" else next(matches, "other")
    return f"MTP: {kind}" if mtp.is_mtp(name) else kind


def by_kind(results: list[TensorResult]) -> list[dict[str, Any]]:
    """Return the error of each kind of tensor in each storage format, for verify.json."""
    kinds: dict[tuple[str, str], list[TensorResult]] = {}
    for result in results:
        kinds.setdefault((tensor_kind(result), result.how), []).append(result)
    rows = []
    for (kind, how), mine in kinds.items():
        worst = max(mine, key=lambda r: r.relative)
        rows.append({
            "kind": kind,
            "tensors": len(mine),
            "stored_as": how,
            "relative_rms": rms_of(mine),
            "worst_tensor": worst.display_name if worst.relative else "",
            "worst_tensor_rms": worst.relative,
            "groups": sum(r.groups for r in mine),
            "groups_exact": sum(r.lossless for r in mine),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["relative_rms"])


def format_kinds(kinds: list[dict[str, Any]]) -> list[str]:
    """Return the rows of `by_kind` as lines of a table for the terminal."""
    lines = [f"{'kind of tensor':<24}{'tensors':>8}  {'relative RMS':>12}  {'worst':>8}  "
             f"{'exact groups':>12}  stored as"]  # fmt: skip
    for row in kinds:
        groups = f"{row['groups_exact'] / row['groups']:.1%}" if row["groups"] else ""
        lines.append(
            f"{row['kind']:<24}{row['tensors']:>8,}  {row['relative_rms']:>12.3%}  "
            f"{row['worst_tensor_rms']:>8.3%}  {groups:>12}  {row['stored_as']}"
        )
    return lines


def json_number(value: float) -> float | None:
    """Return the value, or None for infinity, which JSON lacks."""
    return value if abs(value) < float("inf") else None


def other_tensors(results: list[TensorResult]) -> list[dict[str, Any]]:
    """Return the errors of all other tensors, one by one, for verify.json."""
    return [
        {
            "name": r.name,
            "what": r.what,
            "stored_as": r.how,
            "numbers": r.numbers,
            "relative_rms": r.relative,
            "worst_steps": json_number(r.worst),
            "groups": r.groups,
            "groups_as_expected": r.exact,
        }
        for r in results
        if r.what != "expert"
    ]
