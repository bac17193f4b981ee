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

from collections.abc import Mapping
from typing import Any

from dsv4.model.names import GROUP, PROJECTION, module_paths, parse_expert, switch_paths
from dsv4.storage.shard import Slot, Tensor

DEFAULT = {"group_size": GROUP, "bits": 8, "mode": "affine"}
EXPERT = {"group_size": GROUP, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": GROUP, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": GROUP, "bits": 8, "mode": "mxfp8"}
TURBO = "mxtq"  # no mode of MLX's: TurboQuant's codes and norms, a group being the row
TURBO2 = {"bits": 2, "mode": TURBO}
# Where config.json says which quantizer made the routed experts. No runtime looks at the key.
RECORD = "requantize"
# The quantizers that keep the source's FP4 bytes.
COPYING = ("mxfp4", "lossless")


def quantization(
    bases: list[str],
    expert: dict[str, Any] = EXPERT,
    tensors: Mapping[str, Slot | Tensor] | None = None,
) -> dict[str, Any]:
    """The whole `quantization` value for a bundle whose routed experts are stored as `expert` says.

    `bases` are the storage names of all routed-expert matrices, as `expert_bases` gives them;
    `tensors` are the bundle's, for those that are stored as mxfp8. MTP's get their storage name
    only: no runtime builds modules for them. Where nothing is 8-bit affine the top level says
    mxfp8: a runtime that misses a matrix's label is right with it. Experts in TurboQuant have no
    labels but what `turbo_width` says.
    """
    if expert["mode"] == TURBO:
        return DEFAULT | turbo_width(expert)
    parsed = (parse_expert(f"{base}.weight") for base in bases)
    layers = sorted({one[1] for one in parsed if one and one[0] == "layers"})
    fp8 = fp8_bases(tensors or {})
    affine = any(n.endswith(".biases") and not parse_expert(n) for n in tensors or ())
    labels: dict[str, Any] = dict(MXFP8 if fp8 and not affine else DEFAULT)
    for which in (0, 1):
        for layer in layers:
            for matrix in PROJECTION:
                labels[switch_paths(layer, matrix)[which]] = dict(expert)
    labels.update({base: dict(expert) for base in bases})
    for base in fp8:
        labels.update({name: dict(MXFP8) for name in (*module_paths(base), base)})
    return labels


def turbo_width(expert: dict[str, Any]) -> dict[str, Any]:
    """What config.json says, twice, of the widths in a bundle with experts in TurboQuant.

    As jang_tools.dsv4.convert_dsv4_jangtq, 2.5.50, with --profile 2 --variant std.
    """
    eight = ("attention", "shared_expert", "compressor", "indexer", "embed_tokens", "lm_head")
    widths = {"routed_expert": expert["bits"], **dict.fromkeys(eight, 8)}
    return {
        "routed_expert_bits": expert["bits"],
        "routed_expert_bit_plan": {"default_bits": expert["bits"], "codec": TURBO},
        "mxtq_bits": {**widths, "norms_router_hc": 16},
    }


def fp8_bases(tensors: Mapping[str, Slot | Tensor]) -> list[str]:
    """Storage names of the matrices that are stored as mxfp8, in the order of the tensors."""
    bases = [n.removesuffix(".scales") for n, t in tensors.items() if t.dtype == "U8"]
    return [base for base in bases if stored_label(tensors, base) == MXFP8]


def parts_of(
    label: dict[str, Any], out: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part → (dtype, shape) of a matrix (out, columns) that is stored as `label` says.

    >>> parts_of(EXPERT, 2048, 4096)["scales"]
    ('F16', (2048, 128))
    """
    if label["mode"] == TURBO:
        codes = ("U32", (out, columns * label["bits"] // 32))
        return {"tq_packed": codes, "tq_norms": ("F16", (out,)), "tq_bits": ("I32", (1,))}
    groups = (out, columns // label["group_size"])
    weight = {"weight": ("U32", (out, columns * label["bits"] // 32))}
    if label["mode"] == "affine":
        return {**weight, "scales": ("F16", groups), "biases": ("F16", groups)}
    return {**weight, "scales": ("U8", groups)}


def stored_label(tensors: Mapping[str, Slot | Tensor], base: str) -> dict[str, Any] | None:
    """`label_of` the tensors `base`.{weight,scales,biases}."""
    return label_of(*(tensors.get(f"{base}.{part}") for part in ("weight", "scales", "biases")))


def label_of(
    weight: Slot | Tensor | None, scales: Slot | Tensor | None, biases: Slot | Tensor | None
) -> dict[str, Any] | None:
    """The label that fits a module's parts as they lie on disk, or None if none does.

    Groups are 32 columns wide here, so the bits of an affine triple follow from the widths:
    weight (out, in · bits / 32) U32, scales and biases (out, in / 32) of one float dtype.
    Without biases: FP4 codes U32 (out, in / 8) or FP8 codes U32 (out, in / 4), and their exponents
    U8 (out, in / 32).
    """
    if weight is None or scales is None or weight.dtype != "U32":
        return None
    if not len(weight.shape) == len(scales.shape) == 2 or weight.shape[0] != scales.shape[0]:
        return None
    if scales.shape[1] == 0 or weight.shape[1] % scales.shape[1]:
        return None
    bits = weight.shape[1] // scales.shape[1]
    if biases is None:
        label = {4: MXFP4, 8: MXFP8}.get(bits) if scales.dtype in ("U8", "F8_E8M0") else None
        return dict(label) if label else None
    fits = scales.dtype in ("F16", "BF16", "F32") and bits in (2, 3, 4, 5, 6, 8)
    same = (biases.dtype, biases.shape) == (scales.dtype, scales.shape)
    return {**DEFAULT, "bits": bits} if fits and same else None


def recorded_quantizer(config: dict[str, Any]) -> str | None:
    """The quantizer that config.json names; None in a stock bundle."""
    record = config.get(RECORD)
    name = record.get("quantizer") if isinstance(record, dict) else None
    return name if isinstance(name, str) else None
