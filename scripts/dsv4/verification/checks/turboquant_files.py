"""Level 1: check the files that TurboQuant needs beside its tensors.

vMLX 1.6.81 finds stacks of experts only if one lies in the first of the shards model-*.safetensors;
otherwise it reports no error, and the experts keep their initial values. It seeds the signs with
jang_config.json's mxtq_seed, and recognizes a TurboQuant bundle by weight_format and mxtq_bits
(jang_tools.load_jangtq, `_hydrate_dsv4_jangtq_streaming`, 2.5.50). vMLX in Swift reads signs and
levels from the sidecar, jangtq_runtime.safetensors.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from dsv4.errors import UserError
from dsv4.model.labels import TURBO, has_turboquant
from dsv4.model.names import columns_of, parse_stack
from dsv4.storage.checkpoint import SIDECAR
from dsv4.storage.safetensors_file import read_array, read_shard
from dsv4.text import short_repr
from dsv4.verification.checks.stored_formats import label_at
from dsv4.verification.numbers.turboquant import SEED, codebook, rotation_signs
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

DOCUMENTS = ("config.json", "jang_config.json")
PACKED = ".tq_packed"


def stack_formats(bundle: Scan) -> dict[tuple[int, int], int]:
    """Return (columns, bits) → number of expert matrices stored so."""
    bases = (name.removesuffix(PACKED) for name in bundle.tensors if name.endswith(PACKED))
    found = ((columns_of(base, bundle.config), label_at(bundle, base)) for base in bases)
    return Counter((columns, label["bits"]) for columns, label in found if label)


def check_turboquant_files(bundle: Scan, findings: Findings) -> list[Check]:
    """Check the documents, and that the first shard holds a stack; [] without TurboQuant."""
    if not has_turboquant(bundle.tensors):
        return []
    stacks = [n for n in bundle.checkpoint.tensors if parse_stack(n) and n.endswith(PACKED)]
    first = min((f for f in bundle.files if fnmatchcase(f, "model-*.safetensors")), default="")
    if stacks and not any(bundle.checkpoint.weight_map.get(name) == first for name in stacks):
        where = bundle.checkpoint.weight_map.get(stacks[0])
        first = first or "a shard model-*.safetensors"
        findings.add("turbo-stack-hidden", stacks[0], f"it in {where}", f"one in {first}")
    for name in DOCUMENTS:
        document = bundle.documents.get(name, {})
        for key, expected in corrected_keys(document, bundle).items():
            found = short_repr(document.get(key))
            findings.add("turbo-config-wrong", f"{name}: {key}", found, short_repr(expected))
    if bundle.is_ours and SIDECAR not in bundle.files:
        findings.add("turbo-sidecar-wrong", SIDECAR, "no such file", "signs and levels")
    return [Check("documents that describe TurboQuant", len(DOCUMENTS))]


def corrected_keys(document: dict[str, Any], bundle: Scan) -> dict[str, Any]:
    """Return the keys of config.json or jang_config.json that contradict the tensors → right value.

    A missing key contradicts nothing. {} for a bundle without TurboQuant.
    """
    if not has_turboquant(bundle.tensors):
        return {}
    right: dict[str, Any] = {}
    if document.get("weight_format", TURBO) != TURBO:
        right["weight_format"] = TURBO
    if document.get("mxtq_seed", SEED) != SEED:
        right["mxtq_seed"] = SEED
    counts: Counter[int] = Counter()
    for (_, bits), number in stack_formats(bundle).items():
        counts[bits] += number
    widths = document.get("mxtq_bits")
    widths = widths if isinstance(widths, dict) else {}
    stored = [*counts]  # a list compares by ==: an untrusted value may not be hashable
    if stored and widths.get("routed_expert", stored[0]) not in stored:
        usual = counts.most_common(1)[0][0]
        right["mxtq_bits"] = {**widths, "routed_expert": usual}
    return right


def check_sidecar(bundle: Scan, findings: Findings) -> list[Check]:
    """Check that the sidecar's signs and levels are those that level 2 decodes the codes with."""
    if SIDECAR not in bundle.files or not has_turboquant(bundle.tensors):
        return []
    expected = {}
    for columns, bits in stack_formats(bundle):
        expected[f"signs.{columns}.{SEED}"] = rotation_signs(columns)
        expected[f"codebook.{columns}.{bits}"] = codebook(columns, bits)
    try:
        tensors = read_shard(bundle.checkpoint.folder / SIDECAR).tensors
    except UserError as stop:
        findings.add("turbo-sidecar-wrong", SIDECAR, f"{stop}", "signs and levels")
        return []
    for name, array in expected.items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dtype, tensor.shape) != ("F32", array.shape):
            found = f"{tensor.dtype} {list(tensor.shape)}" if tensor else "no such tensor"
            findings.add("turbo-sidecar-wrong", f"{SIDECAR}: {name}", found, f"F32 {array.shape}")
        elif not np.allclose(read_array(tensor), array, rtol=1e-5, atol=0):
            findings.add("turbo-sidecar-wrong", f"{SIDECAR}: {name}", "other numbers", "its own")
    return [Check("signs and codebooks in the sidecar", len(expected))]
