"""scripts/repair.py: what is wrong is mended, what is right is not touched, and all of it can undo.

Catches: a right shard written anew, a fault that stays, an original lost, a killed run that leaves
half of an expert, a dry run that writes, labels or marks that say what is not so.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import signal
from pathlib import Path

import bundles
import here
import numpy as np
import pytest
import small
from bundles import edit_json
from conftest import NANO, must, refusal, script

from dsv4.conversion.shard_metadata import made_by
from dsv4.model.chat_template import template_for
from dsv4.model.load import expert_bases, open_bundle
from dsv4.model.names import parse_expert
from dsv4.model.source import open_source
from dsv4.quantization.formats import get_quantizer
from dsv4.storage.backup import FOLDER, Backup
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import read_array, read_shard

FAST = ("--without-loader", "--jobs", 2)
LAYER = "layers.2."


def repair(bundle: Path, *options: object) -> str:
    """Repair, which has to end well; what it says."""
    return must("repair", "--bundle", bundle, *FAST, *options)


def undo(bundle: Path) -> str:
    return must("repair", "--bundle", bundle, "--undo")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a bundle consists of, by name; hidden ones of a run count too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and FOLDER not in path.parts
    }


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file."""
    stats = {p.name: p.stat() for p in folder.rglob("*") if p.is_file() and FOLDER not in p.parts}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def by_name(bundle: Path, folder: Path, shards: int, marks: bool = True) -> Path:
    """A copy of `bundle` over several shards in the order of names, so that a layer lies in few."""
    shutil.copytree(bundle, folder)
    metadata = next(iter(open_bundle(bundle).shards.values())).metadata
    arrays = dict(sorted(bundles.load(folder).items()))
    bundles.save(folder, arrays, shards, metadata if marks else {"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """The nano checkpoint as a finished bundle over seven shards."""
    folder = tmp_path_factory.mktemp("made")
    must("convert", "--source", NANO, "--bundle", folder / "one")
    must("finalize", "--source", NANO, "--bundle", folder / "one")
    must("patch", "--bundle", folder / "one")
    return by_name(folder / "one", folder / "nano", 7)


@pytest.fixture(scope="module")
def random_bundle(good, tmp_path_factory) -> Path:
    """The random bundle over six shards."""
    return by_name(good, tmp_path_factory.mktemp("made") / "random", 6)


@pytest.fixture(params=["nano", "random"])
def case(request, tmp_path) -> tuple[Path, Path]:
    """(a copy of a good bundle over several shards, its source)."""
    which = "nano" if request.param == "nano" else "random_bundle"
    source = NANO if request.param == "nano" else request.getfixturevalue("source")
    return shutil.copytree(request.getfixturevalue(which), tmp_path / "bundle"), source


# --- Faults, each planted in its own file -------------------------------------------------------


def rewritten(folder: Path, change, marks: bool = True) -> None:
    """Change arrays; only the shards that hold a changed one are written anew."""
    for path in sorted(folder.glob("*.safetensors")):
        shard = read_shard(path)
        arrays = {name: (t.dtype, read_array(t).copy()) for name, t in shard.tensors.items()}
        before = {name: (dtype, array.tobytes()) for name, (dtype, array) in arrays.items()}
        change(arrays)
        after = {name: (dtype, array.tobytes()) for name, (dtype, array) in arrays.items()}
        if before != after:
            planned = [
                bundles.PendingTensor(n, dtype, a.shape, lambda a=a: [np.ascontiguousarray(a)])
                for n, (dtype, a) in arrays.items()
            ]
            bundles.write_shard(path, planned, shard.metadata if marks else {"format": "mlx"})


def f16_controls(folder: Path, source: Path) -> None:
    def change(arrays) -> None:
        for name, (dtype, array) in arrays.items():
            if dtype == "F32" and name.startswith((LAYER, "hc_")):
                arrays[name] = ("F16", array.astype(np.float16))

    rewritten(folder, change)


def stock_experts(folder: Path, source: Path) -> None:
    """One layer's experts as upstream's converter leaves them; the other shards keep marks."""
    origin = open_bundle(source).tensors

    def change(arrays) -> None:
        for name in [n for n in arrays if n.startswith(LAYER) and parse_expert(n)]:
            base, _, part = name.rpartition(".")
            if part == "biases":
                del arrays[name]
                continue
            data = read_array(origin[f"{base}.{'scale' if part == 'scales' else 'weight'}"])
            kind = ("U8", "u1") if part == "scales" else ("U32", "<u4")
            arrays[name] = (kind[0], np.ascontiguousarray(data).view(kind[1]))

    rewritten(folder, change, marks=False)
    index = json.loads((folder / INDEX).read_text())
    there = open_bundle(folder).tensors
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n in there}
    (folder / INDEX).write_text(json.dumps(index))


def wrong_labels(folder: Path, source: Path) -> None:
    edit_json(
        folder / "config.json", lambda c: c.update(quantization={"bits": 4, "group_size": 64})
    )


def no_eos(folder: Path, source: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.pop("eos_token_id"))
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=1))


def no_template(folder: Path, source: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("chat_template"))


def other_template(folder: Path, source: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ mine }}"))


def no_encoding(folder: Path, source: Path) -> None:
    shutil.rmtree(folder / "encoding")


def no_tokenizer(folder: Path, source: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{ cut")


def edited_index(folder: Path, source: Path) -> None:
    def change(index: dict) -> None:
        del index["weight_map"]["norm.weight"]
        index["weight_map"]["no.such.tensor"] = index["weight_map"]["embed.weight"]

    edit_json(folder / INDEX, change)


def cut_index(folder: Path, source: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def no_jang_config(folder: Path, source: Path) -> None:
    (folder / "jang_config.json").unlink()


def limited_answers(folder: Path, source: Path) -> None:
    """A limit in each place from which vMLX takes one."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 300}
    edit_json(folder / "jang_config.json", lambda c: c["chat"].update(sampling_defaults=sampling))
    edit_json(folder / "generation_config.json", lambda c: c.update(max_new_tokens=300))
    edit_json(folder / "config.json", lambda c: c.update(jang={"chat": {
        "sampling_defaults": {"max_new_tokens": 300}}}))  # fmt: skip


NEEDS_SOURCE = [f16_controls, stock_experts, no_encoding, no_tokenizer]
FAULTS = [*NEEDS_SOURCE, wrong_labels, no_eos, no_template, other_template, edited_index, cut_index,
          no_jang_config, limited_answers]  # fmt: skip


# Faults mended from the source are planted in both bundles, faults of documents in one.
DOCUMENT_FAULTS = [("nano", plant) for plant in FAULTS[len(NEEDS_SOURCE) :]]
PLANTED = DOCUMENT_FAULTS + [(name, p) for name in ("nano", "random") for p in NEEDS_SOURCE]


@pytest.mark.parametrize(("case", "plant"), PLANTED, indirect=["case"])
def test_each_fault_is_mended_alone_and_undone(case, plant):
    bundle, source = case
    plant(bundle, source)
    assert bundles.judge(bundle, source, level=1).errors
    before, where = digests(bundle), inodes(bundle)
    must("repair", "--bundle", bundle, "--source", source, "--dry-run")
    assert inodes(bundle) == where
    assert not (bundle / FOLDER).exists()

    said = repair(bundle, "--source", source)
    assert "level 1 holds" in said
    assert not bundles.judge(bundle, source, level=2).errors
    kept = {Path(n).name for n, digest in digests(bundle).items() if before.get(n) == digest}
    assert kept & {path.name for path in bundle.glob("*.safetensors")}
    after = inodes(bundle)
    assert {name: after[name] for name in kept} == {name: where[name] for name in kept}

    assert "nothing to repair" in repair(bundle, "--source", source)
    assert inodes(bundle) == after

    undo(bundle)
    assert digests(bundle) == before
    assert {n: i for n, i in inodes(bundle).items() if n in where} == where
    assert not (bundle / FOLDER).exists()


@pytest.mark.parametrize(("case", "plant"), DOCUMENT_FAULTS, indirect=["case"])
def test_without_a_source_shards_are_not_written(case, plant):
    bundle, source = case
    plant(bundle, source)
    where = {n: i for n, i in inodes(bundle).items() if n.endswith(".safetensors")}
    assert "level 1 holds" in repair(bundle)
    assert {n: i for n, i in inodes(bundle).items() if n.endswith(".safetensors")} == where


@pytest.mark.parametrize("in_file", [None, "{{ mine }}"])
def test_a_wrong_template_is_replaced_wherever_it_stands(case, in_file):
    bundle, _ = case
    path = bundle / "chat_template.jinja"
    path.unlink(missing_ok=True)
    if in_file:
        path.write_text(in_file)
    other_template(bundle, bundle)
    before = digests(bundle)
    repair(bundle)
    own = template_for(bundle)
    written = json.loads((bundle / "tokenizer_config.json").read_text())["chat_template"]
    assert (path.read_bytes().decode(), written) == (own, own)
    undo(bundle)
    assert digests(bundle) == before


def test_all_faults_at_once(case):
    bundle, source = case
    for plant in (f16_controls, wrong_labels, no_eos, no_template, no_encoding, edited_index):
        plant(bundle, source)
    before = digests(bundle)
    repair(bundle, "--source", source)
    assert not bundles.judge(bundle, source).errors
    undo(bundle)
    assert digests(bundle) == before


def test_what_needs_the_source_is_named_and_the_rest_is_done(case):
    bundle, source = case
    for plant in (f16_controls, stock_experts, no_encoding, no_eos, edited_index):
        plant(bundle, source)
    last = refusal("repair", "--bundle", bundle, *FAST)
    for name in ("controls-rounded", "stock-experts", "encoding-missing"):
        assert name in last
    assert not {"eos-wrong", "index-entry-missing"} & bundles.judge(bundle, None, level=1).names
    repair(bundle, "--source", source)
    assert not bundles.judge(bundle, source).errors


def test_one_stock_layer_in_a_bundle_from_elsewhere(good, source, tmp_path):
    """Right experts without this recipe's marks stay, and no mark claims them."""
    bundle = by_name(good, tmp_path / "bundle", 6, marks=False)
    edit_json(bundle / "config.json", lambda config: config.pop("requantize"))
    stock_experts(bundle, source)
    before = digests(bundle)
    said = repair(bundle, "--source", source)
    assert "24 expert matrices (stock-experts)" in said
    touched = {n for n, digest in digests(bundle).items() if before.get(n) != digest}
    assert 0 < sum(n.endswith(".safetensors") for n in touched) < 6
    assert not bundles.judge(bundle, source).errors
    assert "requantize" not in json.loads((bundle / "config.json").read_text())
    expected = bundles.load(good)
    for name, (dtype, array) in bundles.load(bundle).items():
        assert (dtype, array.tobytes()) == (expected[name][0], expected[name][1].tobytes()), name
    undo(bundle)
    assert digests(bundle) == before


def test_experts_of_another_quantizer_than_those_that_stay_are_refused(case):
    bundle, source = case
    stock_experts(bundle, source)
    last = script(
        "repair", "--bundle", bundle, "--source", source, "--quantizer", "affine5g32", *FAST
    )
    assert last.returncode == 1
    assert "set QUANTIZER to theirs" in last.stderr
    assert "QUANTIZER=mlx" in last.stderr


def test_fp4_bytes_may_be_labelled_as_what_they_are(stock, source, tmp_path):
    """QUANTIZER=mxfp4 keeps a stock bundle's experts; with no source it changes JSON alone."""
    bundle = shutil.copytree(stock, tmp_path / "bundle")
    refusal("repair", "--bundle", bundle, "--quantizer", "mxfp4", *FAST)  # the controls are left
    named = bundles.judge(bundle, None, level=1).names
    assert "controls-rounded" in named
    assert not {n for n in named if n.startswith(("label-", "stock-"))}
    repair(bundle, "--source", source, "--quantizer", "mxfp4")
    assert not bundles.judge(bundle, source).errors
    must("patch", "--bundle", bundle)


def test_fp4_under_labels_of_one_runtime_gets_those_of_all(stock, source, tmp_path):
    """As jang 2.5.50 labels MXFP4: under storage names alone. No source, no shard written."""
    must("requantize", "--source", source, "--bundle", shutil.copytree(stock, tmp_path / "made"),
         "--quantizer", "mxfp4")  # fmt: skip
    bundle = by_name(tmp_path / "made", tmp_path / "bundle", 6, marks=False)

    def storage_names(config: dict) -> None:
        del config["requantize"]
        stays = {k: v for k, v in config["quantization"].items() if "switch_mlp" not in k}
        config["quantization"] = stays

    edit_json(bundle / "config.json", storage_names)
    assert "label-missing" in bundles.judge(bundle, source, level=1).names
    where = {n: i for n, i in inodes(bundle).items() if n.endswith(".safetensors")}
    repair(bundle)
    assert {n: i for n, i in inodes(bundle).items() if n.endswith(".safetensors")} == where
    assert not bundles.judge(bundle, source).errors
    must("patch", "--bundle", bundle)
    assert "nothing to repair" in repair(bundle, "--source", source)


def test_a_missing_shard_stops_before_anything_is_written(case):
    bundle, source = case
    no_eos(bundle, source)
    sorted(bundle.glob("*.safetensors"))[0].unlink()
    before = digests(bundle)
    assert "1 of" in refusal("repair", "--bundle", bundle, "--source", source, *FAST)
    assert digests(bundle) == before


def test_another_source_is_refused(good, tmp_path):
    must("lab/make_source", "--source", tmp_path / "other", "--seed", 8)
    bundle = shutil.copytree(good, tmp_path / "bundle")
    f16_controls(bundle, tmp_path)
    before = {n: d for n, d in digests(bundle).items() if n.endswith(".safetensors")}
    last = script("repair", "--bundle", bundle, "--source", tmp_path / "other", *FAST)
    assert last.returncode == 1
    assert "other values than the source's" in last.stderr
    assert {n: d for n, d in digests(bundle).items() if n.endswith(".safetensors")} == before


def test_files_of_a_hub_cache_are_links_and_stay_so(case, tmp_path):
    """A snapshot's files are symbolic links: the blobs stay whole, undo brings the links back."""
    bundle, source = case
    f16_controls(bundle, source)
    no_eos(bundle, source)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in [p for p in bundle.iterdir() if p.is_file()]:
        path.rename(blobs / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    before, kept = digests(bundle), digests(blobs)
    repair(bundle, "--source", source)
    assert digests(blobs) == kept
    undo(bundle)
    assert digests(bundle) == before
    assert all(path.is_symlink() for path in bundle.iterdir() if path.is_file())


def test_originals_are_no_part_of_the_bundle(case):
    bundle, source = case
    f16_controls(bundle, source)
    repair(bundle, "--source", source)
    report = bundle.parent / "verify.json"
    must("verify", "--bundle", bundle, "--source", source, "--without-loader", "--json", report)
    result = json.loads(report.read_text())
    assert not [name for name in result["hashes"] if name.startswith(".")]
    visible = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file()
                  and FOLDER not in p.parts and "__pycache__" not in p.parts)  # fmt: skip
    assert result["sizes"]["bundle_bytes"] == visible


def test_a_volume_without_hard_links_keeps_copies(case, monkeypatch):
    from dsv4.storage import backup

    bundle, _ = case
    before = digests(bundle)
    monkeypatch.setattr("os.link", lambda *_, **__: (_ for _ in ()).throw(OSError(95, "no")))
    kept = backup.Backup(bundle)
    kept.keep(["config.json", "new.json"])
    assert kept.nbytes == (bundle / "config.json").stat().st_size
    (bundle / "config.json").write_text("{}")
    (bundle / "new.json").write_text("{}")
    assert backup.Backup(bundle).undo() == (1, 1)
    assert digests(bundle) == before


def test_an_undo_that_was_killed_goes_on(case, monkeypatch):
    """It stops after each of its steps in turn; the next one puts back what is left."""
    from dsv4.storage import backup

    bundle, source = case
    for plant in (f16_controls, no_eos, no_encoding):
        plant(bundle, source)
    before = digests(bundle)
    repair(bundle, "--source", source)
    steps = iter([True, False] * 20)

    def killed(folder: Path) -> None:
        if next(steps):
            raise KeyboardInterrupt

    monkeypatch.setattr(backup, "fsync_folder", killed)
    for _ in range(20):
        try:
            backup.Backup(bundle).undo()
            break
        except KeyboardInterrupt:
            continue
    assert digests(bundle) == before
    assert not (bundle / FOLDER).exists()


# --- kill -9 ------------------------------------------------------------------------------------


def is_unfinished(bundle: Path) -> bool:
    record = bundle / FOLDER / "repair.json"
    return not record.is_file() or bool(json.loads(record.read_text()).get("unfinished"))


@pytest.mark.parametrize("marks", [True, False], ids=["ours", "elsewhere"])
def test_half_an_expert_is_known_as_half(good, source, tmp_path, marks):
    """New scales in one shard, old codes in another: by their headers alone a right expert."""
    whole = by_name(good, tmp_path / "bundle", 40, marks)
    edit_json(whole / "config.json", lambda config: None if marks else config.pop("requantize"))
    stock_experts(whole, source)
    before = shutil.copytree(whole, tmp_path / "before")
    at = {name: tensor.path.name for name, tensor in open_bundle(before).tensors.items()}
    wrong = [b for b in expert_bases(open_bundle(before)) if b.startswith(LAYER)]
    codes = next(at[f"{b}.weight"] for b in wrong if at[f"{b}.weight"] != at[f"{b}.scales"])
    made = made_by(open_source(source), get_quantizer("mlx"))
    repair(whole, "--source", source)
    shutil.copyfile(before / codes, whole / codes)
    Backup(whole).begin({"experts": wrong, "mark": made})
    assert "unfinished" in repair(whole, "--source", source)
    assert not bundles.judge(whole, source).errors
    undo(whole)
    assert digests(whole) == digests(before)


@pytest.mark.parametrize("marks", [True, False], ids=["ours", "elsewhere"])
def test_a_killed_run_is_ended_by_the_next(tmp_path, marks):
    """kill -9 before a rename: the next run ends it rightly, and undo still gives every byte.

    Experts are torn over shards, so a kill between two leaves new scales beside old codes.
    """
    sizes = small.Sizes(layers=3, experts=4, hidden=128, width=256, bundle_shard=5)
    source, stock, expected = small.make(tmp_path, sizes, seed=4)
    must("requantize", "--source", source, "--bundle", stock)
    arrays = bundles.load(stock)
    metadata = next(iter(open_bundle(stock).shards.values())).metadata
    bundles.save(stock, arrays, 40, metadata if marks else {"format": "mlx"})
    stock_experts(stock, source)
    f16_controls(stock, source)
    before, unfinished = digests(stock), 0
    for n in (0, 1, 2, 4, 8, 12):
        bundle = shutil.copytree(stock, tmp_path / f"bundle-{n}")
        killed = ("os", "rename", n, signal.SIGKILL)
        done = script("repair", "--bundle", bundle, "--source", source, *FAST, kill=killed)
        assert done.returncode == -signal.SIGKILL, done
        open_bundle(bundle)  # every shard is whole
        unfinished += is_unfinished(bundle)
        if n % 3 == 0:
            undo(bundle)
            assert {k: v for k, v in digests(bundle).items() if k != ".lock"} == before
        script("repair", "--bundle", bundle, "--source", source, *FAST)
        opened = open_bundle(bundle).tensors
        for name, (dtype, array) in expected.items():
            found = opened[name]
            assert found.dtype == dtype, name
            assert read_array(found).tobytes() == np.ascontiguousarray(array).tobytes(), name
        undo(bundle)
        assert digests(bundle) == before
    assert unfinished


# --- What lies in the folder --------------------------------------------------------------------


def test_the_sources_index_is_made_anew(case):
    """mlx-vlm's convert leaves the source's index in the bundle (mlx-vlm#624)."""
    bundle, source = case
    shutil.copyfile(source / INDEX, bundle / INDEX)
    before, where = digests(bundle), inodes(bundle)
    dry = here.must("repair", "--bundle", bundle, *FAST, "--dry-run")
    assert f"would be rebuilt: {INDEX}" in dry
    assert inodes(bundle) == where
    assert "level 1 holds" in here.must("repair", "--bundle", bundle, *FAST)
    assert {n for n, i in inodes(bundle).items() if where.get(n) != i} == {INDEX}
    assert not bundles.judge(bundle, source).errors
    here.must("repair", "--bundle", bundle, "--undo")
    assert digests(bundle) == before


@pytest.mark.parametrize("index", ["right", "gone", "the source's"])
def test_a_stray_shard_moves_to_the_originals_and_comes_back(case, index):
    bundle, source = case
    shutil.copyfile(sorted(bundle.glob("*.safetensors"))[0], bundle / "model.safetensors")
    shutil.copyfile(sorted(source.glob("*.safetensors"))[0], bundle / "model-old.safetensors")
    (bundle / "other-00001-of-00003.safetensors").write_bytes(b"broken")
    if index == "gone":
        (bundle / INDEX).unlink()
    elif index == "the source's":
        shutil.copyfile(source / INDEX, bundle / INDEX)
    before, where = digests(bundle), inodes(bundle)
    here.must("repair", "--bundle", bundle, *FAST, "--dry-run")
    assert inodes(bundle) == where
    said = here.must("repair", "--bundle", bundle, "--source", source, *FAST)
    assert "model-old.safetensors, model.safetensors, other-00001-of-00003.safetensors" in said
    assert not bundles.judge(bundle, source).errors
    assert len(list((bundle / FOLDER / "files").glob("*.safetensors"))) == 3
    assert "nothing to repair" in here.must("repair", "--bundle", bundle, *FAST)
    here.must("repair", "--bundle", bundle, "--undo")
    assert digests(bundle) == before
    assert {n: i for n, i in inodes(bundle).items() if n in where} == where


def test_strays_and_shards_to_write_in_one_run(case):
    bundle, source = case
    f16_controls(bundle, source)
    (bundle / "model.safetensors").write_bytes(b"stray")
    before = digests(bundle)
    here.must("repair", "--bundle", bundle, "--source", source, *FAST, "--dry-run")
    assert digests(bundle) == before
    here.must("repair", "--bundle", bundle, "--source", source, *FAST)
    assert not bundles.judge(bundle, source).errors
    here.must("repair", "--bundle", bundle, "--undo")
    assert digests(bundle) == before


def test_a_shard_beside_the_index_that_holds_what_lacks_stays(case):
    bundle, source = case
    shard = sorted(bundle.glob("*.safetensors"))[1]
    shard.rename(bundle / "model.safetensors")
    before = digests(bundle)
    line = here.refusal("repair", "--bundle", bundle, "--source", source, *FAST)
    assert "1 of" in line
    assert digests(bundle) == before


JUNK = ("._model-00001-of-00007.safetensors", ".DS_Store", "._config.json", "Thumbs.db",
        "encoding/._encoding_dsv4.py", "encoding/.DS_Store", ".Trashes/a")  # fmt: skip


def test_the_systems_own_files_are_ignored_and_listed(case):
    bundle, source = case
    for name in JUNK:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(b"\0\5\x16\7" * 20)
    before = digests(bundle)
    assert not bundles.judge(bundle, source).names
    said = here.must("repair", "--bundle", bundle, *FAST)
    assert "left alone: ._config.json" in said or "left alone: .DS_Store" in said
    assert "nothing to repair" in said
    assert digests(bundle) == before
    status = here.here("verify", "--bundle", bundle, "--level", 1, "--without-loader")
    assert "ignored, as runtimes do:" in status[1]


@pytest.mark.parametrize("name", ["model-x.safetensors", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_only_has_a_shards_name_is_found_and_left(case, kind, name):
    """mlx_lm and vMLX load whatever has such a name, and stop at a folder."""
    bundle, source = case
    if kind == "folder":
        (bundle / name).mkdir()
        (bundle / name / "mine").write_text("mine")
    else:
        (bundle / name).symlink_to("nowhere")
    assert "shard-stranger" in bundles.judge(bundle, source, level=1).names
    status, _, err = here.here("repair", "--bundle", bundle, *FAST)
    if kind == "folder":
        assert status == 1
        assert f"left: {bundle / name}: found a folder" in err
        assert (bundle / name / "mine").read_text() == "mine"
    else:  # a link is moved as it is
        assert status == 0
        here.must("repair", "--bundle", bundle, "--undo")
        assert (bundle / name).is_symlink()


BROKEN = {
    "cut": lambda path: path.write_text("{ cut"),
    "gone": lambda path: path.unlink(),
    "a list": lambda path: path.write_text("[]"),
    "another model's": lambda path: edit_json(path, lambda c: c.update(model_type="llama")),
    "no experts": lambda path: edit_json(path, lambda c: c.update(n_routed_experts="8")),
    "no layers": lambda path: edit_json(path, lambda c: c.pop("num_hidden_layers")),
    "no size": lambda path: edit_json(path, lambda c: c.update(hidden_size=0)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_config_that_cannot_be_used_is_made_of_the_sources(case, how):
    bundle, source = case
    right = json.loads((bundle / "config.json").read_text())
    BROKEN[how](bundle / "config.json")
    before, where = digests(bundle), inodes(bundle)
    if how != "no size":  # which no step counts by
        assert "name the FP4/FP8 source" in here.here("repair", "--bundle", bundle, *FAST)[2]
        assert digests(bundle) == before
    here.must("repair", "--bundle", bundle, "--source", source, *FAST, "--dry-run")
    assert inodes(bundle) == where
    said = here.must("repair", "--bundle", bundle, "--source", source, *FAST)
    assert "made anew from the source's config.json" in said
    assert json.loads((bundle / "config.json").read_text()) == right
    assert not bundles.judge(bundle, source).errors
    here.must("repair", "--bundle", bundle, "--undo")
    assert digests(bundle) == before


def test_without_a_config_stock_experts_are_known_and_made_right(stock, source, tmp_path):
    bundle = by_name(stock, tmp_path / "bundle", 6, marks=False)
    (bundle / "config.json").unlink()
    before = digests(bundle)
    here.must("repair", "--bundle", bundle, "--source", source, *FAST)
    assert not bundles.judge(bundle, source).errors
    here.must("repair", "--bundle", bundle, "--undo")
    assert digests(bundle) == before


def test_a_config_is_not_made_of_another_models_source(case, tmp_path):
    bundle, _ = case
    other, _, _ = small.make(tmp_path / "other", small.Sizes(layers=9), seed=3)
    (bundle / "config.json").unlink()
    before = digests(bundle)
    status, _, err = here.here("repair", "--bundle", bundle, "--source", other, *FAST)
    assert status == 1
    assert "expected every tensor of the source" in err
    assert digests(bundle) == before


def test_labels_that_stand_twice_are_no_fault_and_one_copy_goes(good_copy):
    """As mlx_lm's save_config leaves them."""
    path = good_copy / "config.json"
    edit_json(path, lambda config: config.update(quantization_config=config["quantization"]))
    before = path.read_bytes()
    assert "quantization_config" in repair(good_copy)
    assert "quantization_config" not in json.loads(path.read_text())
    undo(good_copy)
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["repair", "patch"])
def test_a_limit_of_answers_goes_and_keys_of_the_users_stay(command, good_copy):
    jang, generation = (good_copy / f"{name}_config.json" for name in ("jang", "generation"))
    mine = {"sampling_defaults": {"mine": 1, "top_k": 0}, "my_key": [2]}
    edit_json(jang, lambda c: c["chat"].update(copy.deepcopy(mine)))
    edit_json(generation, lambda c: c.update(mine=3))
    before = [json.loads(path.read_text()) for path in (jang, generation)]
    others = {
        name: digest
        for name, digest in digests(good_copy).items()
        if name not in (jang.name, generation.name)
    }
    limits = {"max_new_tokens": 300, "temperature": 0.6}
    edit_json(jang, lambda c: c["chat"]["sampling_defaults"].update(limits))
    edit_json(generation, lambda c: c.update(max_new_tokens=300))
    must(command, "--bundle", good_copy, *(FAST if command == "repair" else ()))
    assert [json.loads(path.read_text()) for path in (jang, generation)] == before
    assert others.items() <= digests(good_copy).items()
