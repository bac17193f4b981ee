"""Run all checks of level 1, on headers and JSON."""

from __future__ import annotations

from pathlib import Path

from dsv4.errors import UserError
from dsv4.model.labels import has_turboquant
from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, RUNTIMES, STORAGE
from dsv4.model.source_format import has_vision
from dsv4.storage.checkpoint import Checkpoint
from dsv4.toolchain.python_env import probe
from dsv4.verification.checks import (
    conversation,
    documents,
    headers,
    loading,
    runtime_outcomes,
    turboquant_files,
)
from dsv4.verification.checks.runtime_requirements import quantized_head
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan


def check_headers(bundle: Scan, source: Checkpoint | None, findings: Findings) -> list[Check]:
    """Run every check that needs no toolchain; it takes seconds for 180 GB."""
    findings.ours, findings.storage = bundle.is_ours, bundle.scheme is STORAGE
    fields = headers.check_config(bundle, source, findings)
    if "config-broken" in findings:
        return [fields]  # the other checks need the counts in config.json
    layout = headers.check_layout(bundle, findings)
    if "layout-unknown" in findings:
        return [fields, layout, headers.check_index(bundle, findings)]
    checks = [
        fields,
        layout,
        headers.check_index(bundle, findings),
        headers.check_metadata(bundle, findings),
        *headers.check_experts(bundle, findings),
        headers.check_triples(bundle, findings),
        headers.check_controls(bundle, findings),
        documents.check_code(bundle, findings),
        documents.check_labels(bundle, findings),
        *turboquant_files.check_turboquant_files(bundle, findings),
        documents.check_stops(bundle, findings),
        documents.check_defaults(bundle, source, findings),
        *conversation.check_conversation(bundle, source, findings),
    ]
    if source is not None:
        checks.append(headers.check_counterparts(bundle, source, findings))
    return checks


def check_toolchain(
    bundle: Scan, source: Checkpoint | None, python: Path, findings: Findings
) -> list[Check]:
    """Run the loaders that must load this bundle, and ask the runtimes how they read it."""
    if {"config-broken", "layout-unknown"} & findings.names:
        return []
    loaders = promised_loaders(bundle)
    found = runtime_outcomes.check_runtimes(bundle, source, python, loaders, findings)
    ran = any(check.what.startswith("parameters") for check in found)
    if MLX_LM in loaders and (has_jang(python) or not ran):
        return [loading.check_loader(python, findings), *found]
    if not ran:
        why = "that of mlx-vlm is not installed" if loaders else "none of the known ones loads this"
        found.append(Check("parameters replayed", 0, f"no loader was run: {why}", optional=True))
    return found


def has_jang(python: Path) -> bool:
    """Return whether the toolchain has jang_tools, which has mlx_lm's model."""
    try:
        return probe(python)["packages"].get("jang") is not None
    except UserError:
        return False


def promised_loaders(bundle: Scan) -> list[str]:
    """Return those of RUNTIMES that load these tensors; vMLX's TurboQuant cannot be replayed."""
    if has_turboquant(bundle.tensors):
        return []
    loaders = [runtime for runtime in RUNTIMES if runtime in bundle.scheme.runtimes]
    if quantized_head(bundle):
        loaders = [runtime for runtime in loaders if runtime != MLX_VLM]
    if has_vision(bundle.tensors, bundle.config):  # jang's model has no tower
        loaders = [runtime for runtime in loaders if runtime == MLX_VLM]
    return loaders


def require_nonempty(checks: list[Check], findings: Findings) -> None:
    """Report each check that found nothing to check, unless it is optional."""
    for check in checks:
        if check.number == 0 and not check.optional:
            findings.add("nothing-checked", check.what, "0", "more")
