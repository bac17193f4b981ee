"""Read how a finished bundle stores its experts: the default for settings that are left out.

Each shard's metadata names the quantizer and its digest, which also covers imatrix and plan.
config.json repeats it (shard_metadata.py, bundle_files.py). So no stage gives the experts of a
finished bundle another format because QUANTIZER, PLAN or IMATRIX was left out. A bundle without a
record was made by another program.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import labels, mtp
from dsv4.model.folder_roles import BUNDLE, folder_role
from dsv4.model.names import is_expert, parse_expert, stack_of
from dsv4.model.quantizer_table import is_quantizer, quantizer_properties
from dsv4.quantization.formats import (
    NAMES,
    Quantizer,
    QuantizerOptions,
    check_quantizer_options,
    get_quantizer,
)
from dsv4.quantization.imatrix import EVEN, Importance, load_imatrix
from dsv4.quantization.mixture_plan import read_plan
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.disk_space import staging_folder
from dsv4.storage.safetensors_file import Tensor, read_shard
from dsv4.text import LINE, escape_line, short_repr

Identity = tuple[str, str]  # a quantizer's name, and its digest
REPAIR = "make repair mends it with a backup"


@dataclass(frozen=True)
class RecordedFormat:
    """The quantizer that made a bundle's experts, as the bundle records it.

    names: of all quantizers that made some of the experts. complete: config.json records the same
    identity, as after a run that was not killed. stacks: the label of most experts of each stack,
    as they are stored; {} unless the quantizer needs a plan.
    """

    folder: Path
    identity: Identity
    names: tuple[str, ...]
    complete: bool
    stacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The quantizer's name."""
        return self.identity[0]

    @property
    def importance(self) -> Importance:
        """The recorded imatrix digest, without columns: only the imatrix file has those."""
        found = re.search("-imatrix-([0-9a-f]{16})(-mtp|$)", self.identity[1])
        return Importance({}, found[1]) if found else EVEN

    @property
    def mtp(self) -> str:
        """The recorded choice for MTP; of a lossless bundle that has MTP it is the source's."""
        choice = mtp.choice_of(self.identity[1])
        lossless = quantizer_properties(self.name).lossless
        return mtp.SOURCE if lossless and choice == mtp.AS_EXPERTS else choice


def read_recorded_format(folder: Path, wanted: str | None = None) -> RecordedFormat | None:
    """Return what the bundle in `folder` records; None without a record or a bundle.

    wanted: the quantizer that was asked for. Without it, raises UserError for an unknown quantizer,
    and for experts made by several, as a killed run leaves them.
    """
    config: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        config = read_json(folder / "config.json")
    found, tensors = read_identities(folder)
    record = config.get(labels.RECORD)
    table = record.get("table") if isinstance(record, dict) else ""
    in_config = (labels.recorded_quantizer(config) or "", f"{table}")
    found = found or [in_config] * bool(in_config[0])
    if not found:
        return None
    names = tuple(dict.fromkeys(name for name, _ in found))
    if wanted is None and (len(found) > 1 or not is_quantizer(names[0])):
        raise UserError(f"{folder}", f"experts made by {' and '.join(map(short_repr, names))}",
                   f"one of {NAMES}" if len(found) == 1 else "one quantizer with one table",
                   "name the one that is to make all of them: QUANTIZER=NAME")  # fmt: skip
    identity = next((one for one in found if one[0] == wanted), found[0])
    needs_plan = quantizer_properties(identity[0]).needs_plan
    stacks = stored_stacks(tensors, config) if needs_plan else {}
    return RecordedFormat(folder, identity, names, identity == in_config, stacks)


