"""Mend a bundle that somebody else published, or a damaged one, and touch nothing that is right.

verify's level 1 says what is wrong; from that each step decides whether it has anything to do:

| step     | what it mends                                                          | needs      |
|----------|------------------------------------------------------------------------|------------|
| shards   | routed experts that headers prove wrong, controls not in F32, the head | the source |
| index    | entries that are missing, wrong or too many; an index that is gone     |            |
| files    | tokenizer and encoding files that are missing or no JSON               | the source |
| metadata | labels, stop tokens, chat template, jang_config.json's group size      |            |

The work is that of requantize, finalize and patch. Right experts stay as they are, whoever made
them; those that must be made again are made by --quantizer. What cannot be mended is named, the
rest is done. The originals stay in BUNDLE/.before-repair as second names of the same files: only
rewritten shards cost disk. --undo puts every byte back; delete that folder to keep the repair.
Half-written files of killed runs are removed for good.

Can be killed at any moment: the same command goes on. It ends with verify's level 1.

    .venv/bin/python scripts/repair.py --bundle DIR [--source DIR] [--quantizer NAME] [--dry-run]
    .venv/bin/python scripts/repair.py --bundle DIR --undo

Exit 0: level 1 finds nothing wrong with the bundle; 1: something is left, which is named.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import finalize
import patch
import requantize
import verify
from dsv4 import labels, level1
from dsv4.backup import FOLDER, Backup
from dsv4.chat import TEMPLATE
from dsv4.checkpoint import (
    INDEX,
    Checkpoint,
    expert_bases,
    open_source,
    read_config,
    read_index,
    read_json,
)
from dsv4.durable import human, write_json
from dsv4.findings import Findings
from dsv4.headers import check_triple, labelled
from dsv4.names import HEAD, is_control, parse_expert
from dsv4.quantizer import QUANTIZERS, Quantizer
from dsv4.shard import Tensor, read_shard
from dsv4.stop import Stop, run
from dsv4.survey import survey
from dsv4.toolchain import default

NEEDS_SOURCE = "name the FP4/FP8 source: make repair SOURCE=…"
# Faults, by how their names begin → the files that hold them, for those that patch writes.
METADATA = {
    "label-": ("config.json",),
    "eos-": ("config.json", "generation_config.json"),
    "chat-template-": ("tokenizer_config.json",),
    "tokenizer-config-": ("tokenizer_config.json",),
    "generation-config-": ("generation_config.json",),
    "jang-config-": ("jang_config.json",),
}
FILES = {"encoding-missing", "tokenizer-missing", "tokenizer-config-broken"}
# Of the toolchain, not of the bundle: named, but nothing that is left to repair.
TOOLCHAIN = {"loader-unpatched", "loader-unknown", "loader-not-checked"}


@dataclass
class Repair:
    """One run: the arguments, the source, the originals, and what could not be mended.

    expert: the label of the experts that the shards step leaves, when it is known beforehand.
    """

    args: argparse.Namespace
    source: Checkpoint | None
    backup: Backup
    left: list[str] = field(default_factory=list)
    expert: dict[str, Any] | None = None
    steps: int = 0

    @property
    def bundle(self) -> Path:
        return self.args.bundle

    def say(self, found: str, done: str) -> bool:
        """Report one step; True when it is to be taken, False in a dry run."""
        self.steps += 1
        print(f"{found}; {'would be ' if self.args.dry_run else ''}{done}")
        return not self.args.dry_run

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step; what stops it is left, and the next steps are taken all the same."""
        try:
            step(self, *arguments)
        except Stop as stop:
            self.left.append(f"{stop}")


# ------------------------------------------------------------------------------- what is there


def open_whole(folder: Path) -> Checkpoint:
    """The bundle with an index made of its shards, whatever the one on disk says.

    Raises Stop for an unreadable config.json, a missing or broken shard, a tensor in two of them.
    """
    config = read_config(folder)
    shards = {file: read_shard(folder / file) for file in shard_files(folder)}
    weight_map: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in weight_map:
                raise Stop(f"{folder}: {name}", f"it in {weight_map[name]} and {file}", "one shard",
                           "delete the bundle and fetch or convert it again")  # fmt: skip
            weight_map[name] = file
    return Checkpoint(folder, config, weight_map, shards)


