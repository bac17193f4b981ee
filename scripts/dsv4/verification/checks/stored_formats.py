"""Find out from headers and config.json how each module of a bundle is stored."""

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

# The suffixes of a module's tensors ("parts"), and the sets of parts that a mode needs.
PARTS = ("weight", "scales", "biases", "scale", *TURBO_PARTS)
AFFINE_PARTS, MX_PARTS = ("weight", "scales", "biases"), ("weight", "scales")
TURBOQUANT_PARTS, SOURCE_PARTS = TURBO_PARTS[:2], ("weight", "scale")
LABEL_KEYS = ("group_size", "bits", "mode")


def display_name(bundle: Scan, name: str) -> str:
    """Return a storage name, and in parentheses the name on disk if it is another."""
    disk = bundle.view.name_on_disk(name)
    return name if disk == name else f"{name} ({disk})"


def config_label(config: dict[str, Any], base: str) -> dict[str, Any]:
    """Return config.json's label of a module: its own, or the top level's."""
    return own_label(config, base) or top_label(config_labels(config))


def own_label(config: dict[str, Any], base: str) -> dict[str, Any] | None:
    """Return config.json's label of a module by storage name or module path; None without one."""
    labels = config_labels(config)
    expert = parse_expert(f"{base}.weight")
    paths = [base, *(switch_paths(expert[1], expert[3]) if expert else module_paths(base))]
    return next((labels[path] for path in paths if isinstance(labels.get(path), dict)), None)


def config_labels(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's `quantization`; {} when it is no object."""
    labels = config.get("quantization")
    return labels if isinstance(labels, dict) else {}


def top_label(labels: dict[str, Any]) -> dict[str, Any]:
    """Return the label at the top level of `quantization`; keys that it lacks are None."""
    return {key: labels.get(key) for key in LABEL_KEYS}


def label_from_parts(parts: dict[str, Tensor], columns: int = 0) -> dict[str, Any] | None:
    """Return the label that fits a module's tensors, or None when none does."""
    if "tq_packed" in parts:
        return turbo_label(parts["tq_packed"], parts.get("tq_norms"), columns)
    if "scale" in parts and "weight" in parts:
        return source_label(parts["weight"], parts["scale"])
    return label_of(*(parts.get(part) for part in AFFINE_PARTS), columns)


def module_parts(bundle: Scan, base: str) -> dict[str, Tensor]:
    """Return part → tensor of the tensors `base`.{weight,scales,biases …} that exist."""
    tensors = bundle.tensors
    names = {part: f"{base}.{part}" for part in PARTS}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def label_at(bundle: Scan, base: str) -> dict[str, Any] | None:
    """Return the label that fits the tensors of the module `base`, or None."""
    return label_from_parts(module_parts(bundle, base), columns_of(base, bundle.config))


def counterpart_names(bundle: Scan, name: str, what: str) -> tuple[str, ...]:
    """Return the tensors that a bundle needs for the source weight `name`.

    what: its treatment. The tensors that the bundle has for it decide the mode.
    """
    base, tensors = name.removesuffix(".weight"), bundle.tensors
    if what not in ("expert", "matrix", "head"):
        return (name,)
    # Other tools leave some matrices unquantized.
    unquantized = name in tensors and tensors[name].dtype in FLOATS
    scales = tensors.get(f"{base}.scales")
    if f"{base}.tq_packed" in tensors:
        parts = TURBOQUANT_PARTS
    elif f"{base}.scale" in tensors:
        parts = SOURCE_PARTS
    elif unquantized and (what != "expert" or not bundle.is_ours):
        parts = ("weight",)
    elif what == "expert" or (scales is not None and scales.dtype in ("U8", "F8_E8M0")):
        parts = MX_PARTS  # `check_triple` reports an affine expert without biases
    else:
        parts = AFFINE_PARTS
    return tuple(f"{base}.{part}" for part in parts)


def shape_of(tensor: Tensor, label: dict[str, Any], columns: int) -> tuple[int, ...]:
    """Return the shape of the matrix whose codes a tensor holds."""
    rows, words = tensor.shape
    if label["mode"] == TURBO:
        return rows, columns
    if label["mode"] == SOURCE:
        return rows, words * (2 if label["bits"] == 4 else 1)
    return rows, words * 32 // label["bits"]
