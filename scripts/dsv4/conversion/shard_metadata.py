"""The provenance metadata of a shard: its source and quantizer, by which a later run knows it."""

from __future__ import annotations

import hashlib

from dsv4.errors import UserError, with_path
from dsv4.quantization import mlx_affine
from dsv4.quantization.formats import Quantizer
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Shard, sample_ranges

CONVERT = "convert the source again (--profile 4 --format jang)"


def fingerprint(source: Checkpoint) -> str:
    """Return 64 hex digits that identify a source: of headers, sizes and samples of the data.

    Reads three samples of 4 KB from each shard, so that two checkpoints of one shape differ.
    """
    digest = hashlib.sha256()
    for file, shard in sorted(source.shards.items()):
        digest.update(f"{file} {shard.size}\n".encode())
        for name, tensor in sorted(shard.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with with_path(shard.path), shard.path.open("rb") as reader:
            for offset, nbytes in sample_ranges(shard):
                reader.seek(offset)
                digest.update(reader.read(nbytes))
    return digest.hexdigest()


def made_by(source: Checkpoint | None, quantizer: Quantizer) -> dict[str, str]:
    """Return the metadata that names a shard's source, quantizer and layout version.

    Without a source the fingerprint is zeros of the same length, so that sizes are right.
    """
    return {
        "requantize_layout": "1",
        "requantize_source": fingerprint(source) if source else "0" * 64,
        "requantize_quantizer": quantizer.name,
        "requantize_table": quantizer.digest,
    }


def is_made_by(shard: Shard, provenance: dict[str, str]) -> bool:
    """Return True when the shard has this metadata. Raises UserError for that of another source."""
    if not any(key in shard.metadata for key in provenance):
        return False
    found, expected = (of.get("requantize_source") for of in (shard.metadata, provenance))
    if found != expected:
        raise UserError(
            f"{shard.path}",
            f"a shard made from source {found}",
            f"{expected}",
            f"go on with the source that it was made from, or {CONVERT}",
        )
    return all(shard.metadata.get(key) == value for key, value in provenance.items())


def with_mlx_digest(quantizer: Quantizer) -> dict[str, str]:
    """Return the metadata that identifies the MLX which made a native shard's 8-bit matrices."""
    return {} if quantizer.form.as_source else {"convert_matrices": mlx_affine.digest()}


def converted_by(source: Checkpoint | None, quantizer: Quantizer) -> dict[str, str]:
    """Return the metadata of a shard that `convert` writes. It includes `made_by`."""
    native = {"convert_layout": "1", "convert_matrices": mlx_affine.digest()}
    return {"format": "mlx"} | made_by(source, quantizer) | native
