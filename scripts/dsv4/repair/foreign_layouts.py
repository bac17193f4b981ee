"""Plan the repair of bundles that are not stored as this recipe stores them.

Their experts stay as they are, right or wrong. Labels are corrected under every name that a runtime
looks up. Rounded controls become F32 again, from the source.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from dsv4.conversion import runtime_documents
from dsv4.errors import UserError
from dsv4.model.labels import DEFAULT, MXFP8, SOURCE, TURBO, has_turboquant
from dsv4.model.names import is_control, parse_expert
from dsv4.model.naming_schemes import STORAGE
from dsv4.quantization.mlx_affine import float_pieces
from dsv4.repair.context import NEEDS_SOURCE, RepairContext
from dsv4.repair.shards_on_disk import open_by_shards, wrong_experts
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, Shard, Tensor, TensorSpec, header_bytes
from dsv4.storage.shard_writer import NewShard, Piece, copy_pieces, write_shards
from dsv4.verification.checks import turboquant_files
from dsv4.verification.checks.documents import labels_in_use, labels_unquantized
from dsv4.verification.checks.stored_formats import LABEL_KEYS, label_at
from dsv4.verification.scan import Scan


def scan_bundle(bundle: Checkpoint) -> Scan:
    """Return a bundle that was opened by its shards as verification reads it."""
    return Scan(bundle, {}, {})


def keeps_experts(bundle: Scan) -> bool:
    """True for what requantize knows nothing of: other names than storage names, TurboQuant, and
    somebody else's groups or widths, where headers prove no expert wrong."""
    if bundle.scheme is not STORAGE or has_turboquant(bundle.tensors):
        return True
    return not (bundle.is_ours or is_uniform(bundle) or wrong_experts(bundle.checkpoint))


def is_uniform(bundle: Scan) -> bool:
    """True when the labels that this recipe writes can say how every module is stored."""
    bases = {n.rpartition(".")[0] for n in bundle.tensors if n.endswith(".scales")}
    kinds = [(parse_expert(f"{base}.weight"), label_at(bundle, base)) for base in bases]
    return all(
        label is None or (label["group_size"] == 32 and (expert or label in (DEFAULT, MXFP8)))
        for expert, label in kinds
    )


def plan_controls(repair: RepairContext, bundle: Scan) -> None:
    """Plan new shards with F32 controls. Raises UserError without a source that has them."""
    rounded = [n for n, t in bundle.tensors.items() if is_control(n) and t.dtype != "F32"]
    if not rounded:
        return
    found = f"{len(rounded):,} controls not in F32 (controls-rounded)"
    if repair.source is None:
        raise UserError(f"{repair.bundle}", found, "F32 controls of the source", NEEDS_SOURCE)
    odd = [n for n in rounded if not same_shape(repair.source.tensors.get(n), bundle.tensors[n])]
    if odd:
        raise UserError(f"{repair.bundle}: {odd[0]}", "another shape than the source's",
                   "the source's", "check SOURCE and BUNDLE")  # fmt: skip
    files = sorted({bundle.tensors[name].path.name for name in rounded})
    origins = {bundle.view.name_on_disk(name): repair.source.tensors[name] for name in rounded}

    def apply() -> None:
        shards = [updated_shard(bundle.view.shards[file], origins) for file in files]
        repair.check_space(files, sum(shard.size for shard in shards))
        repair.backup.keep(files)
        write_shards(shards, repair.options.jobs, lambda nbytes: None)

    repair.plan(found, f"made F32 again from the source: {len(files)} shards", apply)


def same_shape(origin: Tensor | None, rounded: Tensor) -> bool:
    """Return True for a tensor of the source with the shape of the bundle's tensor."""
    return origin is not None and origin.dtype in FLOATS and origin.shape == rounded.shape


def updated_shard(shard: Shard, origins: dict[str, Tensor]) -> NewShard:
    """Return a shard with the same tensors in the same order, `origins` as F32 in their places."""
    specs = [
        TensorSpec(name, "F32" if name in origins else tensor.dtype, tensor.shape)
        for name, tensor in shard.tensors.items()
    ]
    header = header_bytes(specs, shard.metadata)
    pieces: list[Piece] = []
    offset = len(header)
    for spec in specs:
        tensor = origins.get(spec.name, shard.tensors[spec.name])
        if tensor.dtype == spec.dtype:
            pieces += copy_pieces(tensor.path, tensor.offset, offset, tensor.nbytes)
        else:
            pieces += float_pieces(tensor, offset, spec.dtype)
        offset += spec.nbytes
    return NewShard(shard.path, header, offset, lambda: pieces)


def patched_config(repair: RepairContext) -> dict[str, Any]:
    """config.json with the stop tokens, and labels as the tensors are."""
    bundle = scan_bundle(open_by_shards(repair.bundle))
    content = runtime_documents.patched_config(bundle.checkpoint, None)
    content |= turboquant_files.corrected_keys(content, bundle)
    if any(name.endswith(".scales") for name in bundle.tensors):
        content["quantization"] = corrected_labels(bundle)
        if "quantization_config" in content:
            content["quantization_config"] = copy.deepcopy(content["quantization"])
    return content


def corrected_labels(bundle: Scan) -> dict[str, Any]:
    """The labels of config.json, those mended that are not what the tensors are."""
    old = bundle.config.get("quantization")
    labels = dict(copy.deepcopy(old)) if isinstance(old, dict) else {}
    bases = dict.fromkeys(n.rpartition(".")[0] for n in bundle.tensors if n.endswith(".scales"))
    stored = {base: label for base in bases if (label := label_at(bundle, base))}
    if any(labels.get(key) is None for key in LABEL_KEYS[:2]):
        kinds = Counter(tuple(label.items()) for label in stored.values())
        labels |= dict(kinds.most_common(1)[0][0]) if kinds else {}
    top = {key: labels.get(key) for key in LABEL_KEYS}
    for key in [key for key in labels if labels_unquantized(bundle, key, labels[key])]:
        del labels[key]
    keys = [(key, base) for key, base, _ in labels_in_use(bundle)]
    keys += [(base, base) for base in stored if bundle.scheme is STORAGE]
    for key, base in keys:
        found, label = stored.get(base), labels.get(key, top)
        said = {**label, "mode": label.get("mode") or "affine"} if isinstance(label, dict) else {}
        if found and found["mode"] not in (TURBO, SOURCE) and said != found:
            labels[key] = dict(found)
    return labels
