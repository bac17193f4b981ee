"""Make and read the `quantization` labels in config.json: how each module is stored.

Each runtime looks a module's label up under its own names. When it finds none, it uses the top
level without a message. So an expert's label is written under all names:

| runtime                 | name                                                        |
|-------------------------|-------------------------------------------------------------|
| mlx_lm, vMLX 1.3.97     | model.layers.N.mlp.switch_mlp.{gate,up,down}_proj           |
| mlx-vlm                 | language_model.model.layers.N.ffn.switch_mlp.…              |
| vMLX 1.6.81             | layers.N.ffn.experts.E.wK, mtp.M.ffn.experts.E.wK (storage) |

An FP8 matrix that is kept (mxfp8) is labelled under its storage name and the two module paths of
names.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsv4.model import mtp
from dsv4.model.fp8_blocks import block_of
from dsv4.model.names import (
    GROUP,
    columns_of,
    module_paths,
    parse_expert,
    stack_of,
    switch_paths,
)
from dsv4.storage.safetensors_file import FLOATS, Tensor, TensorSpec

DEFAULT = {"group_size": GROUP, "bits": 8, "mode": "affine"}
EXPERT = {"group_size": GROUP, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": GROUP, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": GROUP, "bits": 8, "mode": "mxfp8"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
BY_BITS = {128: MXFP4, 256: MXFP8, 64: NVFP4}  # by bits of codes for each byte of scale
AFFINE_BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # of MLX's affine
TURBO, SOURCE = "mxtq", "source"  # not modes of MLX: codes of TurboQuant, the source's own format
TURBO2 = {"group_size": GROUP, "bits": 2, "mode": TURBO}
TURBO_PARTS = ("tq_packed", "tq_norms", "tq_bits")
# The key of config.json with the quantizer of the routed experts. No runtime reads it.
RECORD = "requantize"


def affine_label(bits: int, size: int = GROUP) -> dict[str, Any]:
    """Return the label of affine numbers of `bits` bits in groups of `size` columns."""
    return {"group_size": size, "bits": bits, "mode": "affine"}


def quantization(
    experts: Mapping[str, dict[str, Any]], tensors: Mapping[str, TensorSpec | Tensor] | None = None
) -> dict[str, Any]:
    """Return the `quantization` value of a bundle's config.json.

    experts: the label of every routed-expert matrix by storage name; a stack has its first expert's
    label. tensors: the bundle's, to find those stored as mxfp8. MTP's matrices are labelled under
    their storage names only, because no runtime builds modules for them. If nothing is 8-bit
    affine, the top level is mxfp8, so that a runtime which misses a matrix's label is still right.
    Experts in TurboQuant have `turboquant_fields` instead of labels.
    """
    turbo = next((label for label in experts.values() if label["mode"] == TURBO), None)
    experts = {base: label for base, label in experts.items() if label["mode"] != TURBO}
    fp8 = fp8_bases(tensors or {})
    eight = any(n.endswith(".biases") and not parse_expert(n) for n in tensors or ())
    labels: dict[str, Any] = dict(MXFP8 if fp8 and not eight else DEFAULT)
    labels |= turboquant_fields(turbo) if turbo else {}
    parsed = ((parse_expert(f"{base}.weight"), label) for base, label in experts.items())
    stacks = {(at[1], at[3]): label for at, label in parsed if at and at[0] == "layers"}
    for which in (0, 1):
        for (layer, matrix), label in sorted(stacks.items(), key=lambda item: item[0]):
            labels[switch_paths(layer, matrix)[which]] = dict(label)
    labels.update({base: dict(label) for base, label in experts.items()})
    for base in fp8:
        labels.update({name: dict(MXFP8) for name in (*module_paths(base), base)})
    return labels


def turboquant_fields(expert: dict[str, Any]) -> dict[str, Any]:
    """Return the widths that both config files have if the experts are in TurboQuant.

    As jang_tools.dsv4.convert_dsv4_jangtq, 2.5.50, with --profile 2 --variant std.
    """
    eight = ("attention", "shared_expert", "compressor", "indexer", "embed_tokens", "lm_head")
    widths = {"routed_expert": expert["bits"], **dict.fromkeys(eight, 8)}
    return {
        "routed_expert_bits": expert["bits"],
        "routed_expert_bit_plan": {"default_bits": expert["bits"], "codec": TURBO},
        "mxtq_bits": {**widths, "norms_router_hc": 16},
    }


def has_turboquant(names: Iterable[str]) -> bool:
    """Return True if a tensor's name shows that a bundle's experts are in TurboQuant."""
    return any(name.endswith(".tq_packed") for name in names)


def in_stacks(experts: Mapping[str, dict[str, Any] | None], mixed: bool = True) -> bool:
    """Return True if every expert has a label, and all of a stack the same; not mixed: of all."""
    firsts: dict[str, Any] = {}
    for base, label in experts.items():
        if label is None or firsts.setdefault(stack_of(base) if mixed else "", label) != label:
            return False
    return bool(experts)


def most_common_label(experts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the label that most matrices have."""
    counts = Counter(tuple(label.items()) for label in experts.values())
    return dict(counts.most_common(1)[0][0]) if counts else dict(EXPERT)


