"""What a runtime may need of a bundle, judged by its headers and JSON.

Which runtime needs what stands in dsv4/verification/checks/runtimes.py. Found by experiment on
small bundles, each runtime compared with the bundle's own tensors dequantized and run in
transformers. A need returns words for what is missing, or "".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4.model.chat_template import ENCODING
from dsv4.model.labels import fp8_bases, has_turboquant
from dsv4.model.naming_schemes import MLX_LM, STORAGE, VMLX
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.documents import VMLX_GROUP, group_size, labels_in_use, names_no_group
from dsv4.verification.checks.documents import stop_token_ids as ids_of
from dsv4.verification.checks.headers import check_controls
from dsv4.verification.checks.stored_formats import label_at
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

Need = Callable[[Scan], str]


def expert_labels_for(runtime: str) -> Need:
    """Every expert's label, under the names that `runtime` looks up."""

    def need(bundle: Scan) -> str:
        if runtime not in bundle.scheme.runtimes:
            return f"names as {bundle.scheme.who} writes them, which it does not load"
        labels = bundle.config.get("quantization")
        if not isinstance(labels, dict):
            quantized = any(name.endswith(".scales") for name in bundle.tensors)
            return "no labels" if quantized or bundle.is_ours else ""
        top = {key: labels.get(key) for key in ("group_size", "bits", "mode")}
        for key, base, who in labels_in_use(bundle):
            label = labels.get(key, top)
            label = label if isinstance(label, dict) else {}
            label = {**label, "mode": label.get("mode") or "affine"}
            stored = label_at(bundle, base)
            # vMLX drops the mode of FP4 and FP8 unless it stands under mlx_lm's name too
            asks = (runtime, MLX_LM if runtime == VMLX and copied_label(stored) else runtime)
            if who in asks and label != stored:
                return f"no right label at {escape_line(key)}"
        return ""

    return need


def copied_label(stored: dict[str, Any] | None) -> bool:
    """True for a module of codes that have a mode of their own."""
    return stored is not None and stored["mode"] in ("mxfp4", "mxfp8", "nvfp4")


def stop_ids(name: str) -> Need:
    """The stop tokens in the file where a runtime reads them."""

    def need(bundle: Scan) -> str:
        eos = ids_of(bundle.documents.get("tokenizer.json", {}))
        found = bundle.documents.get(name, {}).get("eos_token_id")
        enough = (eos, eos[0], eos[:1]) if eos and bundle.scheme is not STORAGE else (eos,)
        return "" if eos and found in enough else f"stop tokens in {name} {short_repr(found)}"

    return need


def chat_template(bundle: Scan) -> str:
    found = bundle.documents.get("tokenizer_config.json", {}).get("chat_template")
    return "" if found else "no chat template"


def encoding(bundle: Scan) -> str:
    return "" if bundle.files.get(ENCODING) else f"no {ENCODING}"


def controls(bundle: Scan) -> str:
    findings = Findings()
    check_controls(bundle, findings)
    return "control tensors not in F32" if findings.names else ""


def jang_groups(bundle: Scan) -> str:
    found = bundle.documents.get("jang_config.json", {}).get("quantization")
    found = found.get("group_size") if isinstance(found, dict) else None
    wanted = group_size(bundle)
    quiet = names_no_group(bundle) or wanted in (0, VMLX_GROUP)
    fits = found == wanted or (found is None and quiet)
    return "" if fits else f"jang_config.json: group_size {short_repr(found)}"


def plain_head(bundle: Scan) -> str:
    """Of mlx-vlm, which looks for a quantized head under its own names only."""
    if bundle.scheme is not STORAGE:
        return ""
    head = bundle.tensors.get("head.weight")
    return "" if head and head.dtype in ("BF16", "F16") else "head.weight is quantized"


def no_turbo(bundle: Scan) -> str:
    """Of mlx_lm and mlx-vlm: vMLX alone has TurboQuant's kernels."""
    return "experts in TurboQuant, which it cannot read" if has_turboquant(bundle.tensors) else ""


def no_fp8(bundle: Scan) -> str:
    """Of vMLX 1.3.97, which takes every 8-bit module for affine and stops at its biases."""
    return "FP8 matrices as mxfp8, which it crashes on" if fp8_bases(bundle.tensors) else ""


def as_stamped(bundle: Scan) -> str:
    """Of vMLX 1.6.81, which asks for experts in TurboQuant wherever a file says that they are."""
    if has_turboquant(bundle.tensors):
        return ""
    files = {
        "config.json": bundle.config,
        "jang_config.json": bundle.documents.get("jang_config.json"),
    }
    for name, content in files.items():
        parts = (content, content.get("quantization")) if isinstance(content, dict) else ()
        said = [part.get(key) for part in parts if isinstance(part, dict)
                for key in ("weight_format", "method")]  # fmt: skip
        if any(word in ("mxtq", "jangtq") for word in said):
            return f"{name} says TurboQuant, which no expert is in"
    return ""
