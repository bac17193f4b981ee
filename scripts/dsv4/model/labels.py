"""The `quantization` labels in config.json: which module is stored how, under every name in use.

Each runtime looks a module's label up under names of its own and, when it finds none, falls back to
the top level without a word. So the experts' label stands under all of them:

| who                     | name                                                        |
|-------------------------|-------------------------------------------------------------|
| mlx_lm, vMLX 1.3.97     | model.layers.N.mlp.switch_mlp.{gate,up,down}_proj           |
| mlx-vlm                 | language_model.model.layers.N.ffn.switch_mlp.…              |
| vMLX 1.6.81             | layers.N.ffn.experts.E.wK, mtp.M.ffn.experts.E.wK (storage) |

An FP8 matrix that was kept as it is (mxfp8) is labelled likewise: under its storage name, and under
the two module paths that names.py gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsv4.model.names import GROUP, columns_of, module_paths, parse_expert, stack_of, switch_paths
from dsv4.storage.shard import Slot, Tensor

WIDTHS, SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # affine's bits, and columns of a group, in MLX
DEFAULT = {"group_size": GROUP, "bits": 8, "mode": "affine"}
EXPERT = {"group_size": GROUP, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": GROUP, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": GROUP, "bits": 8, "mode": "mxfp8"}
# Where config.json says which quantizer made the routed experts. No runtime looks at the key.
RECORD = "requantize"
# The quantizers with which layers or projections differ; those that may keep the FP4 bytes.
MIXTURES = ("small", "mixture")
COPYING = ("mxfp4", "lossless", "mixture")


def affine(bits: int, size: int = GROUP) -> dict[str, Any]:
    """The label of affine numbers of so many bits, in groups of so many columns."""
    return {"group_size": size, "bits": bits, "mode": "affine"}


def quantization(
    experts: Mapping[str, dict[str, Any]], tensors: Mapping[str, Slot | Tensor] | None = None
) -> dict[str, Any]:
    """The whole `quantization` value for a bundle.

    `experts`: the label of every routed-expert matrix by its storage name, as `expert_bases` names
    them; a layer's are stacked, so its first expert's label is the stack's. `tensors` are the
    bundle's, for those that are stored as mxfp8. MTP's get their storage name only: no runtime
    builds modules for them. Where nothing is 8-bit affine the top level says mxfp8: a runtime that
    misses a matrix's label is right with it.
    """
    fp8 = fp8_bases(tensors or {})
    eight = any(n.endswith(".biases") and not parse_expert(n) for n in tensors or ())
    labels: dict[str, Any] = dict(MXFP8 if fp8 and not eight else DEFAULT)
    parsed = ((parse_expert(f"{base}.weight"), label) for base, label in experts.items())
    stacks = {(at[1], at[3]): label for at, label in parsed if at and at[0] == "layers"}
    for which in (0, 1):
        for (layer, matrix), label in sorted(stacks.items(), key=lambda item: item[0]):
            labels[switch_paths(layer, matrix)[which]] = dict(label)
    labels.update({base: dict(label) for base, label in experts.items()})
    for base in fp8:
        labels.update({name: dict(MXFP8) for name in (*module_paths(base), base)})
    return labels


def in_stacks(experts: Mapping[str, dict[str, Any] | None], mixed: bool = True) -> bool:
    """Has every routed expert a label, and all of a stack (unless mixed: of all) the same?"""
    firsts: dict[str, Any] = {}
    for base, label in experts.items():
        if label is None or firsts.setdefault(stack_of(base) if mixed else "", label) != label:
            return False
    return bool(experts)


def usual(experts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The label that most matrices have, for places that have room for one."""
    counts = Counter(tuple(label.items()) for label in experts.values())
    return dict(counts.most_common(1)[0][0]) if counts else dict(EXPERT)


def fp8_bases(tensors: Mapping[str, Slot | Tensor]) -> list[str]:
    """Storage names of the matrices that are stored as mxfp8, in the order of the tensors."""
    bases = [n.removesuffix(".scales") for n, t in tensors.items() if t.dtype == "U8"]
    return [base for base in bases if stored_label(tensors, base, {}) == MXFP8]


def parts_of(
    label: dict[str, Any], out: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part → (dtype, shape) of a matrix (out, columns) that is stored as `label` says.

    >>> parts_of(EXPERT, 2048, 4096)["scales"]
    ('F16', (2048, 128))
    """
    groups = (out, columns // label["group_size"])
    weight = {"weight": ("U32", (out, columns * label["bits"] // 32))}
    if label["mode"] == "affine":
        return {**weight, "scales": ("F16", groups), "biases": ("F16", groups)}
    return {**weight, "scales": ("U8", groups)}


def stored_label(
    tensors: Mapping[str, Slot | Tensor], base: str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`label_of` the tensors `base`.{weight,scales,biases}; config.json tells the columns."""
    parts = (tensors.get(f"{base}.{part}") for part in ("weight", "scales", "biases"))
    return label_of(*parts, columns_of(base, config))


def label_of(
    weight: Slot | Tensor | None,
    scales: Slot | Tensor | None,
    biases: Slot | Tensor | None,
    columns: int | None = None,
) -> dict[str, Any] | None:
    """The label that fits a module's parts as they lie on disk, or None if none does.

    An affine triple is weight (out, in · bits / 32) U32, scales and biases (out, in / group) of one
    float dtype. The widths alone cannot tell 2 bits in groups of 64 from 4 in groups of 32; the
    module's columns can, and without them (or where they do not fit) groups are 32 wide.
    Without biases: FP4 codes U32 (out, in / 8) or FP8 codes U32 (out, in / 4), and their exponents
    U8 (out, in / 32).
    """
    if weight is None or scales is None or weight.dtype != "U32":
        return None
    if not len(weight.shape) == len(scales.shape) == 2 or weight.shape[0] != scales.shape[0]:
        return None
    if scales.shape[1] == 0 or weight.shape[1] % scales.shape[1]:
        return None
    bits, size = weight.shape[1] // scales.shape[1], GROUP
    if biases is None:
        label = {4: MXFP4, 8: MXFP8}.get(bits) if scales.dtype in ("U8", "F8_E8M0") else None
        return dict(label) if label else None
    if columns and columns % scales.shape[1] == 0 and columns // scales.shape[1] in SIZES:
        size = columns // scales.shape[1]
        bits, rest = divmod(GROUP * bits, size)
        bits = 0 if rest else bits
    fits = scales.dtype in ("F16", "BF16", "F32") and bits in WIDTHS
    same = (biases.dtype, biases.shape) == (scales.dtype, scales.shape)
    return affine(bits, size) if fits and same else None


def recorded_quantizer(config: dict[str, Any]) -> str | None:
    """The quantizer that config.json names; None in a stock bundle."""
    record = config.get(RECORD)
    name = record.get("quantizer") if isinstance(record, dict) else None
    return name if isinstance(name, str) else None