def shard_files(folder: Path) -> list[str]:
    """The shards that the index names, and others of their set; without an index the whole set.

    Raises Stop when one of them is not there.
    """
    on_disk = {path.name for path in folder.glob("*.safetensors") if path.name[0] != "."}
    try:
        named = set(read_index(folder).values())
        files = named | on_disk & set().union(*map(set_of, named))
    except Stop as stop:
        sets = {set_of(file) for file in on_disk}
        if len(sets) != 1:
            raise Stop(f"{folder}", f"no index, and {len(sets)} sets of shards", "one set",
                       f"fetch {INDEX} again") from stop  # fmt: skip
        files = set(sets.pop())
    missing = sorted(files - on_disk)
    if missing:
        raise Stop(f"{folder}", f"{len(missing)} of {len(files)} shards missing, first "
                   f"{missing[0]}", "all of them", "fetch it again, then make repair")  # fmt: skip
    return sorted(files)


def set_of(file: str) -> frozenset[str]:
    """The names NAME-00001-of-N to NAME-N-of-N that a shard's own name calls for; else just it."""
    numbered = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", file)
    if numbered is None:
        return frozenset({file})
    name, n = numbered.groups()
    return frozenset(f"{name}-{k:05d}-of-{n}.safetensors" for k in range(1, int(n) + 1))


def parts_of(bundle: Checkpoint, base: str) -> dict[str, Tensor]:
    """A module's tensors that are there: 'weight', 'scales', 'biases'."""
    names = {part: f"{base}.{part}" for part in ("weight", "scales", "biases")}
    return {part: bundle.tensors[name] for part, name in names.items() if name in bundle.tensors}


def wrong_experts(bundle: Checkpoint) -> dict[str, str]:
    """Storage name → fault, of the routed-expert matrices that headers prove wrong.

    FP4 bytes are right where a label says mxfp4, or the bundle tells that they were meant so. In a
    bundle that requantize made, the experts of a shard without its mark are wrong too.
    """
    files = files_of_experts(bundle)
    marks = {f: bundle.shards[f].metadata.get("requantize_quantizer") for f in files}
    meant = {*marks.values(), labels.recorded_quantizer(bundle.config)}
    strangers = {f for f, mark in marks.items() if any(marks.values()) and not mark}
    wrong = {}
    for base in expert_bases(bundle):
        findings, has = Findings(), parts_of(bundle, base)
        check_triple(base, has, bundle.config, findings)
        if labels.stored_label(bundle.tensors, base) == labels.MXFP4:
            if "mxfp4" not in {*meant, labelled(bundle.config, base).get("mode")}:
                wrong[base] = "stock-experts"
        elif findings.names:
            wrong[base] = min(findings.names)
        elif any(tensor.path.name in strangers for tensor in has.values()):
            wrong[base] = "marks-mixed"
    return wrong


def files_of_experts(bundle: Checkpoint) -> set[str]:
    """The shards that hold any part of a routed expert."""
    return {tensor.path.name for name, tensor in bundle.tensors.items() if parse_expert(name)}


def rounded(bundle: Checkpoint) -> list[str]:
    """Control tensors that are not F32."""
    return [n for n, t in bundle.tensors.items() if is_control(n) and t.dtype != "F32"]


def has_quantized_head(bundle: Checkpoint) -> bool:
    """True for a head that mlx-vlm cannot load; level 1 takes it, because other runtimes can."""
    return f"{HEAD.removesuffix('weight')}scales" in bundle.tensors


def faults(repair: Repair) -> Findings:
    """What level 1 finds in the bundle as it lies there now, without the toolchain."""
    findings = Findings()
    bundle = survey(repair.bundle, findings)
    if bundle is not None:
        level1.check_headers(bundle, repair.source, findings)
    return findings


# ---------------------------------------------------------------------------------- the shards


