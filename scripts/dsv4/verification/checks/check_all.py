"""Run all checks of level 1, on headers and JSON."""

from __future__ import annotations

from pathlib import Path

from dsv4.errors import UserError
from dsv4.model.labels import has_turboquant
from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, STORAGE
from dsv4.model.source_format import has_vision
from dsv4.storage.checkpoint import Checkpoint
from dsv4.toolchain.python_env import probe
from dsv4.verification.checks import conversation, documents, headers, loading, turboquant_files
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


def check_toolchain(bundle: Scan, python: Path, findings: Findings) -> list[Check]:
    """Run the installed loaders on these headers, and check that they are patched."""
    if {"config-broken", "layout-unknown"} & findings.names:
        return []
    order = (MLX_LM, MLX_VLM)
    if has_vision(bundle.tensors, bundle.config):  # jang's model has no tower
        order = (MLX_VLM,)
    runtime = next((r for r in order if r in bundle.scheme.runtimes), None)
    if runtime == MLX_VLM and has_package(python, "mlx-vlm"):
        return loading.check_loading(bundle, python, findings, runtime)
    if runtime != MLX_LM or has_turboquant(bundle.tensors):
        why = "mlx-vlm is not installed"
        if runtime != MLX_VLM:
            why = "neither mlx_lm nor jang_tools loads this layout"
        return [Check("parameters replayed", 0, f"no loader was run: {why}", optional=True)]
    loader = loading.check_loader(python, findings)
    return [loader, *loading.check_loading(bundle, python, findings)]


def has_package(python: Path, package: str) -> bool:
    """Return whether the toolchain has a package."""
    try:
        return probe(python)["packages"].get(package) is not None
    except UserError:
        return False


def require_nonempty(checks: list[Check], findings: Findings) -> None:
    """Report each check that found nothing to check, unless it is optional."""
    for check in checks:
        if check.number == 0 and not check.optional:
            findings.add("nothing-checked", check.what, "0", "more")
