"""What level 2's outcomes mean for the whole bundle, and what verify.json says of them."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from dsv4.model.labels import TURBO
from dsv4.model.names import PROJECTION, parse_expert
from dsv4.verification.numbers.compare_all import Numbers
from dsv4.verification.numbers.tasks import TensorResult
from dsv4.verification.report.findings import Check, Findings

# A tool with another formula gets groups wrong in every tensor; a fault, in one or a few.
OTHER_FORMULA = 0.01
# A device that rounds ties otherwise does so often; a fault that happens to hit a tie is alone.
OTHER_DEVICE = 0.01


def aggregate(numbers: Numbers, findings: Findings) -> list[Check]:
    """Turn outcomes into findings and checks."""
    for outcome in numbers.outcomes:
        for fault in outcome.faults:
            findings.add(*fault)
    for tensor, at in numbers.holes.items():
        where = f"{tensor.path}: {tensor.name}"
        findings.add("zeros-run", where, f"zeros from byte {at:,} of the file on", "numbers")
    if not numbers.compared:
        read = sum(outcome.numbers for outcome in numbers.outcomes)
        return [Check("numbers without NaN or Inf", read, "no source to compare them with")]
    groups = {
        what: [o for o in numbers.outcomes if o.what == what]
        for what in ("expert", "module", "control", "passthrough")
    }
    for what in ("expert", "module"):
        judge_groups(groups[what], what, findings)
    for name in numbers.left_out:
        findings.add("not-compared", name, "no counterpart of its kind and shape", "one")
    if numbers.recorded and not numbers.recomputable:
        findings.add("quantizer-unknown", numbers.recorded, "not this project's table", "its bytes")
    return [
        *(check_experts(block, groups["expert"]) for block in ("layers", "mtp")),
        check_modules(groups["module"]),
        Check("control numbers equal to the source", count_values(groups["control"])),
        Check("passthrough numbers equal to the source", count_values(groups["passthrough"])),
        *check_lossless(numbers),
    ]


def check_lossless(numbers: Numbers) -> list[Check]:
    """The certificate of a bundle that claims to be lossless, when every number is the source's."""
    odd = [o for o in numbers.outcomes if o.faults or o.wrong or o.explained or o.error]
    if numbers.recorded != "lossless" or odd or numbers.left_out:
        return []
    return [
        Check("numbers in all, lossless: each one is the source's", count_values(numbers.outcomes))
    ]


def count_values(outcomes: Iterable[TensorResult]) -> int:
    """How many numbers these tensors hold."""
    return sum(outcome.numbers for outcome in outcomes)


def judge_groups(outcomes: list[TensorResult], what: str, findings: Findings) -> None:
    """Groups that are not what the formula gives: a fault, another device, or another formula."""
    plain = [o for o in outcomes if o.groups and not o.recomputed]
    other = bool(plain) and median(o.wrong / o.groups for o in plain) > OTHER_FORMULA
    fragile = sum(o.fragile for o in plain)
    device = sum(o.explained for o in plain) > OTHER_DEVICE * fragile
    for outcome in outcomes:
        if not (other and not outcome.recomputed):
            for place in outcome.wrong_places:
                report_group(outcome, f"{what}-differs", place, outcome.wrong, findings)
        name = f"{what}-other-device" if device else f"{what}-differs"
        for place in outcome.explained_places:
            report_group(outcome, name, place, outcome.explained, findings)
    if other:
        findings.add("quantizer-unknown", f"{what}s", "another formula than MLX's", "MLX's")


def report_group(
    outcome: TensorResult, name: str, place: tuple[str, str, str], groups: int, findings: Findings
) -> None:
    """Report a tensor's first differing group, and how many more there are."""
    where, found, expected = place
    more = f" and {groups - 1:,} groups more" if groups > 1 else ""
    findings.add(name, f"{outcome.display_name}: {where}{more}", found, expected)


def check_experts(block: str, outcomes: list[TensorResult]) -> Check:
    """The experts of the main layers, or of MTP: how many, how exact, the worst of them."""
    mine = [o for o in outcomes if o.name.startswith(f"{block}.")]
    where = "in the main layers" if block == "layers" else "in MTP layers"
    what = f"routed-expert weights {where} against FP4"
    if not mine:
        return Check(what, 0, optional=block == "mtp")
    exact, groups = sum(o.exact for o in mine), sum(o.groups for o in mine)
    worst = max(mine, key=lambda o: o.worst)
    how = " and ".join(sorted({o.how for o in mine}))
    turbo = all(o.how.startswith(TURBO) for o in mine)
    right = "rows of nearest levels" if turbo else "groups byte for byte as expected"
    note = f"{len(mine):,} tensors stored as {how}; {exact:,} of {groups:,} {right}"
    rms = f"relative RMS {rms_of(mine):.3%}, worst tensor {max(o.relative for o in mine):.3%}"
    zeros = f"; {sum(o.zeros_lost for o in mine):,} of {sum(o.zeros for o in mine):,} zeros lost"
    return Check(
        what, count_values(mine), f"{note}; {rms}{'' if turbo else zeros}", worst_line(worst)
    )


