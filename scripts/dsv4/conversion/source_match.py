"""Do a source and a bundle belong together? Asked before a byte of the bundle is changed."""

from __future__ import annotations

import numpy as np

from dsv4.conversion.shard_metadata import CONVERT
from dsv4.errors import UserError, with_path
from dsv4.model.bundle_tensors import missing_weights
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

# Which parts of a routed expert a bundle may hold, and in which dtypes; each has shape (out, …).
KNOWN_PARTS = {
    "weight": ("U32",),
    "scales": ("U8", "F8_E8M0", "F16", "BF16", "F32"),
    "biases": ("F16", "BF16", "F32"),
    "tq_packed": ("U32",),
    "tq_norms": ("F16",),
    "tq_bits": ("I32", "U8"),
}


def check_bundle(source: Checkpoint, bundle: Checkpoint) -> None:
    """Raise UserError unless the bundle holds all of the source's tensors, in forms that we
    know."""
    for key in ("num_hidden_layers", "n_routed_experts"):
        if bundle.config.get(key) != source.config[key]:
            raise UserError(
                f"{bundle.folder / 'config.json'}: {key}",
                repr(bundle.config.get(key)),
                f"{source.config[key]} as in the source",
                "check SOURCE and BUNDLE",
            )
    _check_entries(bundle)
    _check_complete(source, bundle)
    for name, tensor in bundle.tensors.items():
        if is_expert(name):
            _check_part(source, tensor)
        elif name.endswith(".scales"):
            _check_eight_bits(source, bundle, tensor)
        elif is_control(name) and name in source.tensors:
            _expect_shape(tensor, source.tensors[name].shape)


def _check_entries(bundle: Checkpoint) -> None:
    """Index and shards must agree, but for what a killed run added or dropped."""
    index = bundle.folder / INDEX
    for name, file in bundle.weight_map.items():
        shard = bundle.shards[file]
        dropped = _may_change(name) and _was_requantized(shard)
        if name not in shard.tensors and not dropped:
            raise UserError(f"{index}: {name}", f"no such tensor in {file}", "it there", CONVERT)
    for file, shard in bundle.shards.items():
        for name, tensor in shard.tensors.items():
            there = bundle.shards.get(bundle.weight_map.get(name))
            new = (there is None or name not in there.tensors) and (
                (parse_expert(name) and name.endswith(".biases"))
                or (_may_change(name) and _was_requantized(shard))
            )
            if (bundle.weight_map.get(name) != file and not new) or bundle.tensors[name] != tensor:
                raise UserError(
                    f"{shard.path}: {name}", "no entry for it in the index", f"one in {INDEX}",
                    CONVERT,
                )  # fmt: skip


def _may_change(name: str) -> bool:
    """True for parts that some forms of a module have and others have not."""
    if is_expert(name):
        return True
    return name.endswith(".biases") or (name.endswith(".scales") and not parse_expert(name))


def _moves_to_stacks(shard: Shard) -> bool:
    """A killed run has dropped experts here whose stack may not have been written yet."""
    return quantizer_properties(shard.metadata.get("requantize_quantizer")).label == TURBO2


def _was_requantized(shard: Shard) -> bool:
    return "requantize_quantizer" in shard.metadata


def _check_complete(source: Checkpoint, bundle: Checkpoint) -> None:
    bases = expert_bases(source)
    known = set(bases)
    wanted = [name for name in source.tensors if not name.endswith(".scale")]
    missing = missing_weights(wanted, bundle.tensors)
    missing += [
        f"{base}.scales"
        for base in bases
        if f"{base}.weight" in bundle.tensors and f"{base}.scales" not in bundle.tensors
    ]
    if any(_moves_to_stacks(shard) for shard in bundle.shards.values()):
        missing = [name for name in missing if not parse_expert(name)]  # they come from the source
    if missing:
        raise UserError(
            f"{bundle.folder}",
            f"no {missing[0]} ({len(missing):,} tensors missing)",
            "a counterpart for every tensor of the source",
            CONVERT,
        )
    for name in bundle.tensors:
        if parse_expert(name) and name.rpartition(".")[0] not in known:
            raise UserError(
                f"{bundle.folder}: {name}",
                "an expert that the source does not have",
                f"{len(bases):,} matrices",
                "check SOURCE and BUNDLE",
            )


