"""patch_loader on jang_tools as published, and what the patched function does to labels.

`make test` fetches the wheels into build/wheels. Catches: a patch that no longer fits, a file that
is changed although it is unknown, an undo that is not byte for byte, and a guard that repairs one
kind of bundle by breaking another.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, must, refusal
from safetensors.numpy import save_file

WHEELS = ROOT / "build" / "wheels"
PATCHES = ROOT / "patches"
TARGETS = {"load_jangtq.patch": "load_jangtq.py", "mlx_model.patch": "dsv4/mlx_model.py"}


def unpack(version: str, folder: Path) -> Path:
    """jang_tools of a published version, in a folder of the test's own."""
    with zipfile.ZipFile(WHEELS / f"jang-{version}-py3-none-any.whl") as wheel:
        wheel.extractall(folder)
    return folder / "jang_tools"


@pytest.mark.parametrize("version", ["2.5.8", "2.5.9"])
@pytest.mark.parametrize("patch", TARGETS)
def test_pristine_becomes_patched_and_the_undo_is_byte_for_byte(version, patch, tmp_path):
    file = unpack(version, tmp_path) / TARGETS[patch]
    before = file.read_bytes()
    chosen = ("--file", file, "--patch", PATCHES / patch)
    assert "patched (original kept" in must("patch_loader", *chosen)
    patched = file.read_bytes()
    assert patched != before
    assert "patched already" in must("patch_loader", *chosen)
    assert file.read_bytes() == patched
    assert "original restored" in must("patch_loader", *chosen, "--undo")
    assert file.read_bytes() == before
    assert sorted(p.name for p in file.parent.glob("*.orig")) == []
    assert "nothing to undo" in must("patch_loader", *chosen, "--undo")