def fp8_bases(tensors: Mapping[str, TensorSpec | Tensor]) -> list[str]:
    """Return the storage names of the matrices stored as mxfp8, in the order of the tensors."""
    bases = [n.removesuffix(".scales") for n, t in tensors.items() if t.dtype == "U8"]
    return [base for base in bases if stored_label(tensors, base, {}) == MXFP8]


def parts_of(
    label: dict[str, Any], out: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return part → (dtype, shape) of a matrix (out, columns) that is stored by `label`.

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


def stored_label(
    tensors: Mapping[str, TensorSpec | Tensor], base: str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return `label_of` the tensors `base`.{weight,scales,biases}; columns by config.json."""
    parts = (tensors.get(f"{base}.{part}") for part in ("weight", "scales", "biases"))
    return label_of(*parts, columns_of(base, config))


def label_of(
    weight: TensorSpec | Tensor | None,
    scales: TensorSpec | Tensor | None,
    biases: TensorSpec | Tensor | None,
    columns: int = 0,
) -> dict[str, Any] | None:
    """Return the label that fits a module's parts on disk, or None if none does.

    columns: of the matrix, 0 if unknown. The widths alone do not tell 2 bits in groups of 64 from 4
    bits in groups of 32; without columns, groups of 32 are assumed. An affine triple is weight U32
    (out, columns · bits / 32), and scales and biases (out, columns / group) of one float dtype.
    Without biases: FP4 codes U32 (out, columns / 8) or FP8 codes U32 (out, columns / 4), and scales
    U8, one for 32 columns, or for 16 (NVFP4).
    """
    if weight is None or scales is None or weight.dtype != "U32":
        return None
    if not len(weight.shape) == len(scales.shape) == 2 or weight.shape[0] != scales.shape[0]:
        return None
    words, groups = weight.shape[1], scales.shape[1]
    if groups == 0 or words == 0 or 32 * words % groups:
        return None
    if biases is None:
        label = BY_BITS.get(32 * words // groups) if scales.dtype in ("U8", "F8_E8M0") else None
        return dict(label) if label else None
    if scales.dtype not in FLOATS or (biases.dtype, biases.shape) != (scales.dtype, scales.shape):
        return None
    width = columns // groups if columns % groups == 0 else 0
    for size in (width, *GROUPS):
        bits = 32 * words // groups // size if size in GROUPS else 0
        if bits in AFFINE_BITS and bits * size * groups == 32 * words:
            return affine_label(bits, size)
    return None


def turbo_label(
    packed: TensorSpec | Tensor, norms: TensorSpec | Tensor | None, columns: int
) -> dict[str, Any] | None:
    """Return the label of a matrix in TurboQuant, or None if no number of bits fits.

    Codes are U32, 32 // bits in a word, the first one lowest. Each row has a norm, F16, and is a
    group.
    """
    if norms is None or packed.dtype != "U32" or len(packed.shape) != 2 or not columns:
        return None
    if norms.dtype not in FLOATS or norms.shape != packed.shape[:1]:
        return None
    fits = [bits for bits in (2, 3, 4) if packed.shape[1] == -(-columns // (32 // bits))]
    return {"group_size": columns, "bits": fits[0], "mode": TURBO} if fits else None


def source_label(weight: TensorSpec | Tensor, scale: TensorSpec | Tensor) -> dict[str, Any] | None:
    """Return the label of a matrix in the source's own format, or None if it is not one.

    That is FP4 codes in I8, or FP8 codes, with scales beside them: UE8M0, or F32 as jang's native
    converter writes them.
    """
    if scale.dtype not in ("F32", "F8_E8M0", "U8") or len(weight.shape) != 2:
        return None
    bits = {"I8": 4, "U8": 4, "F8_E4M3": 8}.get(weight.dtype)
    out, width = weight.shape
    if bits is None:
        return None
    if bits == 4:
        fits = scale.shape == (out, 2 * width // GROUP)
    else:
        fits = block_of(weight.shape, scale.shape) is not None
    return {"group_size": GROUP, "bits": bits, "mode": SOURCE} if fits else None


def make_record(name: str, digest: str) -> dict[str, str]:
    """Return the entry of config.json that names the quantizer of the routed experts.

    It says also what became of MTP, unless that is stored as the other experts.
    """
    choice = mtp.choice_of(digest)
    kept = {"mtp": choice} if choice != mtp.AS_EXPERTS else {}
    return {"quantizer": name, "table": digest, **kept}


def recorded_quantizer(config: dict[str, Any]) -> str | None:
    """Return the quantizer that config.json records; None in a stock bundle."""
    return _recorded(config, "quantizer")


def recorded_mtp(config: dict[str, Any]) -> str:
    """Return the choice for MTP (mtp.py) that config.json records."""
    return mtp.choice_of(_recorded(config, "table"))


def _recorded(config: dict[str, Any], key: str) -> str | None:
    record = config.get(RECORD)
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, str) else None
