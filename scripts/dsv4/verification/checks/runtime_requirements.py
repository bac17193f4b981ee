"""Requirements that runtimes have on a bundle, checked by its headers and JSON.

Each function returns what a requirement finds wrong, or "". dsv4/verification/checks/runtimes.py
says which runtime has which. They were found by experiment on small bundles: each runtime was
compared with the bundle's own tensors dequantized and run in transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from dsv4.model import mtp
from dsv4.model.chat_template import ENCODING
from dsv4.model.labels import fp8_bases, has_turboquant
from dsv4.model.naming_schemes import MLX_LM, STORAGE, VMLX
from dsv4.model.source_format import has_vision
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.documents import (
    effective_label,
    labels_in_use,
    stop_token_ids,
    wrong_jang_group,
)
from dsv4.verification.checks.headers import check_controls
from dsv4.verification.checks.stored_formats import label_at
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

Requirement = Callable[[Scan], str]


def wrong_label_for(runtime: str) -> Requirement:
    """Return the requirement that every label that `runtime` looks up fits the tensors."""

    def wrong_label(bundle: Scan) -> str:
        if runtime not in bundle.scheme.runtimes:
            return f"names as {bundle.scheme.who} writes them, which it does not load"
        labels = bundle.config.get("quantization")
        if not isinstance(labels, dict):
            quantized = any(name.endswith(".scales") for name in bundle.tensors)
            return "no labels" if quantized or bundle.is_ours else ""
        for key, base, who in labels_in_use(bundle):
            stored = label_at(bundle, base)
            runtimes = [runtime]
            if runtime == VMLX and stored and stored["mode"] in ("mxfp4", "mxfp8", "nvfp4"):
                runtimes.append(MLX_LM)  # vMLX drops these modes unless mlx_lm's key has them too
            if who in runtimes and effective_label(labels, key) != stored:
                return f"no right label at {escape_line(key)}"
        return ""

    return wrong_label


def wrong_stop_ids_in(name: str) -> Requirement:
    """Return the requirement that the file `name` holds the stop tokens."""

    def wrong_stop_ids(bundle: Scan) -> str:
        eos = stop_token_ids(bundle.documents.get("tokenizer.json", {}))
        found = bundle.documents.get(name, {}).get("eos_token_id")
        enough = (eos, eos[0], eos[:1]) if eos and bundle.scheme is not STORAGE else (eos,)
        return "" if eos and found in enough else f"stop tokens in {name} {short_repr(found)}"

    return wrong_stop_ids


def missing_template(bundle: Scan) -> str:
    found = bundle.documents.get("tokenizer_config.json", {}).get("chat_template")
    return "" if found else "no chat template"


def missing_encoding(bundle: Scan) -> str:
    return "" if bundle.files.get(ENCODING) else f"no {ENCODING}"


def rounded_controls(bundle: Scan) -> str:
    findings = Findings()
    check_controls(bundle, findings)
    return "control tensors not in F32" if findings.names else ""


def wrong_group_size(bundle: Scan) -> str:
    wrong = wrong_jang_group(bundle)
    return f"jang_config.json: group_size {wrong[0]}" if wrong else ""


def quantized_head(bundle: Scan) -> str:
    """mlx-vlm looks for a quantized head under its own names only."""
    if bundle.scheme is not STORAGE:
        return ""
    head = bundle.tensors.get("head.weight")
    return "" if head and head.dtype in ("BF16", "F16") else "head.weight is quantized"


def turboquant_experts(bundle: Scan) -> str:
    """Only vMLX has TurboQuant's kernels."""
    return "experts in TurboQuant, which it cannot read" if has_turboquant(bundle.tensors) else ""


def vision_tower(bundle: Scan) -> str:
    """mlx_lm refuses tensors for which jang's model has no parameter."""
    found = has_vision(bundle.tensors, bundle.config)
    return "a vision tower, which its model does not have" if found else ""


def fp8_matrices(bundle: Scan) -> str:
    """vMLX 1.3.97 takes every 8-bit module as affine and stops at its missing biases."""
    loaded = itertools.filterfalse(mtp.is_mtp, fp8_bases(bundle.tensors))
    return "FP8 matrices as mxfp8, which it crashes on" if any(loaded) else ""


def false_turboquant_mark(bundle: Scan) -> str:
    """vMLX 1.6.81 expects TurboQuant experts if a file says so, whatever the tensors are."""
    if has_turboquant(bundle.tensors):
        return ""
    files = {
        "config.json": bundle.config,
        "jang_config.json": bundle.documents.get("jang_config.json"),
    }
    for name, content in files.items():
        objects = (content, content.get("quantization")) if isinstance(content, dict) else ()
        formats = [one.get(key) for one in objects if isinstance(one, dict)
                   for key in ("weight_format", "method")]  # fmt: skip
        if any(name_of_format in ("mxtq", "jangtq") for name_of_format in formats):
            return f"{name} says TurboQuant, and no expert is stored so"
    return ""
