"""smoke: each known way of being wrong has its own message, and a right answer passes.

Catches: BOS loops that look like an answer, an empty answer, repetition, an answer cut off by
length, a wrong sum, and a judge that finds 45 inside another number.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import refusal

import serve
from dsv4.acceptance.client import Answer
from dsv4.acceptance.smoke_questions import sentence_fault, sum_fault
from dsv4.errors import UserError
from dsv4.toolchain import python_env
from dsv4.toolchain.server import NAME, SERVERS, free_port, server_environment

BOS = "<｜begin▁of▁sentence｜>"
MOON = "The moon is Earth's only natural satellite."


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer(MOON, "", "stop"), None),
        (Answer("", BOS * 400, "length"), "nothing but"),
        (Answer("", "", "length"), "empty"),
        (Answer("plus " * 60, "17 ", "length"), "repetition"),
        (Answer(MOON, "", "length"), "finish_reason 'length'"),
        (Answer("A sentence it is.", "", "stop"), "none about the moon"),
    ],
)
def test_the_moon_sentence_is_judged(answer, fault):
    found = sentence_fault(answer)
    assert (found is None) if fault is None else (fault in found)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("45", "17+28=45", "stop"), None),
        (Answer("", "It is 45", "length"), None),
        (Answer("It is 145 or 450.", "", "stop"), "a wrong sum"),
        (Answer("Let me think about", "", "length"), "cut off"),
        (Answer(BOS * 80, "", "length"), "nothing but"),
    ],
)
def test_the_sum_is_judged(answer, fault):
    found = sum_fault(answer)
    assert (found is None) if fault is None else (fault in found)


@pytest.mark.parametrize("kind", SERVERS)
def test_serve_prints_a_name_and_a_line_of_curl_that_a_shell_reads(kind, tmp_path):
    bundle = tmp_path / "it's a bundle"
    first, line = serve.example_request(kind, bundle, 8010).splitlines()
    words = shlex.split(line)
    name = json.loads(words[-1])["model"]
    assert first == f"model: {name}"
    assert name == {"vmlx": NAME, "mlx-lm": "default_model"}.get(kind, str(bundle))
    assert words[:2] == ["curl", "http://127.0.0.1:8010/v1/chat/completions"]


def test_mlx_lm_s_hub_cache_is_a_folder_that_exists(monkeypatch):
    """Without one it answers GET /v1/models with an empty body."""
    monkeypatch.setenv("HF_HUB_CACHE", "/none")
    assert Path(server_environment("mlx-lm")["HF_HUB_CACHE"]).is_dir()


def test_a_script_of_the_toolchain_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(python_env, "SCRIPT_SECONDS", 0.2)
    command = [sys.executable, "-c", "import time; time.sleep(20)"]
    with pytest.raises(UserError, match=r"logits: found no end in 0\.2 s"):
        python_env.call_script(command, "logits", "see it")


def test_no_server_gives_one_clear_line():
    assert "make serve" in refusal("smoke", "--port", free_port())
