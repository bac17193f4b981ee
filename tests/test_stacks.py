"""What an installed toolchain means for the user, by the table of
scripts/dsv4/verification/checks/runtimes.py.

Catches: a version that was never measured called good, a row without its pinned file or a file
without its row, a loader still to be patched that is called ready.
"""

from __future__ import annotations

import doctest
import re
import sys

import pytest
from conftest import NANO, SCRIPTS, must

from dsv4.toolchain.python_env import app_versions
from dsv4.verification.checks import runtimes
from dsv4.verification.checks.runtimes import LOADER, MODEL, STACKS, recognize_stack

OLD = {"vmlx": "1.3.97", "jang": "2.5.9", "mlx": "0.31.2", "mlx-lm": "0.31.2", "mlx-vlm": "0.4.0"}
NEW = {"vmlx": "1.6.81", "jang": "2.5.50", "mlx": "0.32.4", "mlx-lm": "0.31.3"}
NONE = dict.fromkeys(("vmlx", "jang", "mlx", "mlx-lm", "mlx-vlm"))


@pytest.mark.parametrize("row", STACKS, ids=lambda row: row.name)
def test_every_measured_row_works(row):
    but = f", but {row.but}" if row.but else ""
    works = f"{row.runtime.split(',')[0]}: works{but}"
    assert recognize_stack({**NONE, **row.packages}) == (True, works)


def test_every_row_has_its_file_and_every_file_its_row():
    assert {f"{row.requirements}.txt" for row in STACKS} == {
        path.name for path in (SCRIPTS / "stacks").glob("*.txt")
    }
    assert all(len(row.packages) >= 2 for row in STACKS)


def test_a_loader_that_lacks_a_patch_comes_after_patch_loader():
    for pending in ((LOADER,), (MODEL,), (LOADER, MODEL)):
        works, line = recognize_stack(OLD, pending)
        assert works
        assert line.startswith("vMLX 1.3.97: works after patch_loader, but its model")
    assert "works after patch_loader" in recognize_stack(OLD | {"jang": "2.5.8"}, (LOADER,))[1]
    assert recognize_stack(NEW, (LOADER,)) == (True, "vMLX 1.6.81: works")


def test_mxfp4_on_metal_is_known_to_fail_in_the_old_one_only():
    works, line = recognize_stack(OLD, metal=True, quantizer="mxfp4")
    assert not works
    assert "known to fail because experts in MXFP4" in line
    assert recognize_stack(OLD, quantizer="mxfp4")[0]
    assert recognize_stack(OLD, metal=True)[0]
    assert recognize_stack(NEW, metal=True, quantizer="mxfp4")[0]


def test_turboquant_is_read_by_vmlx_alone_and_runs_on_metal_alone():
    assert recognize_stack(NEW, metal=True, quantizer="turboquant2")[0]
    assert "on a Mac" in recognize_stack(NEW, quantizer="turboquant2")[1]
    assert not runtimes.refusal_reason(NEW, "turboquant2")  # it may be made here for a Mac
    assert "vMLX alone" in runtimes.refusal_reason({**NONE, "mlx-lm": "0.32.2"}, "turboquant2")


def test_an_mlx_lm_that_vmlx_cannot_import_is_known_to_fail():
    works, line = recognize_stack(NEW | {"mlx-lm": "0.32.2"})
    assert not works
    assert "known to fail because" in line
    assert "install mlx-lm 0.31.3" in line


def test_mlx_lm_alone_has_no_such_model():
    works, line = recognize_stack({**NONE, "mlx": "0.32.4", "mlx-lm": "0.32.2"})
    assert not works
    assert "install jang" in line


@pytest.mark.parametrize(
    ("versions", "nearest"),
    [
        (OLD | {"mlx": "0.31.3"}, "vMLX 1.3.97 (mlx 0.31.2)"),
        (OLD | {"jang": None}, "vMLX 1.3.97 (jang 2.5.9)"),
        (NEW | {"vmlx": "1.7.0"}, "vMLX 1.6.81 (vmlx 1.6.81)"),
        ({**NONE, "mlx-vlm": "0.7.11", "mlx": "0.32.4"}, "mlx-vlm 0.7.10 (mlx-vlm 0.7.10)"),
    ],
)
def test_another_version_is_unknown_and_names_the_nearest(versions, nearest):
    works, line = recognize_stack(versions)
    assert not works
    assert "unknown version: run `make selftest`" in line
    assert line.endswith(f"nearest known: {nearest}")
    assert "\n" not in line


def test_an_app_is_known_by_its_packages(tmp_path):
    inside = tmp_path / "vMLX.app" / "Contents" / "Resources" / "site-packages"
    for name in ("vmlx-1.3.97", "jang-2.5.9", "mlx-0.31.2", "mlx_lm-0.31.2", "mlx_metal-0.31.2"):
        (inside / f"{name}.dist-info").mkdir(parents=True)
    assert recognize_stack(app_versions(tmp_path / "vMLX.app"))[1].startswith("vMLX 1.3.97: works")
    folders = ("--source", NANO, "--bundle", tmp_path / "bundle", "--python", sys.executable)
    said = must("check", *folders, "--app", tmp_path / "vMLX.app")
    assert f"ok  runtime in {tmp_path / 'vMLX.app'}: vMLX 1.3.97: works" in said
    assert re.search(r"^(ok |\?\?)  ?runtime: .*(works|make selftest)", said, re.MULTILINE)


def test_the_example_in_its_docstring_holds():
    assert doctest.testmod(runtimes).failed == 0
