"""Who made a shard: the metadata that a finished shard carries, so that a later run knows it."""

from __future__ import annotations

import hashlib

from dsv4.errors import UserError, with_path
from dsv4.quantization import mlx_affine
from dsv4.quantization.formats import Quantizer
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Shard, sample_ranges

CONVERT = "convert the source again (--profile 4 --format jang)"


def fingerprint(source: Checkpoint) -> str:
    """64 hex digits for this source: all headers, sizes, and a sample of each shard's data.

    Reads three times 4 KB a shard, so that two checkpoints of one shape are told apart.
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
    """The metadata that says who made a shard, of what, and in which version of the layout."""
    return {
        "requantize_layout": "1",
        "requantize_source": fingerprint(source) if source else "0" * 64,
        "requantize_quantizer": quantizer.name,
        "requantize_table": quantizer.digest,
    }


def is_made_by(shard: Shard, mark: dict[str, str]) -> bool:
    """True when `mark` made the shard, False when no requantize did or one with other settings.

    What another quantizer made is made again, from the source. Raises UserError for another
    source's.
    """
    if not any(key in shard.metadata for key in mark):
        return False
    found, expected = (of.get("requantize_source") for of in (shard.metadata, mark))
    if found != expected:
        raise UserError(
            f"{shard.path}",
            f"a shard made from source {found}",
            f"{expected}",
            f"go on with the source that it was made from, or {CONVERT}",
        )
    return all(shard.metadata.get(key) == value for key, value in mark.items())


def with_mlx_digest(quantizer: Quantizer) -> dict[str, str]:
    """The part of a native shard's mark that says by which MLX its 8-bit matrices were made."""
    return {} if quantizer.form.as_source else {"convert_matrices": mlx_affine.digest()}


def converted_by(source: Checkpoint | None, quantizer: Quantizer) -> dict[str, str]:
    """The metadata of a shard that was converted natively; requantize's own part included.

    Without a source that can be read, the mark is as long, and holds for sizes alone.
    """
    mine = {"convert_layout": "1", "convert_matrices": mlx_affine.digest()}
    return {"format": "mlx"} | made_by(source, quantizer) | mine
