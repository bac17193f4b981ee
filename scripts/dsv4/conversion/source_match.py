"""Check that a source and a bundle belong together, before a byte of the bundle is changed."""

from __future__ import annotations

import numpy as np

from dsv4.conversion.shard_metadata import CONVERT
from dsv4.errors import UserError, with_path
from dsv4.model.bundle_tensors import missing_weights, weights_of
from dsv4.model.labels import AFFINE_BITS, GROUPS, TURBO2
from dsv4.model.load import expert_bases
from dsv4.model.names import (
    GROUP,
    expert_base,
    is_control,
    is_expert,
    parse_expert,
    parse_stack,
)
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.quantization.formats import Quantizer
from dsv4.storage.checkpoint import INDEX, Checkpoint
from dsv4.storage.safetensors_file import FLOATS, NUMPY_DTYPE, SAMPLE_BYTES, Shard, Tensor
from dsv4.storage.tensor_reader import as_float32

CHECK_FOLDERS = "check SOURCE and BUNDLE"
# Part of a routed expert → its possible dtypes. Each has shape (out, …).
KNOWN_PARTS = {
    "weight": ("U32",),
    "scales": ("U8", "F8_E8M0", "F16", "BF16", "F32"),
    "biases": ("F16", "BF16", "F32"),
    "tq_packed": ("U32",),
    "tq_norms": ("F16",),
    "tq_bits": ("I32", "U8"),
}


# --- Headers ------------------------------------------------------------------------------------


def check_bundle(source: Checkpoint, bundle: Checkpoint) -> None:
    """Raise UserError unless the bundle has all of the source's tensors, in known formats."""
    for key in ("num_hidden_layers", "n_routed_experts"):
        found, expected = bundle.config.get(key), source.config[key]
        if found != expected:
            where = f"{bundle.folder / 'config.json'}: {key}"
            raise UserError(where, repr(found), f"{expected} as in the source", CHECK_FOLDERS)
    _check_index(bundle)
    _check_complete(source, bundle)
    for name, tensor in bundle.tensors.items():
        if is_expert(name):
            _check_expert_part(source, tensor)
        elif name.endswith(".scales"):
            _check_eight_bits(source, bundle, tensor)
        elif is_control(name) and name in source.tensors:
            _expect_shape(tensor, source.tensors[name].shape)


def _check_index(bundle: Checkpoint) -> None:
    """Raise UserError unless index and shards agree, but for the changes of a killed run."""
    for name, file in bundle.weight_map.items():
        shard = bundle.shards[file]
        dropped = _may_change(name) and _was_requantized(shard)
        if name not in shard.tensors and not dropped:
            where = f"{bundle.folder / INDEX}: {name}"
            raise UserError(where, f"no such tensor in {file}", "it there", CONVERT)
    for file, shard in bundle.shards.items():
        for name, tensor in shard.tensors.items():
            indexed = bundle.shards.get(bundle.weight_map.get(name))
            added = (indexed is None or name not in indexed.tensors) and (
                (parse_expert(name) and name.endswith(".biases"))
                or (_may_change(name) and _was_requantized(shard))
            )
            listed = bundle.weight_map.get(name) == file or added
            if not listed or bundle.tensors.get(name, tensor) != tensor:
                where = f"{shard.path}: {name}"
                raise UserError(where, "no entry for it in the index", f"one in {INDEX}", CONVERT)


def _may_change(name: str) -> bool:
    """Return True for a tensor that only some storage formats of its module have."""
    return is_expert(name) or name.endswith((".biases", ".scales"))


def _was_requantized(shard: Shard) -> bool:
    return "requantize_quantizer" in shard.metadata


def _moves_to_stacks(shard: Shard) -> bool:
    """Return True for a shard from which a killed run may have dropped experts.

    Their stack may not have been written yet.
    """
    return quantizer_properties(shard.metadata.get("requantize_quantizer")).label == TURBO2


def _check_complete(source: Checkpoint, bundle: Checkpoint) -> None:
    """Raise UserError unless source and bundle have the same weights and experts."""
    bases = expert_bases(source)
    missing = missing_weights(weights_of(source.tensors), bundle.tensors)
    missing += [
        f"{base}.scales"
        for base in bases
        if f"{base}.weight" in bundle.tensors and f"{base}.scales" not in bundle.tensors
    ]
    if any(map(_moves_to_stacks, bundle.shards.values())):  # the stacks are made from the source
        missing = [name for name in missing if not parse_expert(name)]
    if missing:
        found = f"no {missing[0]} ({len(missing):,} tensors missing)"
        expected = "a counterpart for every tensor of the source"
        raise UserError(f"{bundle.folder}", found, expected, CONVERT)
    known = set(bases)
    for name in bundle.tensors:
        if parse_expert(name) and name.rpartition(".")[0] not in known:
            found = "an expert that the source does not have"
            expected = f"{len(bases):,} matrices"
            raise UserError(f"{bundle.folder}: {name}", found, expected, CHECK_FOLDERS)


