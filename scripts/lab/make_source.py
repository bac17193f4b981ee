"""Write a small random-weight checkpoint in DeepSeek-V4's exact source layout.

Tests need a source of any size that has every kind of tensor: hash-routed and routed layers,
attention with compress ratios 0, 4 and 128 (compressor, indexer), shared experts, MTP or, with
--dspark, DSpark; with --vision a vision tower; in FP4, FP8, BF16, F32 and integers; over several
shards that split weights from their scales.
Tokenizer and encoding are those of the nano checkpoint. Its answers are noise.

    .venv/bin/python scripts/lab/make_source.py --source build/random --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from locations import NANO
from source_tensors import Sizes, Writer, headers, tensors, with_dspark, with_vision

from dsv4.errors import UserError, run
from dsv4.storage.atomic import copy_file, write_json
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import PendingTensor, write_shard
from nano import architecture

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "encoding/encoding_dsv4.py",
)


def config_of(sizes: Sizes) -> dict:
    """Return config.json as DeepSeek-V4's source has it, for these sizes."""
    named = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(sizes).items()
        if (sizes.dspark_markov_rank or not key.startswith("dspark_"))
        and (sizes.vision_n_layers or not key.startswith("vision_"))
    }
    rope = {"factor": 4, "original_max_position_embeddings": 1024}
    config = architecture.source_config(architecture.NANO)
    config["rope_scaling"] |= rope
    return {**config, "max_position_embeddings": 4096, **named}


def write_source(folder: Path, sizes: Sizes, seed: int, shards: int) -> int:
    """Write the checkpoint as `shards` shards of equal tensor counts; return the tensor count.

    A weight and its scale may be in different shards. One tensor is in memory at a time.
    """
    planned = list(headers(sizes).values())
    arrays = (array for _, (_, array) in tensors(sizes, Writer(seed)))
    bounds = np.linspace(0, len(planned), shards + 1).astype(int)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = [
            PendingTensor(t.name, t.dtype, t.shape, lambda: [np.ascontiguousarray(next(arrays))])
            for t in planned[bounds[number] : bounds[number + 1]]
        ]
        write_shard(folder / file, part, {"format": "pt"})
        weight_map.update({tensor.name: file for tensor in part})
    size = sum(tensor.nbytes for tensor in planned)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", config_of(sizes))
    copy_tokenizer(folder)
    return len(planned)


def copy_tokenizer(folder: Path) -> None:
    """Copy the nano checkpoint's tokenizer and encoding."""
    (folder / "encoding").mkdir(exist_ok=True)
    for name in TOKENIZER:
        copy_file(NANO / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder to write; must be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON: fields of Sizes")
    parser.add_argument("--dspark", action="store_true", help="DSpark in place of MTP")
    parser.add_argument("--vision", action="store_true", help="a vision tower as well")
    args = parser.parse_args()
    if args.source.exists() and any(args.source.iterdir()):
        raise UserError(
            f"{args.source}", "a folder with files", "an empty folder", "choose another"
        )
    args.source.mkdir(parents=True, exist_ok=True)
    sizes = replace(Sizes(), **args.sizes)
    sizes = with_dspark(sizes) if args.dspark else sizes
    sizes = with_vision(sizes) if args.vision else sizes
    number = write_source(args.source, sizes, args.seed, args.shards)
    print(f"{args.source}: {number} tensors in {args.shards} shards, seed {args.seed}",
          file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
