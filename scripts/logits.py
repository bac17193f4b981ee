"""Compute a model's next-token logits with the toolchain's own model code.

Reads token ids as JSON from stdin ([[...], ...]) and writes one float32 .npy of shape (prompts,
vocabulary): the logits after the last token of each prompt; with --every, (tokens, vocabulary):
those after every token of every prompt, one below the other. Runs in the toolchain's Python.

    --how loader      the bundle through jang_tools.load_jangtq, as vMLX loads it
    --how tensors     the bundle's tensors dequantized to float32, so without any label
    --how source      the FP4/FP8 source decoded to float32

    .venv/bin/python scripts/logits.py --folder DIR --how loader --out FILE.npy < prompts.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np

from dsv4 import fp4, fp8
from dsv4.checkpoint import Checkpoint, open_bundle, open_source
from dsv4.labels import stored_label
from dsv4.shard import Tensor, read_array
from dsv4.stop import Stop, run


def decode_source(source: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of the source by storage name, FP4 and FP8 decoded, floats as float32."""
    tensors = source.tensors
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            continue
        array = read_array(tensor)
        scale = tensors.get(name.removesuffix(".weight") + ".scale")
        if tensor.dtype in ("I8", "F8_E4M3"):
            decode = fp4.decode if tensor.dtype == "I8" else fp8.decode
            array = decode(array, read_array(scale), name)
        out[name] = as_float(tensor, array)
    return out


def as_float(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """BF16 and F16 as float32; everything else as it is."""
    if tensor.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if tensor.dtype == "F16" else array


def decode_bundle(bundle: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of the bundle by storage name, dequantized by its shapes, not by its label.

    FP4 bytes are decoded as what they are, whatever their label. Raises Stop when scales belong to
    nothing that MLX could dequantize.
    """
    import mlx.core as mx

    tensors, out = bundle.tensors, {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        label = stored_label(tensors, base)
        if part in ("scales", "biases") and label is None:
            raise Stop(f"{bundle.folder}: {name}", "no whole module", "one", "run requantize")
        if label is None:
            out[name] = as_float(tensor, read_array(tensor))
        elif part == "weight":
            parts = [read_array(tensors[f"{base}.{p}"]) for p in parts_of(label)]
            floats = (p if p.dtype == np.uint8 else p.astype(np.float32) for p in parts)
            packed = mx.array(read_array(tensor))
            decoded = mx.dequantize(packed, *map(mx.array, floats), **label)
            out[name] = np.array(decoded.astype(mx.float32))
    return out


def parts_of(label: dict) -> tuple[str, ...]:
    """What belongs to a module's weight: exponents alone for FP4, else scales and biases."""
    return ("scales",) if label["mode"] == "mxfp4" else ("scales", "biases")


def plain_model(config: dict, weights: dict[str, np.ndarray]):
    """jang_tools' model with these float32 weights; every parameter must receive one."""
    import mlx.core as mx
    from jang_tools.dsv4 import mlx_model
    from mlx.utils import tree_flatten

    model = mlx_model.Model(mlx_model.ModelArgs.from_dict(config))
    named = model.sanitize({name: mx.array(array) for name, array in weights.items()})
    parameters = dict(tree_flatten(model.parameters()))
    if odd := set(named) ^ set(parameters):
        raise Stop(f"{sorted(odd)[0]}", "no match", "a tensor for every parameter", "see names.py")
    # Not strict: jang 2.5.9 declares attn_sink in a shape that no checkpoint has, and ignores it.
    model.load_weights(list(named.items()), strict=False)
    return model


def load(folder: Path, how: str):
    """The model of `folder`, made as `how` says."""
    if how == "loader":
        from jang_tools.load_jangtq import load_jangtq_model

        with contextlib.redirect_stdout(sys.stderr):
            return load_jangtq_model(folder)[0]
    opened = open_source(folder) if how == "source" else open_bundle(folder)
    decoded = decode_source(opened) if how == "source" else decode_bundle(opened)
    return plain_model(opened.config, decoded)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="source or bundle")
    parser.add_argument("--how", choices=("loader", "tensors", "source"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", action="store_true", help="after every token, not the last only")
    args = parser.parse_args()
    import mlx.core as mx

    prompts = json.load(sys.stdin)
    model = load(args.folder, args.how)
    first = None if args.every else -1
    rows = (model(mx.array([ids]))[0, first:].astype(mx.float32) for ids in prompts)
    np.save(args.out, np.concatenate([np.array(row) for row in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
