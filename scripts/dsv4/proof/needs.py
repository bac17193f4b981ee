"""What a runtime may need of a bundle, judged by its headers and JSON.

Which runtime needs what stands in dsv4/proof/stacks.py. Found by experiment on small bundles, each
runtime compared with the bundle's own tensors dequantized and run in transformers. A need returns
words for what is missing, or "".
"""

from __future__ import annotations

from collections.abc import Callable

from dsv4.model.labels import fp8_bases
from dsv4.model.names import GROUP
from dsv4.model.template import ENCODING
from dsv4.proof.documents import labels_in_use
from dsv4.proof.documents import stop_ids as ids_of
from dsv4.proof.findings import Findings
from dsv4.proof.headers import check_controls, stored
from dsv4.proof.survey import Survey
from dsv4.words import plain, shown

Need = Callable[[Survey], str]


def labels_for(runtime: str) -> Need:
    """Every expert's label, under the names that `runtime` looks up."""

    def need(bundle: Survey) -> str:
        labels = bundle.config.get("quantization")
        if not isinstance(labels, dict):
            return "no labels"
        top = {key: labels.get(key) for key in ("group_size", "bits", "mode")}
        for key, base, who in labels_in_use(bundle):
            if who == runtime and labels.get(key, top) != stored(bundle, base):
                return f"no right label at {plain(key)}"
        return ""

    return need


def stop_ids(name: str) -> Need:
    """The stop tokens in the file where a runtime reads them."""

    def need(bundle: Survey) -> str:
        eos = ids_of(bundle.documents.get("tokenizer.json", {}))
        found = bundle.documents.get(name, {}).get("eos_token_id")
        return "" if eos and found == eos else f"stop tokens in {name} {shown(found)}"

    return need


def chat_template(bundle: Survey) -> str:
    found = bundle.documents.get("tokenizer_config.json", {}).get("chat_template")
    return "" if found else "no chat template"


def encoding(bundle: Survey) -> str:
    return "" if bundle.files.get(ENCODING) else f"no {ENCODING}"


def controls(bundle: Survey) -> str:
    findings = Findings()
    check_controls(bundle, findings)
    return "control tensors not in F32" if findings.names else ""


def jang_groups(bundle: Survey) -> str:
    found = bundle.documents.get("jang_config.json", {}).get("quantization")
    found = found.get("group_size") if isinstance(found, dict) else None
    return "" if found == GROUP else f"jang_config.json: group_size {shown(found)}"


def plain_head(bundle: Survey) -> str:
    head = bundle.checkpoint.tensors.get("head.weight")
    return "" if head and head.dtype in ("BF16", "F16") else "head.weight is quantized"


def no_fp8(bundle: Survey) -> str:
    """Of vMLX 1.3.97, which takes every 8-bit module for affine and stops at its biases."""
    return (
        "FP8 matrices as mxfp8, which it crashes on" if fp8_bases(bundle.checkpoint.tensors) else ""
    )