def check_modules(outcomes: list[TensorResult]) -> Check:
    """The 8-bit modules."""
    if not outcomes:
        return Check("module weights against FP8 and BF16", 0)
    exact, groups = sum(o.exact for o in outcomes), sum(o.groups for o in outcomes)
    copied = all(o.recomputed for o in outcomes if o.groups)
    like = "in the source" if copied else "MLX's CPU code"
    note = (
        f"{len(outcomes):,} tensors, {exact:,} of {groups:,} groups byte for byte as "
        f"{like}; "
        f"relative RMS {rms_of(outcomes):.3%}"
    )
    return Check(
        "module weights against FP8 and BF16",
        count_values(outcomes),
        note,
        worst_line(max(outcomes, key=lambda o: o.worst)),
    )


def worst_line(worst: TensorResult) -> str:
    """The worst weight, for a reader."""
    if worst.worst == 0:
        return "no weight off by more than rounding"
    if not worst.worst_at:
        return f"no weight off by more than {worst.worst:.3f} steps"
    return f"worst weight off by {worst.worst:.3f} steps ({worst.name}, {worst.worst_at})"


def rms_of(outcomes: Iterable[TensorResult]) -> float:
    """Relative RMS error over several tensors."""
    outcomes = list(outcomes)
    energy, error = sum(o.energy for o in outcomes), sum(o.error for o in outcomes)
    return (error / energy) ** 0.5 if energy else 0.0


def by_layer(outcomes: list[TensorResult]) -> list[dict[str, Any]]:
    """Routed experts by block, layer and projection, as verify.json holds them."""
    cells: dict[tuple[str, int, str], list[TensorResult]] = {}
    for outcome in outcomes:
        expert = parse_expert(outcome.name)
        if expert and outcome.what == "expert":
            block, layer, _, matrix, _ = expert
            cells.setdefault((block, layer, PROJECTION[matrix]), []).append(outcome)
    return [
        {
            "block": block,
            "layer": layer,
            "projection": projection,
            "tensors": len(mine),
            "weights": count_values(mine),
            "relative_rms": rms_of(mine),
            "worst_tensor_rms": max(o.relative for o in mine),
            "worst_steps": json_number(max(o.worst for o in mine)),
            "groups": sum(o.groups for o in mine),
            "groups_as_expected": sum(o.exact for o in mine),
            "zeros": sum(o.zeros for o in mine),
            "zeros_lost": sum(o.zeros_lost for o in mine),
        }
        for (block, layer, projection), mine in sorted(cells.items())
    ]


# Kinds of tensor, by what their storage names hold; the first that fits.
KINDS = (
    ("experts gate_proj", ".experts.", ".w1"), ("experts up_proj", ".experts.", ".w3"),
    ("experts down_proj", ".experts.", ".w2"), ("shared experts", ".shared_experts.", ""),
    ("compressor, indexer", ".compressor.", ""), ("compressor, indexer", ".indexer.", ""),
    ("norms", "norm.", ""), ("attention", ".attn.w", ""), ("router", ".ffn.gate.weight", ""),
    ("embedding", "embed.", ""), ("head", "head.weight", ""),
)  # fmt: skip


def tensor_kind(outcome: TensorResult) -> str:
    """What a report calls tensors of this kind; MTP's apart."""
    name = outcome.name
    if outcome.what == "control":
        found = "controls"
    else:
        fits = (kind for kind, part, end in KINDS if part in name and end in name)
        found = next(fits, "other")
    return f"MTP: {found}" if name.startswith("mtp.") else found


def by_kind(outcomes: list[TensorResult]) -> list[dict[str, Any]]:
    """How exact each kind of tensor is, as verify.json holds it and the terminal shows it; what is
    stored in another way has a row of its own.
    """
    kinds: dict[tuple[str, str], list[TensorResult]] = {}
    for outcome in outcomes:
        kinds.setdefault((tensor_kind(outcome), outcome.how), []).append(outcome)
    rows = []
    for (kind, how), mine in kinds.items():
        worst = max(mine, key=lambda o: o.relative)
        rows.append({
            "kind": kind,
            "tensors": len(mine),
            "stored_as": how,
            "relative_rms": rms_of(mine),
            "worst_tensor": worst.display_name if worst.relative else "",
            "worst_tensor_rms": worst.relative,
            "groups": sum(o.groups for o in mine),
            "groups_exact": sum(o.lossless for o in mine),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["relative_rms"])


def kind_rows(kinds: list[dict[str, Any]]) -> list[str]:
    """The same as a table of the terminal."""
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
    """JSON has no infinity."""
    return value if abs(value) < float("inf") else None


def other_tensors(outcomes: list[TensorResult]) -> list[dict[str, Any]]:
    """Everything but routed experts, tensor by tensor."""
    return [
        {
            "name": o.name,
            "what": o.what,
            "stored_as": o.how,
            "numbers": o.numbers,
            "relative_rms": o.relative,
            "worst_steps": json_number(o.worst),
            "groups": o.groups,
            "groups_as_expected": o.exact,
        }
        for o in outcomes
        if o.what != "expert"
    ]
