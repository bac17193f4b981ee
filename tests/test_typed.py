"""Documents and answers of other types than their readers count on: one line, never a traceback.

Catches: a value of any type in any place of a JSON document, of verify.json, of what a child or a
server answers, that ends in a traceback or is believed.
"""

from __future__ import annotations

import copy
import http.server
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import pytest
from conftest import NANO, SEED, must, refusal, script

from dsv4.acceptance.client import Endpoint, ask_question
from dsv4.conversion import runtime_documents
from dsv4.errors import UserError
from dsv4.model.load import open_bundle
from dsv4.model.special_tokens import token_ids
from dsv4.storage.checkpoint import read_json
from dsv4.storage.json_types import first_mismatch
from dsv4.toolchain import child_process, python_env
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.report import card
from dsv4.verification.report.schema import read_result
from dsv4.verification.report.verify_page import page
from dsv4.verification.scan import DOCUMENTS, scan

FUZZ = int(os.environ.get("FUZZ", "1"))
VALUES = (
    None, True, -1, 10**400, 1.5, float("nan"), float("inf"), "", "\x1b[2K\nx", [], [1], [None], {},
    {"a": []}, [[[]]], "gone",
)  # fmt: skip


def places_of(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The ways to every part of a document; of long lists and objects the first two only."""
    if at:
        yield at
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys[:30] if len(at) < 1 else keys[:3]:
            yield from places_of(value[key], (*at, key))


def with_value(document: Any, at: tuple, value: Any) -> Any:
    """A copy with another value at one place; "gone": without it."""
    document = copy.deepcopy(document)
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    if value == "gone":
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return document


@pytest.mark.parametrize(
    ("value", "form", "where"),
    [
        ({"a": [1, "x"]}, {"a": [int]}, "a[1]"),
        ({"a": True}, {"a": int}, "a"),
        ({"a": float("nan")}, {"a": float}, "a"),
        ({"a": 2**63}, {"a": int}, "a"),
        ({}, {"a": int}, "a"),
        ({"b": None}, {"b?": int}, "b"),
        ({"k": {"n": 1}}, {str: {"n": str}}, "['k'].n"),
        ({"c": {"n": 1}}, {"c": ({"n": str}, None)}, "c.n"),
        ([], {}, ""),
    ],
)
def test_the_first_misfit_is_named(value, form, where):
    assert first_mismatch(value, form)[0] == where


def test_what_fits_fits():
    form = {"a": [int], "b?": (str, None), "c": {str: float}}
    assert first_mismatch({"a": [], "c": {"x": 1, "y": 2.5}, "more": object()}, form) is None
    assert first_mismatch({"a": [1], "b": None, "c": {}}, form) is None


# --- A bundle's documents


TOKENIZERS = {
    "vocab-list": {"model": {"vocab": []}},
    "vocab-string": {"model": {"vocab": "x"}},
    "vocab-number": {"model": {"vocab": 5}},
    "vocab-of-strings": {"model": {"vocab": {"a": "b"}}},
    "model-list": {"model": []},
    "added-number": {"added_tokens": 5},
    "added-numbers": {"added_tokens": [1]},
    "added-nulls": {"added_tokens": [None]},
    "added-object": {"added_tokens": {"a": 1}},
    "added-string": {"added_tokens": "abc"},
    "content-list": {"added_tokens": [{"content": [], "id": 1}]},
    "id-string": {"added_tokens": [{"content": "a", "id": "1"}]},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_of_other_types_is_a_finding_and_a_line(kind, good, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(good, bundle)
    (bundle / "tokenizer.json").write_text(json.dumps(TOKENIZERS[kind]))
    assert "tokenizer-missing" in bundles.judge(bundle, None, level=1)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        token_ids(bundle)
    assert "tokenizer.json" in refusal("patch", "--bundle", bundle)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_any_value_anywhere_in_a_document_is_no_traceback(name, good, tmp_path):
    """verify's level 1, patch's part and inspect's judgement, in this process."""
    bundle = tmp_path / "bundle"
    shutil.copytree(good, bundle)
    path = bundle / name
    document = read_json(path)
    rng = random.Random(SEED)
    places = list(places_of(document))
    tried = 0
    for at in rng.sample(places, min(len(places), 20 * FUZZ)):
        for value in rng.sample(VALUES, 4):
            path.write_text(json.dumps(with_value(document, at, value)))
            said = (SEED, name, at, value)
            try:
                findings = bundles.judge(bundle, None, level=1)
                found = bundles.Findings()
                runtime_verdicts(scan(bundle, found), found)
                assert findings is not None, said
                runtime_documents.patched_documents(open_bundle(bundle))
            except UserError:
                pass
            except Exception as error:
                raise AssertionError(said) from error
            tried += 1
    assert tried


DEEP = {"arrays": b"[" * 100_000, "objects": b'{"a":' * 100_000, "closed": b"[" * 900 + b"]" * 900}


@pytest.mark.parametrize("name", [*DOCUMENTS, "verify.json"])
@pytest.mark.parametrize("kind", DEEP)
def test_deep_json_is_one_line(kind, name, good, tmp_path):
    path = tmp_path / name
    path.write_bytes(b'{"x": ' + DEEP[kind] + (b"}" if kind == "closed" else b""))
    with pytest.raises(UserError):
        read_json(path)


def test_half_a_surrogate_pair_is_no_document(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "\\ud800"}')
    with pytest.raises(UserError, match="no valid JSON"):
        read_json(path)
    path.write_text('{"a": "\\ud83d\\ude00 \\\\ud800"}')
    assert read_json(path) == {"a": "😀 \\ud800"}


# --- verify.json


@pytest.fixture(scope="module")
def result(good, source, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("typed") / "verify.json"
    must("verify", "--bundle", good, "--source", source, "--without-loader", "--json", out)
    return json.loads(out.read_text())


def test_any_value_anywhere_in_verify_json_is_no_traceback(result, good, tmp_path):
    path = tmp_path / "verify.json"
    found = bundles.Findings()
    bundle = scan(good, found)
    rng = random.Random(SEED)
    for at in places_of(result):
        for value in rng.sample(VALUES, 6):
            path.write_text(json.dumps(with_value(result, at, value)))
            try:
                read = read_result(path)
                page(read)
                if read["errors"].get("experts") and read["sizes"]:
                    card.card(card.Facts("a/b", bundle, read, None, None))
            except UserError:
                pass
            except Exception as error:
                raise AssertionError((SEED, at, value)) from error


def test_verify_json_with_a_key_missing_is_one_line_of_report_and_publish(result, tmp_path):
    path = tmp_path / "verify.json"
    for key in ("errors", "sizes", "versions", "levels", "hashes", "findings"):
        path.write_text(json.dumps({k: v for k, v in result.items() if k != key}))
        assert key in refusal("report", "--json", path, "--out", tmp_path / "x.html")
    assert "hashes" not in refusal("publish", "--bundle", NANO, "--to", "a/b", "--report", path)


# --- Numbers on a command line


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("serve", ("--bundle", NANO, "--port", "99999")),
        ("serve", ("--bundle", NANO, "--port=-1")),
        ("serve", ("--bundle", NANO, "--port", "0")),
        ("smoke", ("--port", "99999")),
        ("smoke", ("--port", "9" * 5000)),
        ("verify", ("--bundle", NANO, "--jobs", "0")),
        ("verify", ("--bundle", NANO, "--jobs", "999999999")),
        ("convert", ("--source", NANO, "--bundle", "/none", "--jobs", "0")),
        ("convert", ("--source", NANO, "--bundle", "/none", "--workers", "0")),
        ("requantize", ("--source", NANO, "--bundle", "/none", "--jobs", "0")),
        ("requantize", ("--source", NANO, "--bundle", "/none", "--jobs", "\u00b2")),
        ("repair", ("--bundle", NANO, "--jobs", "-3")),
        ("download", ("--source", NANO, "--repo", "", "--workers", "0")),
    ],
)
def test_a_number_that_cannot_be_is_a_usage_error(name, option):
    done = script(name, *option)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


