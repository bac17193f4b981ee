"""convert: what it refuses before hours are spent, and that a failure leaves nothing behind.

Catches: upstream's silent skip of a missing shard, a path that leads out of the folder, a bundle
that is written over, a half-made bundle under its final name.
"""

import json
import stat
import sys
from pathlib import Path

from conftest import must, refusal
from safetensors import safe_open

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refused(source: Path, tmp_path: Path) -> str:
    """Convert into a new bundle, both ways; it must be refused and leave no trace of one."""
    for converter in ("native", "jang"):
        line = refusal("convert", "--source", source, "--bundle", tmp_path / "bundle",
                       "--converter", converter)  # fmt: skip
        assert not (tmp_path / "bundle").exists()
        assert not list(tmp_path.glob(".bundle*"))
    return line


def test_a_stock_bundle_has_every_tensor_and_a_second_run_is_idle(source, stock):
    before = {path: path.stat().st_mtime_ns for path in stock.rglob("*")}
    assert "already" in must("convert", "--source", source, "--bundle", stock)
    assert before == {path: path.stat().st_mtime_ns for path in stock.rglob("*")}


def test_a_missing_shard_stops_the_run(source_copy, tmp_path):
    gone = shards(source_copy)[2]
    gone.unlink()
    assert gone.name in refused(source_copy, tmp_path)


def test_a_truncated_shard_stops_the_run(source_copy, tmp_path):
    shard = shards(source_copy)[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    line = refused(source_copy, tmp_path)
    assert shard.name in line
    assert f"{len(data) - 100:,} bytes" in line


def test_a_missing_scale_stops_the_run(source_copy, tmp_path):
    name = "layers.1.ffn.experts.3.w2.scale"
    drop_tensor(source_copy, name)
    assert name in refused(source_copy, tmp_path)


def test_a_missing_mtp_expert_stops_the_run(source_copy, tmp_path):
    for part in ("weight", "scale"):
        drop_tensor(source_copy, f"mtp.0.ffn.experts.7.w1.{part}")
    assert "mtp.0.ffn.experts.7.w1" in refused(source_copy, tmp_path)


def drop_tensor(folder: Path, name: str) -> None:
    """Write the tensor's shard again without it, and take it out of the index."""
    from dsv4.storage.safetensors_file import PendingTensor, read_array, read_shard, write_shard

    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"].pop(name)
    kept = [t for t in read_shard(path).tensors.values() if t.name != name]
    arrays = {t.name: read_array(t).copy() for t in kept}
    write_shard(path, [PendingTensor(t.name, t.dtype, t.shape, lambda a=arrays[t.name]: [a.data])
                       for t in kept], {})  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index))
    with safe_open(path, "np") as file:
        assert name not in file.keys()  # noqa: SIM118


def test_an_index_entry_that_leads_out_of_the_folder_stops_the_run(source_copy, tmp_path):
    for entry in ("../../etc/passwd", "/etc/passwd", "sub/model.safetensors"):
        edit_json(
            source_copy / INDEX,
            lambda index, e=entry: index["weight_map"].update({"head.weight": e}),
        )
        assert entry in refused(source_copy, tmp_path)


def test_another_model_stops_the_run(source_copy, tmp_path):
    edit_json(source_copy / "config.json", lambda config: config.update(model_type="llama"))
    assert "llama" in refused(source_copy, tmp_path)


def test_a_wrong_path_stops_the_run(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path)


def test_a_folder_with_other_files_is_not_written_over(source, tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    assert "other files" in refusal("convert", "--source", source, "--bundle", target)
    assert [p.name for p in target.iterdir()] == ["thesis.txt"]


def test_a_bundle_that_lacks_a_tensor_is_not_written_over(source, stock_copy):
    drop_tensor(stock_copy, "norm.weight")
    before = sorted(path.name for path in stock_copy.iterdir())
    assert "norm.weight" in refusal("convert", "--source", source, "--bundle", stock_copy)
    assert before == sorted(path.name for path in stock_copy.iterdir())


def test_a_target_that_cannot_be_made_stops_the_run(source, tmp_path):
    (tmp_path / "file").write_text("no folder")
    refusal("convert", "--source", source, "--bundle", tmp_path / "file" / "bundle")


def test_a_converter_that_dies_leaves_no_bundle(source, tmp_path):
    dying = tmp_path / "python"
    dying.write_text('#!/bin/sh\nfor last; do :; done\necho "no space" >&2\nexit 3\n')
    dying.chmod(dying.stat().st_mode | stat.S_IXUSR)
    target = tmp_path / "bundle"
    line = refusal("convert", "--source", source, "--bundle", target, "--python", dying,
                   "--converter", "jang")  # fmt: skip
    assert "exit status 3" in line
    assert not target.exists()
    assert not list(tmp_path.glob(".bundle*"))


def test_what_a_killed_run_left_is_cleared_away(source, tmp_path):
    left = tmp_path / ".bundle.converting"
    left.mkdir()
    (left / "model-00001-of-XXXXX.safetensors").write_bytes(b"half")
    must("convert", "--source", source, "--bundle", tmp_path / "bundle", "--python", sys.executable,
         "--converter", "jang")  # fmt: skip
    assert not left.exists()
    assert not list((tmp_path / "bundle").glob("*XXXXX*"))
