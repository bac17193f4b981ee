"""Foreign text says nothing of its own: on the terminal, in a model card, on a page.

Catches: an escape sequence, a control or bidi mark, a line break or a megabyte from a file that
reaches the terminal; a line `error:` or `passed:` forged by a name; a value of the model card's
front matter that adds a line to it.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import NANO, SCRIPTS, script

from dsv4.errors import UserError, run, with_path
from dsv4.model.json_schemas import origin_of
from dsv4.storage.safetensors_file import PendingTensor, read_shard, write_shard
from dsv4.text import LINE, escape_line, join_some, page_text, short_repr
from dsv4.verification.report import card
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.report.verify_page import VALUE_LENGTH

OWNED = "mlx\x1b]0;OWNED\x07\x1b[2K\rpassed: all good"
HOSTILE = [
    OWNED, "a\nerror: b", "a\r\npassed: c", "\x00", "\x85\x9b31m", "\u202edlog\u2066",
    "\u200f\ufeff", "\u2028\u2029", "\ud800", "\U000e0041", "\x7f",
    "x" * 1_000_000, "\x1b" * 1_000_000,
]  # fmt: skip


def is_plain(text: str, limit: int) -> bool:
    return text.isprintable() and len(text) <= limit and text.encode("utf-8") is not None


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_becomes_one_short_plain_line(text):
    assert is_plain(escape_line(text), 200)
    assert is_plain(short_repr(text), 200)
    assert is_plain(short_repr([text, {text: [text] * 1000}] * 1000), 200)
    assert is_plain(f"{UserError(text, text, text, text)}", LINE)
    assert is_plain(join_some([text] * 10_000), LINE)
    assert escape_line(escape_line(text)) == escape_line(text)


def test_what_is_plain_stays_as_it_is():
    for text in ("layers.0.attn.wq_a.weight", "<｜end▁of▁sentence｜>", "Grüße, 你好", "a\\nb"):
        assert escape_line(text) == text


def test_random_text_becomes_plain():
    seed = 20261125
    rng = random.Random(seed)
    for i in range(20_000):
        text = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(8)))
        assert is_plain(escape_line(text, 40), 40), (seed, i)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_findings_checks_card_and_page_are_plain(text):
    findings = Findings()
    findings.add("shard-broken", text, text, text)
    for place in next(iter(findings)).places:
        assert all(is_plain(value, 300) for value in place.values())
    assert all(is_plain(line, LINE) for line in Check(text, 1, text, text).text().split("\n"))
    for said in (
        card.escape_cell(text),
        card.escape_yaml(text),
        card.escape_code(text),
        page_text(text, VALUE_LENGTH),
    ):
        assert "\n" not in said
        assert said.isprintable()


def test_a_card_cannot_be_written_by_a_name():
    assert card.escape_yaml("a/b\nlicense: mit") == '"a/b\\\\nlicense: mit"'
    assert "|" not in card.escape_cell("a | b").replace("\\|", "")
    assert "`" not in card.escape_code("a`b")[1:-1]
    assert "<" not in card.escape_cell("<img src=x>") + card.escape_code("<img src=x>")


ORIGIN = {"repo": "user/name", "commit": "0a" * 20, "files": {"a": {"sha256": "ab" * 32}}}


@pytest.mark.parametrize(
    "change",
    [
        {"repo": "user/name\nlicense: mit"}, {"repo": "user/name\n"}, {"repo": 5},
        {"commit": "x y"}, {"commit": ["a"]}, {"files": []}, {"files": {"a": {}}},
        {"files": {"a": {"sha256": "`"}}},
        {"files": {"a": {"sha256": 1}}}, {"files": None},
    ],
)  # fmt: skip
def test_an_origin_that_cannot_be_said_is_not_recorded(change):
    assert origin_of({"source": ORIGIN}) == ORIGIN
    assert origin_of({"source": ORIGIN | change}) is None
    assert origin_of({"source": "x"}) is None


def test_metadata_and_names_of_a_bundle_reach_the_terminal_plain(good, tmp_path):
    """As in HOSTILE.md: the quantizer's name, a tensor's, a file's, a label's."""
    bundle = shutil.copytree(good, tmp_path / "bundle")
    path = next(bundle.glob("*.safetensors"))
    shard = read_shard(path)
    planned = [
        PendingTensor(t.name, t.dtype, t.shape, lambda t=t: [path_bytes(good, path.name, t)])
        for t in shard.tensors.values()
    ]
    planned.append(PendingTensor(f"x{OWNED}", "U8", (1,), lambda: [b"x"]))
    write_shard(path, planned, shard.metadata | {"requantize_quantizer": OWNED})
    (bundle / "a\x1b[2K.safetensors").write_bytes(b"")
    config = json.loads((bundle / "config.json").read_text())
    config["quantization"][OWNED] = {"bits": OWNED}
    (bundle / "config.json").write_text(json.dumps(config))
    done = script("verify", "--bundle", bundle, "--level", 1, "--without-loader")
    assert done.returncode == 1
    for said in (done.stdout, done.stderr):
        assert all(line.isprintable() for line in said.split("\n")), said
        assert not any(line.startswith("passed") for line in said.split("\n"))


def path_bytes(folder, name, tensor) -> bytes:
    with (folder / name).open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


# --- Operating-system errors, and streams that are closed


def test_an_error_of_an_open_file_names_its_path(capsys):
    def main() -> int:
        with with_path("/there/it.is"):
            raise OSError(28, "No space left on device")

    assert run(main) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: /there/it.is: No space left on device; free space")


def test_a_full_disk_under_standard_output_is_named():
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, SCRIPTS / "verify.py", "--bundle", NANO, "--level", "1",
             "--without-loader"], stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "standard output" in done.stderr


COMMANDS = {
    "verify": ["--bundle", NANO, "--level", "1", "--without-loader"],
    "repair": ["--bundle", NANO, "--dry-run"],
    "check": ["--source", NANO, "--bundle", "/tmp/none", "--python", "/bin/true"],
    "convert": ["--source", NANO, "--bundle", "/tmp/none", "--dry-run"],
    "publish": ["--bundle", NANO, "--to", "a/b", "--report", "/none", "--dry-run"],
    "report": ["--json", "/none", "--out", "/none"],
    "smoke": ["--port", "1"],
    "serve": ["--bundle", "/none"],
    "download": ["--source", NANO, "--repo", ""],
    "patch": ["--bundle", NANO, "--dry-run"],
    "finalize": ["--source", NANO, "--bundle", "/none"],
    "requantize": ["--source", NANO, "--bundle", "/none"],
    "patch_loader": ["--file", "/none/x.py"],
    "inspect_bundle": ["--help"],
}


# Closed streams, or a pipe that nobody reads, as a shell passes them to a command.
CLOSED = (">&-", ">&- 2>&-", "<&- >&-", "| true")
# All of them for one command; each other command in one way, and in the rest in test-full.
WAYS = [
    pytest.param(
        name, how,
        marks=[] if name == "verify" or CLOSED[n % 4] == how else pytest.mark.full,
    )
    for n, name in enumerate(COMMANDS) for how in CLOSED
]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_a_closed_stdout_gives_no_traceback(name, how):
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, COMMANDS[name])]
    done = subprocess.run(["sh", "-c", f'"$@" {how}', "sh", *command], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_terminal_of_ascii_takes_what_is_said():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    before, sys.stdout = sys.stdout, stream
    try:
        assert run(lambda: print("a → b") or 0) == 0
    finally:
        sys.stdout = before