@pytest.mark.parametrize("patch", TARGETS)
def test_other_patch_tools_read_the_same_patch(patch, tmp_path):
    folder = unpack("2.5.9", tmp_path)
    file = folder / TARGETS[patch]
    before = file.read_bytes()
    must("patch_loader", "--file", file, "--patch", PATCHES / patch)
    ours = file.read_bytes()
    file.write_bytes(before)
    subprocess.run(
        ["git", "apply", "-p1", str(PATCHES / patch)],
        cwd=tmp_path, check=True, env={"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )  # fmt: skip
    assert file.read_bytes() == ours


def test_a_version_without_the_function_needs_no_patch(tmp_path):
    file = unpack("2.5.50", tmp_path) / "load_jangtq.py"
    before = file.read_bytes()
    assert "not needed" in must("patch_loader", "--file", file)
    assert file.read_bytes() == before


def test_a_drifted_copy_is_refused_and_left_alone(tmp_path):
    file = unpack("2.5.9", tmp_path) / "load_jangtq.py"
    drifted = file.read_text().replace("new_q.update(inferred)", "new_q |= inferred")
    file.write_text(drifted)
    assert "does not fit" in refusal("patch_loader", "--file", file)
    assert file.read_text() == drifted
    assert not list(file.parent.glob("*.orig"))


def test_undo_refuses_to_drop_other_changes(tmp_path):
    file = unpack("2.5.9", tmp_path) / "load_jangtq.py"
    must("patch_loader", "--file", file)
    file.write_text(file.read_text() + "\n# an edit of the user's own\n")
    edited = file.read_bytes()
    assert "changes beside the patch" in refusal("patch_loader", "--file", file, "--undo")
    assert file.read_bytes() == edited


def test_the_file_is_found_inside_an_app(tmp_path):
    inside = tmp_path / "vMLX.app" / "Contents" / "Resources" / "site-packages"
    file = unpack("2.5.9", inside) / "load_jangtq.py"
    must("patch_loader", "--app", tmp_path / "vMLX.app", "--patch", PATCHES / "load_jangtq.patch")
    assert "setdefault(key, label)" in file.read_text()
    missing = refusal("patch_loader", "--app", tmp_path / "none.app")
    assert "--file PATH" in missing


# --- What the function does to a config ---------------------------------------------------------

AFFINE4 = {"group_size": 32, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
PATH = "model.layers.0.mlp.switch_mlp.gate_proj"
TOP = {"group_size": 32, "bits": 8, "mode": "affine"}

_CALL = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from jang_tools import load_jangtq
config = json.loads(sys.argv[3])
if sys.argv[4] == "skip" and any(k.startswith("model.") for k in config["quantization"]):
    pass  # the plan's guard: leave a config alone that has module-path labels
else:
    load_jangtq._patch_quant_config_inplace(Path(sys.argv[2]), config)
print("\\n" + json.dumps(config["quantization"]))
"""


@pytest.fixture(scope="module")
def loaders(tmp_path_factory) -> dict[str, Path]:
    """site folders: jang 2.5.9 as published, and the same with our patch."""
    folders = {}
    for name in ("published", "merge"):
        folders[name] = tmp_path_factory.mktemp(name)
        file = unpack("2.5.9", folders[name]) / "load_jangtq.py"
        if name == "merge":
            must("patch_loader", "--file", file)
    folders["skip"] = folders["published"]
    return folders


def labels_after(loaders, way: str, bundle: Path, quantization: dict) -> dict:
    """`quantization` after the loader's function, as 'published', with our 'merge', or 'skip'."""
    config = json.dumps({"quantization": quantization})
    out = subprocess.run(
        [sys.executable, "-c", _CALL, str(loaders[way]), str(bundle), config, way],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(out.stdout.strip().splitlines()[-1])


def triple(bits: int, name: str) -> dict[str, np.ndarray]:
    """An affine triple of a (2, 64) matrix under a storage name."""
    return {
        f"{name}.weight": np.zeros((2, 64 * bits // 32), np.uint32),
        f"{name}.scales": np.zeros((2, 2), np.float16),
        f"{name}.biases": np.zeros((2, 2), np.float16),
    }


@pytest.fixture
def affine(tmp_path) -> Path:
    save_file(
        triple(8, "head") | triple(4, "layers.0.ffn.experts.0.w1"), tmp_path / "m.safetensors"
    )
    return tmp_path


@pytest.fixture
def mxfp4(tmp_path) -> Path:
    experts = triple(4, "layers.0.ffn.experts.0.w1")
    del experts["layers.0.ffn.experts.0.w1.biases"]
    save_file(triple(8, "head") | experts, tmp_path / "m.safetensors")
    return tmp_path


@pytest.fixture
def another_family(tmp_path) -> Path:
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    save_file(triple(8, "lm_head") | triple(4, names[0]) | triple(4, names[1]),
              tmp_path / "m.safetensors")  # fmt: skip
    return tmp_path


def test_published_loader_loses_module_path_labels(loaders, affine):
    after = labels_after(loaders, "published", affine, {**TOP, PATH: AFFINE4})
    assert PATH not in after


@pytest.mark.parametrize("label", [AFFINE4, MXFP4])
def test_patched_loader_keeps_module_path_labels(loaders, affine, mxfp4, label):
    bundle = affine if label == AFFINE4 else mxfp4
    after = labels_after(loaders, "merge", bundle, {**TOP, PATH: label})
    assert after[PATH] == label
    assert {key: after[key] for key in TOP} == TOP


def test_patched_loader_still_repairs_a_uniform_legacy_config(loaders, another_family):
    legacy = {"group_size": 32, "bits": 4}
    for way in ("published", "merge", "skip"):
        after = labels_after(loaders, way, another_family, legacy)
        assert after["lm_head"]["bits"] == 8, way


def test_patched_loader_repairs_partial_labels_where_skipping_does_not(loaders, another_family):
    wrong = {**TOP, "model.layers.0.mlp.up_proj": {**AFFINE4, "bits": 2}}
    repaired = labels_after(loaders, "merge", another_family, wrong)
    assert repaired["model.layers.0.mlp.up_proj"]["bits"] == 4
    assert repaired["model.layers.1.mlp.up_proj"]["bits"] == 4
    skipped = labels_after(loaders, "skip", another_family, wrong)
    assert skipped["model.layers.0.mlp.up_proj"]["bits"] == 2