def mend_shards(repair: Repair) -> None:
    """Wrong experts, rounded controls and a quantized head are made again, from the source."""
    bundle, begun = open_whole(repair.bundle), repair.backup.unfinished
    wrong = wrong_experts(bundle)
    as_fp4 = repair.args.quantizer == "mxfp4" and repair.source is None and not begun
    if as_fp4 and wrong and all_fp4(bundle):
        found = f"{len(wrong):,} expert matrices of FP4 bytes (stock-experts)"
        repair.say(found, "labelled mxfp4; not compared with the source")
        repair.expert, wrong = labels.MXFP4, {}
    wrong |= dict.fromkeys(begun.get("experts", ()), "unfinished")
    controls, head = rounded(bundle), has_quantized_head(bundle)
    found = [f"{n:,} expert matrices ({fault})" for fault, n in Counter(wrong.values()).items()]
    found += [f"{len(controls):,} controls not in F32 (controls-rounded)"] if controls else []
    if repair.source is None and (found or begun):
        raise Stop(f"{repair.bundle}", ", ".join(found) or "an unfinished repair",
                   "experts and F32 controls made of the source", NEEDS_SOURCE)  # fmt: skip
    if repair.source is not None and (found or head or begun):
        found += ["an 8-bit head, which mlx-vlm refuses"] if head else []
        from_source(repair, bundle, wrong, ", ".join(found) or "an unfinished repair")


def all_fp4(bundle: Checkpoint) -> bool:
    """True when every routed expert is stored as FP4 codes and their exponents."""
    return all(labels.stored_label(bundle.tensors, b) == labels.MXFP4 for b in expert_bases(bundle))


def from_source(repair: Repair, bundle: Checkpoint, wrong: dict[str, str], found: str) -> None:
    """Rewrite the shards that need it. Raises Stop when source and bundle do not fit."""
    quantizer = requantize.make_quantizer(repair.args, repair.source)
    made = requantize.made_by(repair.source, quantizer)
    begun = repair.backup.unfinished.get("mark", made)
    if begun != made:
        raise Stop(f"{repair.backup.folder}", f"a repair begun with {shown(begun)}", shown(made),
                   "go on with those, or make unrepair")  # fmt: skip
    mark = made if marks_all(bundle, wrong, quantizer, made) else {}
    plan = requantize.make_plan(
        repair.source,
        bundle,
        quantizer,
        requantize.Part(),
        repair.args.jobs,
        frozenset(wrong),
        mark,
    )
    size = sum(fate.size for fate in plan.work)
    how = f"made again from the source ({quantizer.name}): {len(plan.todo)} of {len(plan.fates)} "
    if repair.say(found, f"{how}shards, {human(size)}"):
        rewrite(repair, plan, {"experts": sorted(wrong), "mark": made}, size)
    repair.expert = quantizer.label if wrong else None


def marks_all(
    bundle: Checkpoint, wrong: dict[str, str], quantizer: Quantizer, made: dict[str, str]
) -> bool:
    """May the new shards say who made their experts? Only when that is true of every shard.

    Raises Stop when right experts, which stay, are stored in another way than the new ones.
    """
    if not wrong:
        return False
    kept = [base for base in expert_bases(bundle) if base not in wrong]
    shards = {t.path.name for base in kept for t in parts_of(bundle, base).values()}
    marked = [bundle.shards[file] for file in sorted(shards) if was_requantized(bundle, file)]
    other = next((s.metadata for s in marked if not requantize.was_made_by(s, made)), None)
    if other is not None:
        name = shown(other)
    elif odd := [b for b in kept if labels.stored_label(bundle.tensors, b) != quantizer.label]:
        name = f"{labels.stored_label(bundle.tensors, odd[0])}"
    else:
        return len(marked) == len(shards)
    raise Stop(f"{bundle.folder}", f"{len(kept):,} right expert matrices of {name}",
               f"the form of {shown(made)}",
               "set QUANTIZER to theirs, or make requantize to make every expert")  # fmt: skip


def was_requantized(bundle: Checkpoint, file: str) -> bool:
    return "requantize_quantizer" in bundle.shards[file].metadata


def shown(mark: dict[str, str]) -> str:
    """A mark for a reader."""
    name, table = mark.get("requantize_quantizer"), mark.get("requantize_table", "")
    return (
        f"QUANTIZER={name} (table {table[:8]}) and source {mark.get('requantize_source', '')[:8]}"
    )


def rewrite(repair: Repair, plan: requantize.Plan, work: dict[str, Any], size: int) -> None:
    """Keep the originals, write the new shards, then the index. Raises Stop without the room."""
    free = shutil.disk_usage(repair.bundle).free
    if size > free:
        raise Stop(f"{repair.bundle}", f"{human(free)} free", f"{human(size)}",
                   "free space on that volume, where the originals stay too")  # fmt: skip
    if plan.todo:
        repair.backup.begin(work)
        repair.backup.keep([*plan.todo, INDEX])
        requantize.carry_out(plan)
        write_index(repair)
        repair.backup.finish()