# --- Children


def stand_in(folder: Path, text: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


CHILDREN = {
    "true": "exit 0",
    "echo": 'echo "$@"',
    "a list": "echo '[]'",
    "another object": "echo '{\"python\": 5}'",
    "null folders": 'echo \'{"python":"","executable":"","packages":{},"metal":null}\'',
    "no end": "exec yes",
    "a long line": "head -c 50000000 /dev/zero",
    "bytes": "printf '\\377\\376\\n'",
    "fails": "echo 'x\033[2K' >&2; exit 3",
}


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_child_that_answers_nonsense_is_one_line(kind, tmp_path):
    python = stand_in(tmp_path, CHILDREN[kind])
    with pytest.raises(UserError) as stop:
        python_env.probe(python)
    assert f"{stop.value}".isprintable()


def test_a_child_that_is_silent_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(python_env, "PATIENCE", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError):
        python_env.probe(stand_in(tmp_path, "exec sleep 60"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("python", ["/bin/true", "/bin/echo"])
def test_check_and_verify_take_no_nonsense_from_a_toolchain(python, tmp_path):
    done = script("check", "--source", NANO, "--bundle", tmp_path / "b", "--python", python)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    done = script("verify", "--bundle", NANO, "--level", "1", "--python", python)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# --- A server


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what `answer` writes."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        pass


def served(answer, seconds: float = 5) -> Any:
    """What `ask` makes of a server that answers so."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        running.answer = answer
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        try:
            endpoint = Endpoint(f"http://127.0.0.1:{running.server_port}")
            return ask_question(endpoint, "?", 5, seconds)
        finally:
            running.shutdown()


def saying(data: bytes, status: int = 200):
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def message(content: object, **more: object) -> bytes:
    choice = {"message": {"content": content, **more}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice]}).encode()


def test_a_right_answer_is_read():
    found = served(saying(message("45", reasoning="17+28")))
    assert (found.content, found.reasoning, found.finish_reason) == ("45", "17+28", "stop")
    assert served(saying(message(None))).content == ""


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [1]}', b'{"choices": {"0": 1}}',
        b'{"choices": [{"message": null}]}', b'{"choices": [{"message": "x"}]}',
        b'{"choices": [{"message": {}, "finish_reason": []}]}', message(5), message([{"text": ""}]),
        message("x", reasoning={}), b'{"choices": ' + b"[" * 100_000, b"\xff\xfe",
    ],
)  # fmt: skip
def test_an_answer_of_other_types_is_one_line(data):
    with pytest.raises(UserError):
        served(saying(data))


@pytest.mark.parametrize("status", [302, 404, 500])
def test_another_status_is_one_plain_line(status):
    with pytest.raises(UserError) as stop:
        served(saying(b"a\x1b[2K\npassed: b" * 1000, status))
    assert f"HTTP {status}" in f"{stop.value}"
    assert f"{stop.value}".isprintable()


def without_end(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def drop_by_drop(handler: Handler) -> None:
    while True:
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.05)


def test_an_answer_without_end_is_cut():
    with pytest.raises(UserError, match="more than"):
        served(without_end)


def test_an_answer_has_a_time_limit_in_all():
    start = time.monotonic()
    with pytest.raises(UserError, match="no whole answer"):
        served(drop_by_drop, 1)
    assert time.monotonic() - start < 4


def test_a_proxy_is_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert served(saying(message("45"))).content == "45"


def test_the_last_words_of_a_log_cost_no_memory(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, 2)
        file.write(b"\nValueError: at last\n")
    assert child_process.last_log_line(log) == "ValueError: at last"