def _check_expert_part(source: Checkpoint, tensor: Tensor) -> None:
    """Raise UserError unless a routed expert's tensor has a known part, dtype and shape."""
    base, _, part = tensor.name.rpartition(".")
    stack = parse_stack(tensor.name)
    if stack:
        base = expert_base("layers", stack[0], 0, stack[1])
    dtypes = KNOWN_PARTS.get(part, ())
    if tensor.dtype not in dtypes:
        expected = " or ".join(dtypes) or f"only {', '.join(KNOWN_PARTS)}"
        where = f"{tensor.path}: {tensor.name}"
        raise UserError(where, f"dtype {tensor.dtype}", expected, CONVERT)
    out, half = source.tensors[f"{base}.weight"].shape
    if part.startswith("tq_"):
        shape = {"tq_packed": (out, half // 8), "tq_norms": (out,), "tq_bits": (1,)}[part]
        in_stack = stack and part != "tq_bits"
        _expect_shape(tensor, (source.config["n_routed_experts"], *shape) if in_stack else shape)
    elif part == "weight":
        widths = [2 * half * bits // 32 for bits in AFFINE_BITS]
        _expect_shape(tensor, (out, half // 4), *((out, width) for width in widths))
    else:
        widths = [2 * half // size for size in GROUPS]
        _expect_shape(tensor, (out, 2 * half // GROUP), *((out, width) for width in widths))


def _check_eight_bits(source: Checkpoint, bundle: Checkpoint, scales: Tensor) -> None:
    """Raise UserError unless these scales belong to an 8-bit matrix with groups of 32.

    That is the label in config.json of every matrix but the routed experts.
    """
    name = scales.name.removesuffix("scales") + "weight"
    weight, original = bundle.tensors.get(name), source.tensors.get(name)
    if weight and weight.dtype in FLOATS and _was_requantized(bundle.shards[weight.path.name]):
        return  # a killed run has replaced the weight by the source's, and not yet its scales
    if weight is None or original is None or weight.dtype != "U32" or len(original.shape) != 2:
        raise UserError(f"{scales.path}: {scales.name}", "scales without a weight", "both", CONVERT)
    out, columns = original.shape
    _expect_shape(weight, (out, columns // 4))
    _expect_shape(scales, (out, columns // GROUP))


def _expect_shape(tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise UserError, which names the first of the shapes, unless the tensor has one of them."""
    if tensor.shape not in shapes:
        found, todo = f"shape {list(tensor.shape)}", f"{CHECK_FOLDERS}, or {CONVERT}"
        raise UserError(f"{tensor.path}: {tensor.name}", found, f"{list(shapes[0])}", todo)


# --- Samples of the values ----------------------------------------------------------------------


def check_samples(source: Checkpoint, shard: Shard) -> None:
    """Compare samples of a shard with the source. Raises UserError when they differ.

    Compared are the first SAMPLE_BYTES of the first and the last expert whose bytes are still the
    source's, and of every F32 control, which may be rounded to F16.
    """
    stock = [
        tensor for name, tensor in shard.tensors.items()
        if parse_expert(name) and name.endswith(".scales") and tensor.dtype in ("U8", "F8_E8M0")
        and name.removesuffix("s") in source.tensors  # MTP may be dropped
    ]  # fmt: skip
    for tensor in stock[:1] + stock[-1:]:
        original = source.tensors[tensor.name.removesuffix("s")]
        _expect_same(tensor, _sample(tensor), _sample(original))
    for name, tensor in shard.tensors.items():
        original = source.tensors.get(name)
        if not is_control(name) or original is None:
            continue
        values = as_float32(_sample(original).view(np.uint8), original.dtype)
        if tensor.dtype == "F16":
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
        elif tensor.dtype != "F32":
            continue
        found = _sample(tensor)
        number = min(len(found), len(values))
        _expect_same(tensor, found[:number], values[:number])


def is_copy(shard: Shard, source: Checkpoint, quantizer: Quantizer) -> bool:
    """Return True when the quantizer copies the source's bytes, and a stock shard has them already.

    Compares the middle SAMPLE_BYTES of every expert's part. Raises UserError when they are not the
    source's. Returns False for a shard whose metadata names its quantizer.
    """
    requantized = any(key.startswith("requantize_") for key in shard.metadata)
    if requantized or not quantizer.properties.accepts_stock:
        return False
    for name, tensor in shard.tensors.items():
        if parse_expert(name):
            original = source.tensors[name.removesuffix("s")]
            _expect_same(tensor, _sample(tensor, middle=True), _sample(original, middle=True))
    return True


def _sample(tensor: Tensor, middle: bool = False) -> np.ndarray:
    """Return the first SAMPLE_BYTES of a tensor, or those in its middle, flat in its dtype."""
    first = max(0, tensor.nbytes - SAMPLE_BYTES) // 2 if middle else 0
    with with_path(tensor.path), tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + first)
        data = file.read(min(SAMPLE_BYTES, tensor.nbytes))
    return np.frombuffer(data, NUMPY_DTYPE[tensor.dtype])


def _expect_same(tensor: Tensor, found: np.ndarray, expected: np.ndarray) -> None:
    """Raise UserError unless both arrays have the same bytes."""
    if found.tobytes() != expected.tobytes():
        raise UserError(
            f"{tensor.path}: {tensor.name}", "other values than the source's",
            "a bundle that was converted from this source", CHECK_FOLDERS,
        )  # fmt: skip