def _check_part(source: Checkpoint, tensor: Tensor) -> None:
    base, _, part = tensor.name.rpartition(".")
    layer, matrix, _ = parse_stack(tensor.name) or (0, "", "")
    base = expert_base("layers", layer, 0, matrix) if matrix else base
    dtypes = KNOWN_PARTS.get(part, ())
    if tensor.dtype not in dtypes:
        raise UserError(
            f"{tensor.path}: {tensor.name}",
            f"dtype {tensor.dtype}",
            " or ".join(dtypes) or f"only {', '.join(KNOWN_PARTS)}",
            CONVERT,
        )
    out, half = source.tensors[f"{base}.weight"].shape
    if part.startswith("tq_"):
        _check_turbo(source, tensor, (out, half // 8), matrix != "")
        return
    fits = [2 * half // size for size in GROUPS] if part != "weight" else [
        2 * half * bits // 32 for bits in AFFINE_BITS
    ]  # fmt: skip
    if tensor.shape not in [(out, width) for width in fits]:
        _expect_shape(tensor, (out, 2 * half // (GROUP if part != "weight" else 8)))


def _check_turbo(
    source: Checkpoint, tensor: Tensor, codes: tuple[int, ...], is_stack: bool
) -> None:
    """One expert's part, or that of a stack of them; codes: the shape of one's 2-bit codes."""
    if tensor.name.endswith(".tq_bits"):
        codes, is_stack = (1,), False
    elif tensor.name.endswith(".tq_norms"):
        codes = codes[:1]
    number = (source.config["n_routed_experts"],) if is_stack else ()
    _expect_shape(tensor, number + codes)


def _check_eight_bits(source: Checkpoint, bundle: Checkpoint, scales: Tensor) -> None:
    """The label that config.json gets says 8 bits, group 32 for everything but the experts."""
    weight = bundle.tensors.get(scales.name.removesuffix("scales") + "weight")
    origin = source.tensors.get(scales.name.removesuffix("scales") + "weight")
    if weight and weight.dtype in FLOATS and _was_requantized(bundle.shards[weight.path.name]):
        return  # a killed run has made the weight what the source has, and not come to its scales
    if weight is None or origin is None or weight.dtype != "U32" or len(origin.shape) != 2:
        raise UserError(f"{scales.path}: {scales.name}", "scales without a weight", "both", CONVERT)
    out, columns = origin.shape
    _expect_shape(weight, (out, columns // 4))
    _expect_shape(scales, (out, columns // GROUP))


def _expect_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.path}: {tensor.name}", f"shape {list(tensor.shape)}", f"{list(shape)}",
            f"check SOURCE and BUNDLE, or {CONVERT}",
        )  # fmt: skip


def check_samples(source: Checkpoint, shard: Shard) -> None:
    """Compare a little of what a shard kept of the source. Raises UserError when it is another's.

    Looked at: 4 KB of the first and the last expert that still holds the source's own bytes, and
    of every control, which is the source's F32 or that rounded to F16.
    """
    stock = [
        t for name, t in shard.tensors.items()
        if parse_expert(name) and name.endswith(".scales") and t.dtype in ("U8", "F8_E8M0")
    ]  # fmt: skip
    for tensor in stock[:1] + stock[-1:]:
        origin = source.tensors[tensor.name.removesuffix("s")]
        _expect_same(tensor, _first_bytes(tensor), _first_bytes(origin))
    for name, tensor in shard.tensors.items():
        origin = source.tensors.get(name)
        if not is_control(name) or origin is None:
            continue
        values = as_float32(_first_bytes(origin).view(np.uint8), origin.dtype)
        if tensor.dtype == "F16":
            with np.errstate(over="ignore"):
                expected = values.astype(np.float16)
        elif tensor.dtype == "F32":
            expected = values
        else:
            continue
        found = _first_bytes(tensor)
        number = min(len(found), len(expected))
        _expect_same(tensor, found[:number], expected[:number])


def _first_bytes(tensor: Tensor) -> np.ndarray:
    """The first SAMPLE_BYTES of a tensor, flat."""
    with with_path(tensor.path), tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(min(SAMPLE_BYTES, tensor.nbytes))
    return np.frombuffer(data, NUMPY_DTYPE[tensor.dtype])


def _expect_same(tensor: Tensor, found: np.ndarray, expected: np.ndarray) -> None:
    if found.tobytes() != expected.tobytes():
        raise UserError(
            f"{tensor.path}: {tensor.name}",
            "other values than the source's",
            "a bundle that was converted from this source",
            "check SOURCE and BUNDLE",
        )


def is_copy(shard: Shard, source: Checkpoint, quantizer: Quantizer) -> bool:
    """True when the quantizer wants the source's bytes and a stock shard has them already.

    Looks at the middle SAMPLE_BYTES of every expert's part. Raises UserError when they are not the
    source's. A shard that requantize made says in its metadata what it holds.
    """
    marked = any(key.startswith("requantize_") for key in shard.metadata)
    if marked or not quantizer.properties.accepts_stock:
        return False
    for name, tensor in shard.tensors.items():
        if parse_expert(name):
            _expect_same(
                tensor, _middle_bytes(tensor), _middle_bytes(source.tensors[name.removesuffix("s")])
            )
    return True


def _middle_bytes(tensor: Tensor) -> np.ndarray:
    """SAMPLE_BYTES bytes from the middle of a tensor, or all of it when it is smaller."""
    with with_path(tensor.path), tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + max(0, tensor.nbytes - SAMPLE_BYTES) // 2)
        return np.frombuffer(file.read(min(SAMPLE_BYTES, tensor.nbytes)), np.uint8)
