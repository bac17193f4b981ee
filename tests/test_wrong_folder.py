"""The wrong folder is refused at the first command, and a link to a new one is followed.

Catches: a source that is edited as a bundle, a bundle that a download takes for a source, one
folder for both, a bundle built beside a link and then lost.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import NANO
from here import here, must, refusal
from test_paths import state

from dsv4.hub.provenance import RECORD
from dsv4.model.folder_roles import BUNDLE, SOURCE, folder_role
from dsv4.storage.checkpoint import INDEX

FAST = ("--without-loader", "--jobs", 1)
WRITERS = {
    "convert": ("--source",),
    "requantize": ("--source",),
    "finalize": ("--source",),
    "patch": ("--source",),
    "repair": (*FAST, "--source"),
    "check": ("--source",),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_source_is_never_written_as_a_bundle(command, source, tmp_path):
    copy = shutil.copytree(NANO, tmp_path / "copy")
    before = state(tmp_path)
    line = refusal(command, "--bundle", copy, *WRITERS[command], source)
    assert f"{copy}: found an FP4/FP8 source" in line
    assert state(tmp_path) == before


@pytest.mark.parametrize("broken", ["config.json", INDEX, "shards", "one shard"])
def test_a_damaged_source_is_one_all_the_same(broken, tmp_path):
    copy = shutil.copytree(NANO, tmp_path / "copy")
    if broken == "shards":  # as with LOW_DISK=1
        for path in copy.glob("*.safetensors"):
            path.unlink()
    elif broken == "one shard":
        sorted(copy.glob("*.safetensors"))[0].write_bytes(b"cut")
    else:
        (copy / broken).write_text("{ cut")
    before = state(tmp_path)
    assert SOURCE in refusal("repair", "--bundle", copy, *FAST)
    assert state(tmp_path) == before


def test_kinds_are_told_by_dtypes(good, stock, source, tmp_path):
    """A stray shard of a source, or a label that mlx-vlm copied, makes no source of a bundle."""
    assert (folder_role(good), folder_role(stock), folder_role(source)) == (BUNDLE, BUNDLE, SOURCE)
    bundle = shutil.copytree(stock, tmp_path / "bundle")
    shutil.copy(next(NANO.glob("*.safetensors")), bundle / "a.safetensors")
    config = json.loads((bundle / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (bundle / "config.json").write_text(json.dumps(config))
    assert folder_role(bundle) == BUNDLE
    assert folder_role(tmp_path) == folder_role(tmp_path / "none") == ""


@pytest.mark.parametrize("how", ["same", "link", "through ..", "inside", "inside a link", "around"])
@pytest.mark.parametrize("command", WRITERS)
def test_source_and_bundle_are_two_folders_apart(command, how, tmp_path):
    source = shutil.copytree(NANO, tmp_path / "outer" / "source")
    (tmp_path / "link").symlink_to(source)
    bundle = {
        "same": source,
        "link": tmp_path / "link",
        "through ..": tmp_path / "outer" / "x" / ".." / "source",
        "inside": source / "made" / "bundle",
        "inside a link": tmp_path / "link" / "bundle",
        "around": tmp_path / "outer",
    }[how]
    before = state(tmp_path)
    line = refusal(command, "--bundle", bundle, *WRITERS[command], source)
    assert "expected two folders apart" in line
    assert state(tmp_path) == before


def test_a_name_that_only_begins_alike_is_apart(source, tmp_path):
    shutil.copytree(source, tmp_path / "flash")
    must("convert", "--source", tmp_path / "flash", "--bundle", tmp_path / "flash-bundle")


@pytest.mark.parametrize("bundle", ["/", ".", "", "//"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_bundle_needs_a_folder_of_its_own(command, bundle, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(command, "--bundle", bundle, *WRITERS[command], source)
    assert line.startswith("error: BUNDLE: found ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bundle", ["/", ".", ""])
def test_undo_of_no_folder_is_one_line(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "BUNDLE" in refusal("repair", "--bundle", bundle, "--undo")


@pytest.mark.parametrize("there", [True, False], ids=["empty", "missing"])
def test_a_link_to_a_new_folder_is_followed(there, source, tmp_path):
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    (target if there else tmp_path / "disk").mkdir(parents=True)
    link.symlink_to(target)
    must("convert", "--source", source, "--bundle", link)
    assert link.is_symlink()
    assert (target / INDEX).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]
    assert "already" in must("convert", "--source", source, "--bundle", link)
    must("requantize", "--source", source, "--bundle", link)


@pytest.mark.parametrize("command", WRITERS)
def test_links_in_a_circle_are_one_line(command, source, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    status, _, err = here(command, "--bundle", tmp_path / "a", *WRITERS[command], source)
    assert status == 1
    assert "error: " in err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_download_into_a_bundle_is_refused(options, good, tmp_path):
    """It would move config.json and whatever else differs from the hub's aside."""
    bundle = shutil.copytree(good, tmp_path / "bundle")
    before = state(tmp_path)
    line = refusal("download", "--source", bundle, "--repo", "a/b", *options)
    assert f"{bundle}: found an MLX bundle" in line
    assert not (bundle / RECORD).exists()
    assert state(tmp_path) == before


def test_a_file_as_bundle_is_one_line(source, tmp_path):
    path = Path(tmp_path / "file")
    path.write_text("mine")
    for command, options in WRITERS.items():
        if command != "check":
            assert str(path) in refusal(command, "--bundle", path, *options, source)
    assert path.read_text() == "mine"
