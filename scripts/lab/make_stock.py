"""Write the bundle that upstream's converter makes of a small source; its answers are noise.

Tensors, bytes and labels equal those of `jang_tools.dsv4.convert_dsv4_jangtq` (2.5.9, --profile 4
--format jang; tests/test_native.py compares the two). Neither torch nor jang_tools is needed.
Routed experts are the source's FP4 bytes under a 4-bit affine label, controls are rounded to F16.
`make demo` and `make matrix` compare the right bundle with it. One shard, made in memory: for the
nano model and the sources of make_source.py.

    .venv/bin/python scripts/lab/make_stock.py --source DIR --bundle DIR

Exit status: 0 written, or there already; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import locations  # noqa: F401
import numpy as np

from dsv4.conversion.tokenizer_files import copy_tokenizer_files
from dsv4.errors import run
from dsv4.hub.provenance import source_name
from dsv4.model import configs, labels
from dsv4.model.bundle_tensors import StorageFormat
from dsv4.model.names import PROJECTION, kind, switch_paths
from dsv4.model.source import open_source
from dsv4.quantization import fp8, mlx_affine
from dsv4.storage.atomic import write_json
from dsv4.storage.checkpoint import INDEX, Checkpoint
from dsv4.storage.safetensors_file import FLOATS, PendingTensor, Tensor, read_array, write_shard
from dsv4.storage.tensor_reader import as_float32

SHARD = "model-00001-of-00001.safetensors"
# Answers of vMLX end after 300 tokens: one of upstream's faults that the stages repair.
UPSTREAMS_DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 300}
DTYPES = {"uint8": "U8", "uint32": "U32", "float16": "F16", "int64": "I64", "int32": "I32"}


def decode(weight: Tensor, scale: Tensor | None) -> np.ndarray:
    """Return an FP8, BF16, F16 or F32 tensor as float32 of its shape."""
    data = read_array(weight)
    if weight.dtype == "F8_E4M3":
        return fp8.decode(data, read_array(scale), scale.name)
    return as_float32(data.reshape(-1), weight.dtype).reshape(weight.shape)


def stock_arrays(weight: Tensor, scale: Tensor | None) -> dict[str, np.ndarray]:
    """Return the arrays that upstream stores for one tensor of the source, by storage name."""
    base, what = weight.name.removesuffix(".weight"), kind(weight.name)
    if what == "expert":
        codes = np.ascontiguousarray(read_array(weight)).view(np.uint32)
        return {weight.name: codes, f"{base}.scales": read_array(scale).view(np.uint8)}
    if what in ("matrix", "head"):
        parts = mlx_affine.quantize(decode(weight, scale))
        return {f"{base}.{part}": array for part, array in parts.items()}
    if weight.dtype not in FLOATS:
        return {weight.name: read_array(weight)}
    return {weight.name: decode(weight, scale).astype(np.float16)}


def stock_tensors(source: Checkpoint) -> Iterator[PendingTensor]:
    """Yield every tensor of the stock bundle."""
    for name, tensor in source.tensors.items():
        if kind(name) == "scale":
            continue
        scale = source.tensors.get(name.removesuffix("weight") + "scale")
        for key, array in stock_arrays(tensor, scale).items():
            data = np.ascontiguousarray(array)
            yield PendingTensor(key, DTYPES[data.dtype.name], data.shape, lambda data=data: [data])


def config_of(source: Checkpoint) -> dict:
    """Return config.json with upstream's labels: 8 bits, stacked experts 4 bits, all affine."""
    layers = range(source.config["num_hidden_layers"])
    paths = [switch_paths(layer, matrix)[0] for layer in layers for matrix in PROJECTION]
    quantization = labels.DEFAULT | {path: dict(labels.EXPERT) for path in paths}
    return configs.bundle_config(source, labels.EXPERT) | {"quantization": quantization}


def make(source: Checkpoint, folder: Path) -> None:
    """Write the stock bundle into `folder`."""
    tensors = list(stock_tensors(source))
    write_shard(folder / SHARD, tensors, {})
    write_json(folder / INDEX, {"weight_map": {tensor.name: SHARD for tensor in tensors}})
    write_json(folder / "config.json", config_of(source))
    jang = configs.jang_config(source, StorageFormat(labels.EXPERT), source_name(source.folder))
    jang["chat"]["sampling_defaults"] = UPSTREAMS_DEFAULTS
    write_json(folder / "jang_config.json", jang)
    copy_tokenizer_files(source.folder, folder, keep_edited=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    args = parser.parse_args()
    if (args.bundle / INDEX).is_file():
        print(f"{args.bundle}: there already")
        return 0
    source = open_source(args.source)
    args.bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=args.bundle.parent) as work:
        folder = Path(work) / "made"
        folder.mkdir()
        make(source, folder)
        folder.replace(args.bundle)
    print(f"{args.bundle}: the stock bundle of {args.source}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
