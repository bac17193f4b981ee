"""Write a bundle's index, sidecar and quantizer record, and remove files of killed runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsv4.conversion.job_array import JobPart
from dsv4.errors import UserError
from dsv4.model.labels import make_record
from dsv4.quantization import turboquant
from dsv4.quantization.formats import Quantizer
from dsv4.storage import safe_paths
from dsv4.storage.atomic import TEMPORARY_SUFFIX, temporary_for, write_json
from dsv4.storage.checkpoint import INDEX, SIDECAR, read_json
from dsv4.storage.safetensors_file import Tensor, TensorSpec, header_bytes, read_shard


def sidecar_bytes(columns: Iterable[int]) -> bytes:
    """Return the bytes of jangtq_runtime.safetensors for rows of these lengths."""
    arrays = {f"signs.{n}.{turboquant.SEED}": turboquant.signs(n) for n in columns}
    arrays |= {f"codebook.{n}.{turboquant.BITS}": turboquant.codebook(n) for n in columns}
    slots = [TensorSpec(name, "F32", array.shape) for name, array in sorted(arrays.items())]
    return b"".join([header_bytes(slots, {}), *(arrays[slot.name].tobytes() for slot in slots)])


def write_index(folder: Path, shards: Mapping[str, Iterable[TensorSpec | Tensor]]) -> bool:
    """Write the index of these shards' tensors and return True if it changed.

    Other keys of an existing index are kept. Raises UserError when it is not a JSON object.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    tensors = {
        tensor.name: (file, tensor.nbytes) for file, specs in shards.items() for tensor in specs
    }
    metadata = index.get("metadata")
    total = sum(nbytes for _, nbytes in tensors.values())
    index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
    index["weight_map"] = {name: file for name, (file, _) in sorted(tensors.items())}
    return write_json(folder / INDEX, index)


def quantizer_record(quantizer: Quantizer) -> dict[str, str]:
    """Return the entry of config.json that names the quantizer of the routed experts."""
    return make_record(quantizer.name, quantizer.digest)


def remove_leftovers(bundle: Path, files: list[str], part: JobPart) -> None:
    """Remove the temporary files of killed runs, or of this part's shards alone.

    A whole run also removes shards without tensors that a killed run left. Links and folders are
    kept. files: the names of the bundle's shards.
    """
    if part.whole:
        leftovers = list(bundle.glob(f".*{TEMPORARY_SUFFIX}"))
        others = sorted({path.name for path in bundle.glob("*.safetensors")} - {*files, SIDECAR})
        leftovers += [bundle / name for name in others if is_empty_shard(bundle, name)]
    else:
        leftovers = [temporary_for(bundle / file) for file in part.select(files)]
    for path in leftovers:
        if safe_paths.file_type(bundle, path.name) == safe_paths.FILE:
            safe_paths.remove(bundle, path.name)


def is_empty_shard(bundle: Path, name: str) -> bool:
    """Return True for a shard that requantize left without tensors: its experts are in stacks."""
    if (
        safe_paths.file_type(bundle, name) != safe_paths.FILE
        or (bundle / name).stat().st_size > 1 << 16
    ):
        return False
    with contextlib.suppress(UserError):
        shard = read_shard(bundle / name)
        return not shard.tensors and "requantize_layout" in shard.metadata
    return False