# -------------------------------------------------------------------------- index and documents


def write_index(repair: Repair) -> None:
    """The index of what the shards hold now; one that is no JSON object is written anew."""
    set_aside(repair, [INDEX])
    shards = open_whole(repair.bundle).shards
    requantize.write_index(repair.bundle, {f: s.tensors.values() for f, s in shards.items()})


def set_aside(repair: Repair, names: list[str]) -> None:
    """Remove those of the files that are no JSON object, after their originals are kept."""
    for name in filter(functools.partial(is_broken, repair.bundle), names):
        repair.backup.keep([name])
        (repair.bundle / name).unlink()


def is_broken(folder: Path, name: str) -> bool:
    """True for a JSON document that is there and no JSON object."""
    try:
        if (folder / name).is_file():
            read_json(folder / name)
    except Stop:
        return True
    return False


def mend_index(repair: Repair) -> None:
    """The index names what the shards hold."""
    named = [finding.name for finding in faults(repair) if finding.name.startswith("index-")]
    if named and repair.say(", ".join(named), f"rebuilt: {INDEX}"):
        repair.backup.keep([INDEX])
        write_index(repair)


def mend_files(repair: Repair) -> None:
    """Tokenizer and encoding files that are missing, empty or broken: from source or reference."""
    named = sorted(faults(repair).names & FILES)
    if not named:
        return
    origin = repair.args.reference or repair.args.source
    if origin is None:
        raise Stop(f"{repair.bundle}", ", ".join(named), "tokenizer and encoding files",
                   f"{NEEDS_SOURCE}, or a bundle that has them: REFERENCE=…")  # fmt: skip
    bad = {n for n in finalize.REQUIRED if n.endswith(".json") and is_broken(repair.bundle, n)}
    bad |= {"tokenizer.json"} if "tokenizer-missing" in named else set()
    names = [n for n in finalize.wanted(origin) if n in bad or size_of(repair.bundle / n) == 0]
    if repair.say(", ".join(named), f"copied from {origin}: {', '.join(names)}"):
        repair.backup.keep(names)
        finalize.copy(origin, repair.bundle, names)


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 when it is not there."""
    return path.stat().st_size if path.is_file() else 0


def mend_metadata(repair: Repair) -> None:
    """Labels, stop tokens, template, group size: each JSON file in which a fault lies."""
    found = faults(repair)
    files = {f for name in found.names for start, of in METADATA.items() if name.startswith(start)
             for f in of}  # fmt: skip
    bundle = open_whole(repair.bundle)
    makers = {
        "config.json": lambda: config(repair, bundle),
        "generation_config.json": lambda: patch.generation_config(repair.bundle),
        "tokenizer_config.json": lambda: tokenizer_config(repair, found),
        "jang_config.json": lambda: jang_config(repair),
    }
    if repair.expert or recorded(bundle) != bundle.config.get(labels.RECORD):
        files.add("config.json")
    for name in sorted(files):
        repair.attempt(mend_document, name, makers[name])


def mend_document(repair: Repair, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Write one JSON file, if that changes it."""
    if not repair.args.dry_run:
        set_aside(repair, [name])
    elif is_broken(repair.bundle, name):
        repair.say(f"{name}: no JSON object", "made anew")
        return
    content = make()
    patch.check_json(name, content)
    changes = patch.differences(repair.bundle, {name: content})
    keys = [change.removeprefix(f"{name}: ") for change in changes]
    if changes and repair.say(f"{name}: other {', '.join(keys)} than runtimes need", "set"):
        repair.backup.keep([name])
        write_json(repair.bundle / name, content)


def config(repair: Repair, bundle: Checkpoint) -> dict[str, Any]:
    """config.json with labels as the experts lie there, or as they were if some are wrong still."""
    expert = repair.expert
    if expert is None and not wrong_experts(bundle):
        forms = [labels.stored_label(bundle.tensors, base) for base in expert_bases(bundle)]
        expert = forms[0] if forms and forms.count(forms[0]) == len(forms) else None
    content = patch.config(bundle, expert)
    record = requantize.record_of(QUANTIZERS["mxfp4"]()) if expert == labels.MXFP4 else None
    record = recorded(bundle) or record
    return {**content, labels.RECORD: record} if record else content


