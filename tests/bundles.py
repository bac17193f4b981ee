"""Bundles for verify's tests: judged in this process, damaged byte by byte or tensor by tensor."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsv4.model.load import open_bundle
from dsv4.model.names import parse_expert
from dsv4.model.naming_schemes import SCHEMES
from dsv4.model.storage_view import build_view
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import (
    NUMPY_DTYPE,
    PendingTensor,
    Tensor,
    read_array,
    read_shard,
    write_shard,
)
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers import compare
from dsv4.verification.report.findings import Findings
from dsv4.verification.verify import VerifyOptions, verify

Arrays = dict[str, tuple[str, np.ndarray]]  # name → (safetensors dtype, array)


def judge(bundle: Path, source: Path | None, loader: bool = False, level: int = 2) -> Findings:
    """What verify finds in `bundle`; without `loader` the toolchain is not asked.

    In small blocks, so that also of these small tensors most rows are compared by their bytes.
    """
    before, compare.BLOCK_WEIGHTS = compare.BLOCK_WEIGHTS, 1 << 11
    options = VerifyOptions(
        bundle, source, level, Path(sys.executable), without_loader=not loader, jobs=2
    )
    try:
        return verify(options).findings
    finally:
        compare.BLOCK_WEIGHTS = before


def places(findings: Findings, name: str) -> str:
    """Everything that a finding says of its places, in one string."""
    found = next(finding for finding in findings if finding.name == name)
    return " ".join(" ".join(place.values()) for place in found.places)


def load(folder: Path) -> Arrays:
    """All tensors of a bundle."""
    tensors = open_bundle(folder).tensors
    return {name: (tensor.dtype, read_array(tensor).copy()) for name, tensor in tensors.items()}


def save(folder: Path, arrays: Arrays, shards: int, metadata: dict[str, str]) -> None:
    """Write all tensors anew as `shards` shards with index, in place of the ones that are there."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    names = list(arrays)
    bounds = np.linspace(0, len(names), shards + 1).astype(int)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[bounds[i] : bounds[i + 1]]
        planned = [
            PendingTensor(name, dtype, array.shape, lambda a=array: [np.ascontiguousarray(a)])
            for name in mine
            for dtype, array in [arrays[name]]
        ]
        write_shard(folder / file, planned, metadata)
        weight_map |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(bundle: Path, folder: Path, shards: int = 4, marks: bool = True) -> Path:
    """A copy of `bundle` over several shards, triples torn apart; without marks: made elsewhere."""
    shutil.copytree(bundle, folder)
    metadata = next(iter(open_bundle(bundle).shards.values())).metadata
    arrays = load(folder)
    save(folder, arrays, shards, metadata if marks else {"format": "mlx"})
    return folder


def edit(folder: Path, change: Callable[[Arrays], object]) -> None:
    """Change tensors as arrays, and write everything anew."""
    shards = sorted(folder.glob("*.safetensors"))
    metadata = read_shard(shards[0]).metadata
    arrays = load(folder)
    change(arrays)
    save(folder, arrays, len(shards), metadata)


def flip(folder: Path, name: str, byte: int = 0, bit: int = 0) -> None:
    """Flip one bit of a tensor's data, in its file."""
    tensor = open_bundle(folder).tensors[name]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + byte)
        value = file.read(1)[0]
        file.seek(tensor.offset + byte)
        file.write(bytes([value ^ 1 << bit]))


def write_numbers(folder: Path, name: str, first: int, values: list[float]) -> None:
    """Put numbers into a tensor from element `first` on, in its file."""
    tensor = open_bundle(folder).tensors[name]
    data = np.array(values).astype(NUMPY_DTYPE[tensor.dtype])
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + first * data.itemsize)
        file.write(data.tobytes())


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def relaid(specimen: Path, folder: Path, layout: str) -> Path:
    """A copy of a bundle under the names and in the shapes of another layout, by its table; the
    labels go along. What the table has no name for (MTP) is left out.
    """
    shutil.copytree(specimen, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    view, target = build_view(open_bundle(specimen)), SCHEMES[layout]
    arrays, stacks = {}, {}
    for name, tensor in view.tensors.items():
        disk = target.runtime_name(name)
        array = read_whole(tensor)
        if disk is None:
            continue
        if disk.endswith((".G.weight", ".G.scales", ".G.biases")):
            for block, rows in enumerate(np.split(array, 2)):
                arrays[disk.replace(".G.", f".{block}.")] = tensor.dtype, rows
        elif parse_expert(name) and target.locate(disk).stacked:
            stacks.setdefault((disk, tensor.dtype), []).append(array)
        else:
            arrays[disk] = tensor.dtype, array
    arrays |= {disk: (dtype, np.stack(some)) for (disk, dtype), some in stacks.items()}
    save(folder, arrays, 2, {"format": "mlx"})

    def rename(config: dict) -> None:
        labels = {}
        for key, label in config["quantization"].items():
            place = (
                view.recognized.scheme.locate(f"{key}.weight") if isinstance(label, dict) else None
            )
            one = place.name.replace(".E.", ".0.") if place else ""
            new = target.runtime_name(one) if place else key
            labels[(new or key).removesuffix(".weight").removesuffix(".G")] = label
        config["quantization"] = labels
        config.pop("quantization_config", None)

    edit_json(folder / "config.json", rename)
    return folder


def read_whole(tensor: Tensor) -> np.ndarray:
    """A tensor of a view as an array."""
    reader = TensorReader()
    data = reader.read(tensor).copy()
    reader.close()
    return data.view(NUMPY_DTYPE[tensor.dtype]).reshape(tensor.shape)
