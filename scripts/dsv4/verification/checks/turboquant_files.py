"""What goes with TurboQuant's tensors: documents, the first shard, the sidecar.

vMLX 1.6.81 finds stacks of experts only if one lies in the first of the shards model-*.safetensors;
else it goes on without a word, and the experts keep their start values. It takes signs by
jang_config.json's mxtq_seed, and tells the kind of bundle from weight_format and mxtq_bits. vMLX in
Swift reads signs and levels from jangtq_runtime.safetensors.
(jang_tools.load_jangtq, `_hydrate_dsv4_jangtq_streaming`, 2.5.50.)
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
    """(columns, bits) → how many matrices of experts have that form."""
    bases = (name.removesuffix(PACKED) for name in bundle.tensors if name.endswith(PACKED))
    found = ((columns_of(base, bundle.config), label_at(bundle, base)) for base in bases)
    return Counter((columns, label["bits"]) for columns, label in found if label)


def check_turboquant_files(bundle: Scan, findings: Findings) -> list[Check]:
    """Documents say what the tensors are, and runtimes find the stacks; [] without TurboQuant."""
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
        for key, wanted in wrong_keys(document, bundle).items():
            where = f"{name}: {key}"
            findings.add(
                "turbo-config-wrong", where, short_repr(document.get(key)), short_repr(wanted)
            )
    if bundle.is_ours and SIDECAR not in bundle.files:
        findings.add("turbo-sidecar-wrong", SIDECAR, "no such file", "signs and levels")
    return [Check("documents that tell of TurboQuant", len(DOCUMENTS))]


def wrong_keys(document: dict[str, Any], bundle: Scan) -> dict[str, Any]:
    """The keys of config.json or jang_config.json that say another form than the tensors have, and
    what they should say; a key that is not there says nothing wrong. None of a bundle that has no
    TurboQuant."""
    if not has_turboquant(bundle.tensors):
        return {}
    wanted: dict[str, Any] = {}
    if document.get("weight_format", TURBO) != TURBO:
        wanted["weight_format"] = TURBO
    if document.get("mxtq_seed", SEED) != SEED:
        wanted["mxtq_seed"] = SEED
    counts: Counter[int] = Counter()
    for (_, bits), number in stack_formats(bundle).items():
        counts[bits] += number
    widths = document.get("mxtq_bits")
    widths = widths if isinstance(widths, dict) else {}
    said = [*counts]  # compared by ==: a stranger's value may be a list
    if said and widths.get("routed_expert", said[0]) not in said:
        usual = counts.most_common(1)[0][0]
        wanted["mxtq_bits"] = {**widths, "routed_expert": usual}
    return wanted


def check_sidecar(bundle: Scan, findings: Findings) -> list[Check]:
    """The sidecar's signs and levels are those by which the codes were judged."""
    if SIDECAR not in bundle.files or not has_turboquant(bundle.tensors):
        return []
    wanted = {}
    for columns, bits in stack_formats(bundle):
        wanted[f"signs.{columns}.{SEED}"] = rotation_signs(columns)
        wanted[f"codebook.{columns}.{bits}"] = codebook(columns, bits)
    try:
        tensors = read_shard(bundle.checkpoint.folder / SIDECAR).tensors
    except UserError as stop:
        findings.add("turbo-sidecar-wrong", SIDECAR, f"{stop}", "signs and levels")
        return []
    for name, array in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dtype, tensor.shape) != ("F32", array.shape):
            found = f"{tensor.dtype} {list(tensor.shape)}" if tensor else "no such tensor"
            findings.add("turbo-sidecar-wrong", f"{SIDECAR}: {name}", found, f"F32 {array.shape}")
        elif not np.allclose(read_array(tensor), array, rtol=1e-5, atol=0):
            findings.add("turbo-sidecar-wrong", f"{SIDECAR}: {name}", "other numbers", "its own")
    return [Check("signs and codebooks in the sidecar", len(wanted))]