def read_identities(folder: Path) -> tuple[list[Identity], dict[str, Tensor]]:
    """Return the sorted identities in shards with routed experts, and all readable tensors.

    Shards without experts are ignored: they are not rewritten with a new quantizer, so their
    metadata may be older.
    """
    found, tensors = set(), {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with contextlib.suppress(UserError):
            shard = read_shard(path)
            tensors.update(shard.tensors)
            keys = ("requantize_quantizer", "requantize_table")
            if any(map(is_expert, shard.tensors)) and keys[0] in shard.metadata:
                found.add(tuple(shard.metadata.get(key, "") for key in keys))
    return sorted(found), tensors


def stored_stacks(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return stack → the label of most of its experts."""
    stacks: dict[str, dict[str, Any]] = {}
    for name in tensors:
        base, _, part = name.rpartition(".")
        if part == "weight" and parse_expert(name):
            label = labels.stored_label(tensors, base, config)
            if label is not None:
                stacks.setdefault(stack_of(base), {})[base] = label
    return {stack: labels.most_common_label(experts) for stack, experts in stacks.items()}


# --- Settings -----------------------------------------------------------------------------------


def resolve_quantizer(
    options: QuantizerOptions, recorded: RecordedFormat | None, bundle: Path | None = None
) -> QuantizerOptions:
    """Return the options with a quantizer and a choice for MTP: left out, they are the bundle's.

    For a new bundle the quantizer is mlx, or with a plan mixture. `keep` is set if nothing was
    asked for. Raises UserError when the options do not go together.
    """
    name = options.name
    planned = recorded and quantizer_properties(recorded.name).needs_plan
    if name is None and recorded and (planned or not options.plan):
        name = recorded.name
    elif name is None:
        name = "mixture" if options.plan else "mlx"
    same = recorded is not None and recorded.name == name
    keep = same and not (options.name or options.plan or options.imatrix or options.mtp)
    choice = options.mtp or (recorded.mtp if recorded else default_mtp(bundle))
    resolved = replace(options, name=name, keep=keep, mtp=choice)
    check_quantizer_options(resolved, planned=same)
    return resolved


def default_mtp(bundle: Path | None) -> str:
    """Return the choice for MTP of a bundle without a record.

    That of a killed convert, if there is one; as-experts for a bundle of another program; else
    source.
    """
    if bundle is not None and any(bundle.glob("*.safetensors")):
        return mtp.AS_EXPERTS
    begun = read_recorded_format(staging_folder(bundle), "") if bundle is not None else None
    return begun.mtp if begun else mtp.SOURCE


def quantizer_for(
    options: QuantizerOptions, source: Checkpoint, recorded: RecordedFormat | None
) -> tuple[Quantizer, UserError | None]:
    """Return the quantizer of resolved options, and the error to raise if it must make a matrix.

    There is an error when only the bundle's record is known of the quantizer: its imatrix or plan
    was not named, or another version made the experts. Prints the coverage of an imatrix. Raises
    UserError for an imatrix or a plan that does not fit the source.
    """
    same = recorded if recorded and recorded.name == options.name else None
    importance = load_imatrix(options.imatrix, source)
    if same and not options.imatrix:
        importance = same.importance
    source = mtp.without_dropped(source, options.mtp)
    stacks = same.stacks if same else None
    if options.plan:
        stacks = read_plan(options.plan, source, options.mtp)
    quantizer = get_quantizer(options.name, importance, stacks, options.mtp)
    if same is None:
        return quantizer, None
    error = None
    if importance.digest and not options.imatrix:
        error = UserError(
            f"{same.folder}", f"experts to be made with the imatrix {importance.digest}…",
            "that file", "name it: IMATRIX=FILE",
        )  # fmt: skip
    by_labels = quantizer.properties.needs_plan and not options.plan
    if (by_labels or options.keep) and identity_of(quantizer) != same.identity:
        remedy = "name QUANTIZER: all are made again"
        error = UserError(
            f"{same.folder}", f"experts of {options.name} {short_repr(same.identity[1])}",
            f"what can be made here, {quantizer.digest}",
            "name the plan: PLAN=FILE" if by_labels else remedy,
        )  # fmt: skip
        quantizer = replace(quantizer, digest=same.identity[1])
    return quantizer, error


def describe_change(
    bundle: Path,
    options: QuantizerOptions,
    recorded: RecordedFormat | None,
    quantizer: Quantizer,
    number: int,
) -> str:
    """Return a line that announces that `number` matrices of a bundle get another format.

    It is empty when the format stays, and for a bundle that upstream's converter left with wrong
    labels.
    """
    if recorded is None:
        same = is_stock(bundle)
    else:
        same = recorded.names == (recorded.name,) and identity_of(quantizer) == recorded.identity
    if number == 0 or same:
        return ""
    settings = {"QUANTIZER": options.name, "IMATRIX": options.imatrix, "PLAN": options.plan}
    if recorded and options.mtp != recorded.mtp:
        settings["MTP"] = options.mtp
    asked = " ".join(f"{name}={value}" for name, value in settings.items() if value)
    holds = f"experts as {' and '.join(recorded.names)}" if recorded else "another maker's experts"
    return escape_line(
        f"requantize: {bundle} holds {holds}; {asked} asks for {quantizer.form.description()}: "
        f"{number:,} tensors are rewritten", LINE,
    )  # fmt: skip


def identity_of(quantizer: Quantizer) -> Identity:
    """Return a quantizer's name and digest."""
    return quantizer.name, quantizer.digest


# --- Other makers' bundles ----------------------------------------------------------------------


def check_ours(
    bundle: Path,
    recorded: RecordedFormat | None,
    quantizer: str | None,
    converter: str,
    as_stage: bool,
) -> None:
    """Raise UserError for another maker's bundle, unless requantize is meant to change it.

    as_stage: requantize runs as a stage of `make all` (--ours) and takes only what CONVERTER=jang
    made. Otherwise it takes what upstream's converter made, and with `quantizer` any bundle.
    """
    if recorded or folder_role(bundle) != BUNDLE:
        return
    stock = is_stock(bundle)
    if (stock and (not as_stage or converter == "jang")) or (quantizer and not as_stage):
        return
    command = "make requantize" if stock else "make requantize QUANTIZER=NAME"
    raise UserError(f"{bundle}", "another maker's bundle", "one that this recipe made",
               f"{REPAIR}; {command} makes its experts again, in place")  # fmt: skip


def is_stock(folder: Path) -> bool:
    """Return True for FP4 experts without an mxfp4 label, as upstream's converter makes them."""
    _, tensors = read_identities(folder)
    with contextlib.suppress(UserError):
        quantization = read_json(folder / "config.json").get("quantization")
        entries = quantization.values() if isinstance(quantization, dict) else ()
        if any(isinstance(entry, dict) and entry.get("mode") == "mxfp4" for entry in entries):
            return False
    return any(
        parse_expert(name) and name.endswith(".scales") and tensor.dtype in ("U8", "F8_E8M0")
        for name, tensor in tensors.items()
    )
