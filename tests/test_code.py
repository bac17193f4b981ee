"""Nothing of a bundle is run: keys that name code, its encoding file, and the loaders' replay.

Catches: a loader that is shown a key naming code, a child that outlives its parent, a temporary
folder that stays, modules that are found in the folder where the user stands.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import SCRIPTS, must, script

from dsv4.errors import UserError
from dsv4.model.configs import CODE, FIELDS, code_keys, known_fields, without_code
from dsv4.toolchain import child_process

ENCODING = "encoding/encoding_dsv4.py"


@pytest.fixture
def evil(good_copy, tmp_path):
    """(bundle whose files name a program, the file that the program would write)."""
    ran = tmp_path / "it ran"
    program = good_copy / "evil.py"
    program.write_text(f"open({str(ran)!r}, 'w').write('x')\n")
    changes = {
        "config.json": {"model_file": str(program), "auto_map": {"AutoModel": "evil.Model"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.T", None]}},
        "generation_config.json": {"nested": [{"trust_remote_code": True}]},
    }
    for name, change in changes.items():
        path = good_copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return good_copy, ran


def test_keys_that_name_code_are_found_and_nothing_is_run(evil):
    bundle, ran = evil
    result = script("verify", "--bundle", bundle, "--level", "1")
    assert result.returncode == 1
    assert "config-runs-code (4×)" in result.stderr
    for place in ("config.json: model_file", "tokenizer_config.json: auto_map",
                  "generation_config.json: nested.0.trust_remote_code"):  # fmt: skip
        assert place in result.stderr
    assert "loader-" not in result.stderr
    assert not ran.exists()


def test_repair_removes_them_and_undo_brings_them_back(evil, source):
    bundle, ran = evil
    before = {p.name: p.read_bytes() for p in bundle.glob("*.json")}
    must("repair", "--bundle", bundle, "--source", source)
    for path in bundle.glob("*.json"):
        assert not list(code_keys(json.loads(path.read_text())))
    must("repair", "--bundle", bundle, "--undo")
    assert before == {p.name: p.read_bytes() for p in bundle.glob("*.json")}
    assert not ran.exists()


def test_an_encoding_that_is_not_the_sources_is_found_and_mended(good_copy, source):
    path = good_copy / ENCODING
    path.write_text("raise SystemExit\n" + path.read_text())
    result = script("verify", "--bundle", good_copy, "--source", source, "--level", "1",
                    "--without-loader")  # fmt: skip
    assert "encoding-differs" in result.stderr
    must("repair", "--bundle", good_copy, "--source", source)
    assert path.read_bytes() == (source / ENCODING).read_bytes()


def test_no_module_is_found_where_the_user_stands(good, tmp_path):
    """`cd BUNDLE; verify --bundle .` must not import what lies there."""
    for name in ("mlx_lm", "jang_tools", "mlx", "json", "vmlx_engine"):
        (tmp_path / f"{name}.py").write_text("open('it ran', 'w')\n")
    command = [sys.executable, SCRIPTS / "verify.py", "--bundle", good, "--level", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_replay_ends_with_its_parent_and_leaves_nothing(good, tmp_path, how):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, SCRIPTS / "verify.py", "--bundle", good, "--level", "1"]
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (parent.pid, True) in children("runtime_answers"))
    parent.send_signal(how)
    parent.communicate()
    wait_for(lambda: not list(tmp_path.glob("hollow-*")))


def children(word: str) -> list[tuple[int, bool]]:
    """(parent, whether the command has the word) of every process."""
    shown = subprocess.run(["ps", "-axwwo", "ppid=,command="], capture_output=True, text=True)
    pairs = (line.split(None, 1) for line in shown.stdout.splitlines())
    return [(int(pair[0]), word in pair[-1]) for pair in pairs]


def wait_for(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_child_that_hangs_is_ended_with_all_that_it_began(tmp_path):
    code = ("import subprocess, sys, time; subprocess.Popen(['sleep', '1000']); "
            "print('began', flush=True); time.sleep(1000)")  # fmt: skip
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer in 2 s"):
        child_process.run_child(
            [sys.executable, "-c", code], dict(os.environ), tmp_path / "log", 2, "it"
        )
    assert time.monotonic() - start < 10
    assert child_process.last_log_line(tmp_path / "log") == "began"


def test_known_fields_are_no_code():
    assert not FIELDS & CODE
    config = {"vocab_size": 5, "model_file": "x.py", "anything": 1}
    assert known_fields(config) == {"vocab_size": 5}
    assert without_code({"a": [{"auto_map": 1, "b": 2}]}) == {"a": [{"b": 2}]}
    assert not Path(tempfile.gettempdir(), "it ran").exists()
