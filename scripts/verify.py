"""Check a bundle's files, index, tensors and labels by headers and JSON alone.

Files and stop tokens; index and shards in both directions; every tensor of the source, when one is
named, has its counterpart; every quantized module has its triple; control tensors are F32; the
label in config.json that a loader will use for each module agrees with the tensors on disk. Seconds
on a 180 GB bundle, because no tensor is read.

Prints one line for each check. Exit 0: everything was checked and holds; 1: it does not.

    .venv/bin/python scripts/verify.py --bundle DIR [--source DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv4.chat import token_ids
from dsv4.checkpoint import (
    Checkpoint,
    check_experts,
    check_index,
    count,
    expert_bases,
    open_bundle,
    open_source,
    read_json,
)
from dsv4.labels import stored_label
from dsv4.names import PROJECTION, bundle_keys, expert_base, is_control, switch_paths
from dsv4.stop import Stop, run

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "encoding/encoding_dsv4.py",
)
TRIPLE = ("weight", "scales", "biases")


def fail(bundle: Checkpoint, what: str, found: str, expected: str, todo: str) -> Stop:
    return Stop(f"{bundle.folder}: {what}", found, expected, todo)


def check_files(bundle: Checkpoint) -> str:
    missing = [name for name in FILES if not (bundle.folder / name).is_file()]
    if missing:
        raise fail(bundle, missing[0], "no such file", "it", "run finalize, then patch")
    return f"{len(FILES)} files"


def check_stop_tokens(bundle: Checkpoint) -> str:
    eos = token_ids(bundle.folder)
    for name in ("config.json", "generation_config.json"):
        found = read_json(bundle.folder / name).get("eos_token_id")
        if found != eos:
            raise fail(bundle, f"{name}: eos_token_id", f"{found}", f"{eos}", "run patch")
    if not read_json(bundle.folder / "tokenizer_config.json").get("chat_template"):
        raise fail(bundle, "tokenizer_config.json", "no chat_template", "one", "run patch")
    return f"stop tokens {eos}, chat template"


def check_shards(bundle: Checkpoint) -> str:
    check_index(bundle, "requantize")
    on_disk = {path.name for path in bundle.folder.glob("*.safetensors")}
    strangers = sorted(on_disk - set(bundle.shards))
    if strangers:
        raise fail(bundle, strangers[0], "a shard outside the index", "none", "move it away")
    return f"{len(bundle.shards)} shards, {len(bundle.tensors):,} tensors, as the index says"


def check_triples(bundle: Checkpoint) -> str:
    """Every quantized module has weight, scales and biases that fit each other, and no orphan."""
    check_experts(bundle, TRIPLE)
    bases = {name.rpartition(".")[0] for name in bundle.tensors if name.endswith(TRIPLE[1:])}
    for base in sorted(bases):
        missing = [part for part in TRIPLE if f"{base}.{part}" not in bundle.tensors]
        if missing:
            raise fail(bundle, f"{base}.{missing[0]}", "not there", "the triple", "run requantize")
        if stored_label(bundle.tensors, base) is None:
            shapes = [(t.dtype, t.shape) for t in (bundle.tensors[f"{base}.{p}"] for p in TRIPLE)]
            raise fail(bundle, base, f"{shapes}", "an affine triple, group 32", "run requantize")
    if not bases:
        raise fail(bundle, "tensors", "no quantized module", "some", "convert again")
    return f"{len(bases):,} triples"


def check_controls(bundle: Checkpoint) -> str:
    controls = [tensor for name, tensor in bundle.tensors.items() if is_control(name)]
    for tensor in controls:
        if tensor.dtype != "F32":
            raise fail(bundle, tensor.name, tensor.dtype, "F32", "run requantize")
    if not controls:
        raise fail(bundle, "tensors", "no control tensor", "some", "convert again")
    return f"{len(controls)} control tensors, F32"


def labels_in_use(bundle: Checkpoint) -> Iterator[tuple[str, str]]:
    """(key in config.json, storage name of a module that a loader looks up under it)."""
    experts = count(bundle.config, "n_routed_experts", bundle.folder)
    for layer in range(count(bundle.config, "num_hidden_layers", bundle.folder)):
        for matrix in PROJECTION:
            for expert in range(experts):
                base = expert_base("layers", layer, expert, matrix)
                for path in switch_paths(layer, matrix):
                    yield path, base
    for base in expert_bases(bundle):
        yield base, base


def check_labels(bundle: Checkpoint) -> str:
    """The label that a loader finds for each module equals what lies on disk."""
    labels = bundle.config.get("quantization")
    if not isinstance(labels, dict) or "quantization_config" in bundle.config:
        raise fail(bundle, "config.json", "no quantization, or a quantization_config beside it",
                   "quantization alone", "run patch")  # fmt: skip
    top = {key: labels.get(key) for key in ("group_size", "bits", "mode")}
    named = list(labels_in_use(bundle))
    experts = {base for _, base in named}
    bases = {name.rpartition(".")[0] for name in bundle.tensors if name.endswith(".scales")}
    for key, base in [*named, *((b, b) for b in sorted(bases - experts))]:
        stored = stored_label(bundle.tensors, base)
        if labels.get(key, top) != stored:
            raise fail(bundle, f"config.json: {key}", f"{labels.get(key, top)}",
                       f"{stored} as the tensors", "run patch")  # fmt: skip
    return f"{len(named):,} expert labels, {len(bases - experts):,} modules at the top level's"


def check_counterparts(bundle: Checkpoint, source: Checkpoint) -> str:
    wanted = {key for name in source.tensors for key in bundle_keys(name)}
    missing, extra = sorted(wanted - set(bundle.tensors)), sorted(set(bundle.tensors) - wanted)
    if missing or extra:
        found = f"no {missing[0]}" if missing else f"{extra[0]}, which the source does not have"
        raise fail(bundle, "tensors", found, "the source's counterparts", "convert again")
    return f"{len(wanted):,} counterparts of {len(source.tensors):,} source tensors"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="compare with this source too")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    checks: list[Callable[[Checkpoint], str]] = [
        check_files, check_stop_tokens, check_shards, check_triples, check_controls, check_labels,
    ]  # fmt: skip
    for check in checks:
        print(f"ok  {check(bundle)}")
    if args.source:
        print(f"ok  {check_counterparts(bundle, open_source(args.source))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
