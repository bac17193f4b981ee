"""Estimate the time of a conversion before it, and sum it up afterwards."""

from __future__ import annotations

import contextlib
import time

from dsv4.conversion.expert_pieces import ErrorLog, QuantizePiece
from dsv4.model import mtp
from dsv4.quantization.source_reader import CopyTensorPiece
from dsv4.storage.atomic import format_bytes
from dsv4.storage.shard_writer import NewShard, WorkerBuffers
from dsv4.text import escape_line


def summary_line(counts: str, written: int, errors: ErrorLog, seconds: float) -> str:
    """Return one line: counts, bytes, seconds, rate, and the errors of the routed experts."""
    rate = f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    return f"{counts}, {format_bytes(written)} in {rate}" + describe_errors(errors)


def estimate_seconds(shards: list[NewShard], written: int, jobs: int) -> str:
    """Return a line with the estimated time.

    Measures reading and quantizing of the first pieces. Nothing is written.
    """
    buffers, seconds, done = WorkerBuffers(), 0.0, 0
    kinds = (QuantizePiece, CopyTensorPiece)
    pieces = [p for shard in shards[:4] for p in shard.pieces() if isinstance(p, kinds)]
    with contextlib.closing(buffers):
        for i, piece in enumerate(pieces[:17]):
            start = time.perf_counter()
            for _ in piece.blocks(buffers):
                pass
            if i:  # the first one loads the kernel
                seconds += time.perf_counter() - start
                done += piece.nbytes
    if not done:
        return "time: seconds"
    rate = done / seconds * jobs
    return (
        f"time: about {written / rate / 60:.1f} minutes with {jobs} jobs, at the "
        f"{rate / 1e6:,.0f} MB/s of reading and quantizing here; a slower disk takes longer"
    )


def describe_errors(errors: ErrorLog) -> str:
    """Return the relative errors, zeros and scale bytes in `errors`, as the end of a line."""
    line = ""
    if errors.stats:
        relative = {name: stats.relative for name, stats in errors.stats.items()}
        main = {name: error for name, error in relative.items() if error or not mtp.is_mtp(name)}
        relative = main or relative  # MTP is kept as in the source
        worst = max(relative, key=lambda name: relative[name])
        # About 8.5% for weights of a normal distribution: that is what mx.quantize makes of FP4.
        line += (
            f"; relative RMS error mean {sum(relative.values()) / len(relative):.2%}, "
            f"worst {relative[worst]:.2%} ({escape_line(worst)})"
        )
    lost = sum(stats.underflows for stats in errors.stats.values())
    if lost:
        line += f"; {lost:,} groups with a scale or bias that is 0 in F16"
    if errors.scales:
        name, number = next(iter(errors.scales.items()))
        line += (
            f"; FP8 scale bytes below 3 or above 246 in {len(errors.scales):,} tensors ({number:,} "
            f"in {name}): a runtime that decodes to BF16 rounds or overflows there"
        )
    return line