def recorded(bundle: Checkpoint) -> dict[str, str] | None:
    """config.json's record of the quantizer: as the shards' marks have it, else its own."""
    keys = ("requantize_quantizer", "requantize_table")
    marks = {
        tuple(bundle.shards[file].metadata.get(key) for key in keys)
        for file in files_of_experts(bundle)
    }
    if len(marks) == 1 and all(mark := marks.pop()):
        return {"quantizer": mark[0], "table": mark[1]}
    return bundle.config.get(labels.RECORD)


def tokenizer_config(repair: Repair, found: Findings) -> dict[str, Any]:
    """tokenizer_config.json with this recipe's template where the file's own is wrong."""
    content = patch.tokenizer_config(repair.bundle)
    return {**content, "chat_template": TEMPLATE} if "chat-template-wrong" in found else content


def jang_config(repair: Repair) -> dict[str, Any]:
    """jang_config.json; what it says of its source stays."""
    path = repair.bundle / "jang_config.json"
    own = read_json(path) if path.is_file() else {}
    kept = {key: own[key] for key in ("source_model", "source") if key in own}
    return patch.jang_config(repair.bundle, repair.args.source) | kept


# --------------------------------------------------------------------------------------- a run


def mend(repair: Repair) -> None:
    """All steps, in the order in which one needs the other."""
    for step in (mend_shards, mend_index, mend_files, mend_metadata):
        repair.attempt(step)
    if not repair.steps and not repair.left:
        print("nothing to repair")
    names = repair.backup.originals
    if names:
        print(f"originals of {len(names)} files in {repair.backup.folder}, which take "
              f"{human(repair.backup.nbytes)}: make unrepair puts them back")  # fmt: skip


def undo(bundle: Path) -> int:
    """Put every original back."""
    if not (bundle / FOLDER).is_dir():
        print(f"{bundle}: not repaired, nothing to undo")
        return 0
    with requantize.locked(bundle, [], requantize.Part()):
        requantize.remove_leftovers(bundle, [], requantize.Part())
        back, removed = Backup(bundle).undo()
    print(f"{bundle}: {back} files put back, {removed} that repair made removed")
    return 0


def judge(repair: Repair) -> list[str]:
    """verify's level 1 on the result, printed; the names of what is still wrong with the bundle."""
    args = argparse.Namespace(**vars(repair.args), level=1)
    done = verify.examine(args)
    print(verify.describe(args, done))
    verify.print_findings(done.findings)
    names = [f.name for f in done.findings.errors if f.name not in TOOLCHAIN]
    return names if done.first else names or ["nothing-checked"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--source", type=Path, help="the FP4/FP8 source that the bundle was made of"
    )
    parser.add_argument("--reference", type=Path, help="a bundle to take tokenizer, encoding from")
    parser.add_argument("--quantizer", choices=sorted(QUANTIZERS), default="mlx")
    parser.add_argument("--imatrix", type=Path, help="importance of columns, for optimal (.dat)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--undo", action="store_true", help="put every original back")
    parser.add_argument("--python", type=Path, default=default(), help="toolchain")
    parser.add_argument("--without-loader", action="store_true", help="do not ask its loaders")
    parser.add_argument("--jobs", type=requantize.parse_jobs, default=requantize.cores())
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    files = shard_files(args.bundle) if not args.undo else []
    if args.undo:
        return undo(args.bundle)
    source = open_source(args.source) if args.source else None
    repair = Repair(args, source, Backup(args.bundle))
    lock = requantize.locked(args.bundle, files, requantize.Part())
    with contextlib.nullcontext() if args.dry_run else lock:
        if not args.dry_run:
            requantize.remove_leftovers(args.bundle, files, requantize.Part())
        mend(repair)
    for line in repair.left:
        print(f"left: {line}", file=sys.stderr)
    wrong = [] if args.dry_run else judge(repair)
    if wrong or repair.left:
        raise Stop(f"{args.bundle}", ", ".join(wrong) or f"{len(repair.left)} not mended",
                   "a bundle that level 1 passes", "see above")  # fmt: skip
    if not args.dry_run:
        print("level 1 holds; every number: scripts/verify.py --bundle DIR --source DIR")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
