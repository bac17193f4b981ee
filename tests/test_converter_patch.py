"""patches/convert_dsv4_jangtq.patch: upstream's converter with --no-fp4-passthrough.

`make test` fetches the wheels into build/wheels. Catches: a patch that no longer fits, an option
that changes anything when it is not given, experts that are not requantize's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import must
from test_patch_loader import PATCHES, unpack

from dsv4.model.load import open_bundle
from dsv4.model.names import kind, parse_expert
from dsv4.model.source import open_source
from dsv4.storage.safetensors_file import read_array

PATCH = PATCHES / "convert_dsv4_jangtq.patch"
TARGET = "dsv4/convert_dsv4_jangtq.py"
OPTIONS = {"2.5.50": ("--variant", "std", "--no-sidecar", "--no-prestack")}
VERSIONS = ("2.5.8", "2.5.9", "2.5.50")
CONVERTED = ("2.5.8", pytest.param("2.5.9", marks=pytest.mark.full), "2.5.50")


def patched(version: str, folder: Path) -> Path:
    """jang_tools of a version with the patch, unpacked under `folder`."""
    file = unpack(version, folder) / TARGET
    said = must("patch_loader", "--file", file, "--patch", PATCH)
    assert "patched (original kept" in said
    return file


@pytest.mark.parametrize("version", VERSIONS)
def test_it_fits_and_the_undo_is_byte_for_byte(version, tmp_path):
    file = patched(version, tmp_path)
    original = file.with_name(file.name + ".orig").read_bytes()
    assert "patched already" in must("patch_loader", "--file", file, "--patch", PATCH)
    must("patch_loader", "--file", file, "--patch", PATCH, "--undo")
    assert file.read_bytes() == original


@pytest.mark.parametrize("version", VERSIONS)
def test_git_applies_it_alike(version, tmp_path):
    ours = patched(version, tmp_path / "ours").read_bytes()
    theirs = unpack(version, tmp_path / "git") / TARGET
    subprocess.run(
        ["git", "apply", "-p1", "--unidiff-zero", str(PATCH)],
        cwd=tmp_path / "git", check=True, env={"GIT_CEILING_DIRECTORIES": str(tmp_path)},
    )  # fmt: skip
    assert theirs.read_bytes() == ours


def test_it_is_not_among_the_patches_that_patch_loader_applies():
    import patch_loader

    assert PATCH not in patch_loader.DEFAULT


def run_converter(version: str, folder: Path, source: Path, *options: str) -> Path:
    """Convert with the patched upstream under `folder`; returns the bundle."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}
    env |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    options = (*options, *OPTIONS.get(version, ()))
    bundle = folder / "bundle"
    done = subprocess.run(
        [sys.executable, "-m", "jang_tools.dsv4.convert_dsv4_jangtq", "--src", source,
         "--dst", bundle, "--profile", "4", "--format", "jang", *options],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return bundle


@pytest.mark.parametrize("version", CONVERTED)
def test_its_experts_are_ours_and_the_rest_is_unchanged(version, source, good, stock, tmp_path):
    patched(version, tmp_path)
    theirs = open_bundle(run_converter(version, tmp_path, source, "--no-fp4-passthrough")).tensors
    ours, unchanged = open_bundle(good).tensors, open_bundle(stock).tensors
    experts = [name for name in ours if parse_expert(name)]
    assert len(experts) == 3 * sum(kind(n) == "expert" for n in open_source(source).tensors)
    assert {name for name in theirs if parse_expert(name)} == set(experts)
    for name, tensor in theirs.items():
        # 2.5.50 keeps all F32, 2.5.9 rounds them; neither is this patch's matter.
        if name not in experts and tensor.dtype == "F32":
            continue
        expected = ours[name] if name in experts else unchanged[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert read_array(tensor).tobytes() == read_array(expected).tobytes(), name


def test_without_the_option_nothing_changes(source, stock, tmp_path):
    patched("2.5.9", tmp_path)
    bundle = run_converter("2.5.9", tmp_path, source)
    for path in stock.glob("*.safetensors"):
        assert (bundle / path.name).read_bytes() == path.read_bytes()
