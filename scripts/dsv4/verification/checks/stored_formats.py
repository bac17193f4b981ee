"""Read from headers and config.json how each module of a bundle is stored."""

from __future__ import annotations

from typing import Any

from dsv4.model.labels import (
    SOURCE,
    TURBO,
    TURBO_PARTS,
    label_of,
    source_label,
    turbo_label,
)
from dsv4.model.names import columns_of, module_paths, parse_expert, switch_paths
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.verification.scan import Scan

# A module's tensors by what follows its name, and which of them go together.
PARTS = ("weight", "scales", "biases", "scale", *TURBO_PARTS)
FORMS = (
    ("weight", "scales", "biases"), ("weight", "scales"), TURBO_PARTS[:2],
    ("weight", "scale"),
)  # fmt: skip


def display_name(bundle: Scan, name: str) -> str:
    """A storage name, and what it is called on disk where that is another."""
    disk = bundle.view.name_on_disk(name)
    return name if disk == name else f"{name} ({disk})"


def config_label(config: dict[str, Any], base: str) -> dict[str, Any]:
    """The label that stands under a storage name, else the one under its module path, else {}."""
    labels = config.get("quantization")
    labels = labels if isinstance(labels, dict) else {}
    expert = parse_expert(f"{base}.weight")
    paths = [base, *(switch_paths(expert[1], expert[3]) if expert else module_paths(base))]
    found = next((labels[path] for path in paths if isinstance(labels.get(path), dict)), None)
    return found or {key: labels.get(key) for key in ("group_size", "bits", "mode")}


def stored_label(has: dict[str, Tensor], columns: int = 0) -> dict[str, Any] | None:
    """The label that fits a module's parts on disk, or None when none does."""
    if "tq_packed" in has:
        return turbo_label(has["tq_packed"], has.get("tq_norms"), columns)
    if "scale" in has and "weight" in has:
        return source_label(has["weight"], has["scale"])
    return label_of(*(has.get(part) for part in ("weight", "scales", "biases")), columns)


def module_parts(bundle: Scan, base: str) -> dict[str, Tensor]:
    """The tensors `base`.{weight,scales,biases …} that are there."""
    tensors = bundle.tensors
    names = {part: f"{base}.{part}" for part in PARTS}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def label_at(bundle: Scan, base: str) -> dict[str, Any] | None:
    """How the module of that storage name is stored."""
    return stored_label(module_parts(bundle, base), columns_of(base, bundle.config))


def wanted_keys(bundle: Scan, name: str, what: str) -> tuple[str, ...]:
    """The tensors that hold a source tensor's weight, by the form in which the bundle has it."""
    base, tensors = name.removesuffix(".weight"), bundle.tensors
    if what not in ("expert", "matrix", "head"):
        return (name,)
    if f"{base}.tq_packed" in tensors:
        return tuple(f"{base}.{part}" for part in FORMS[2])
    if f"{base}.scale" in tensors:
        return tuple(f"{base}.{part}" for part in FORMS[3])
    # other tools quantize the head, or leave a matrix
    if (
        name in tensors
        and tensors[name].dtype in FLOATS
        and (what != "expert" or not bundle.is_ours)
    ):
        return (name,)
    scales = tensors.get(f"{base}.scales")
    plain = scales is not None and scales.dtype in ("U8", "F8_E8M0")  # MXFP4 and FP8: no biases
    # of an expert where affine lacks them, its triple tells
    return quantized_keys(name)[: 2 if plain or what == "expert" else 3]


def quantized_keys(name: str) -> tuple[str, ...]:
    """The parts of a matrix that is quantized."""
    return tuple(f"{name.removesuffix('weight')}{part}" for part in ("weight", "scales", "biases"))


def shape_of(tensor: Tensor, label: dict[str, Any], columns: int) -> tuple[int, ...]:
    """The shape of the matrix whose codes a tensor holds."""
    rows, words = tensor.shape
    if label["mode"] == TURBO:
        return rows, columns
    if label["mode"] == SOURCE:
        return rows, words * (2 if label["bits"] == 4 else 1)
    return rows, words * 32 // label["bits"]
