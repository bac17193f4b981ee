"""accept: what each case sees, in a server of this machine that has one planted fault.

Catches: a fault that its case lets pass, a case that a right server fails, a case without an end of
its own, a key in any output, a skipped case called right.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
from conftest import refusal, script
from model_server import LIMIT, Model

from dsv4.acceptance import case, client, speed
from dsv4.acceptance.cases import abilities, basics
from dsv4.errors import UserError
from dsv4.toolchain.server import free_port
from dsv4.toolchain.server_memory import resident_bytes

CASES = (*basics.CASES, *abilities.cases(16000, LIMIT))
# Each planted fault, and the cases that must see it; no other may be wrong.
FAULTS = {
    "wrong-sum": {
        "additions",
        "effort-high",
        "effort-max",
        "thinking-on",
        "thinking-off",
        "cancelled",
        "context-limit",
    },
    "endless-sentence": {"sentence"},
    "stop-ignored": {"stop-word"},
    "wrong-reason": {"max-tokens"},
    "limit-300": {"no-max-tokens"},
    "skips-numbers": {"no-max-tokens"},
    "leaks": {"thinking-on", "effort-high", "effort-max"},
    "thinks-never": {"thinking-on"},
    "thinks-always": {"thinking-off"},
    "no-effort": {"effort-high", "effort-max"},
    "not-twice": {"twice", "streamed", "among-others"},
    "dropped-piece": {"streamed"},
    "no-reason": {"streamed"},
    "no-done": {"streamed"},
    "cross-talk": {"among-others"},
    "left-answer": {"cancelled"},
    "left-hang": {"cancelled"},
    "needle-lost": {"needle-6000", "needle-16000"},
    "call-as-text": {"tool-call"},
    "call-stops": {"tool-call"},
    "wrong-city": {"tool-call"},
    "result-unused": {"tool-call"},
    "forgets-turns": {"turns"},
    "mojibake": {"languages"},
    "fenced": {"json"},
    "cut": {"context-limit"},
    "loop": {"loops"},
    "bos": {"loops"},
    "short": {"loops"},
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(basics, "ADDITIONS", 5)


def wrong(fault: str, cases=CASES) -> dict[str, str]:
    """Case → what it says is wrong, of a server with a fault."""
    with Model(fault) as model:
        endpoint = client.find_model(model.url, "", "")
        assert endpoint.most == LIMIT
        outcomes = [case.run_case(endpoint, one) for one in cases]
    assert "skipped" not in {one.verdict for one in outcomes}
    return {one.name: one.why for one in outcomes if one.verdict == "wrong"}


def test_a_right_server_is_right_in_every_case():
    assert wrong("") == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_by_its_cases_and_no_other(fault):
    cases = CASES
    if fault == "left-hang":  # the case's own limit ends it
        cases = [dataclasses.replace(c, limit=0.7) for c in CASES if c.name == "cancelled"]
    found = wrong(fault, cases)
    assert set(found) == FAULTS[fault], found
    assert all(why.isprintable() and len(why) <= 700 for why in found.values())


@pytest.mark.parametrize(
    ("fault", "line"),
    [("hang", "no whole answer in"), ("500", "HTTP 500: "), ("html", "a page: <html>"),
     ("endless", "more than")],
)  # fmt: skip
def test_a_broken_server_is_one_line_in_each_case_and_within_its_limit(fault, line):
    some = [
        c for c in CASES if c.name in ("additions", "among-others", "streamed", "context-limit")
    ]
    start = time.monotonic()
    found = wrong(fault, [dataclasses.replace(c, limit=0.4) for c in some])
    assert time.monotonic() - start < 10  # the limits are 1.6 in all
    assert set(found) == {c.name for c in some}
    assert all(line in why and why.isprintable() for why in found.values()), found


def test_a_server_whose_list_of_models_is_empty_is_wrong():
    """As mlx_lm's without a hub cache: the list's body is empty, and clients stop there."""
    listing = next(one for one in CASES if one.name == "models")
    with Model("no-list") as server:
        endpoint = client.find_model(server.url, "", "")
        result = case.run_case(endpoint, listing)
    assert (result.verdict, result.why) == ("wrong", "'default_model' is not listed: []")


# ------------------------------------------------------------------------------- the whole command


def run_accept(server: Model, tmp_path, *more: object) -> tuple[int, str, dict, str]:
    """Return exit status, output, JSON and page of a run with prompts of 1,000 tokens."""
    out = tmp_path / "out" / "v1.6"
    done = script("accept", "--url", server.url, "--context", 1000, "--out", out, *more)
    assert "Traceback" not in done.stderr
    written = [out.with_name(f"v1.6{ending}").read_text() for ending in (".json", ".html")]
    assert len(list(out.parent.iterdir())) == 2
    return done.returncode, done.stdout + done.stderr, json.loads(written[0]), written[1]


def test_a_right_server_is_accepted_and_measured(tmp_path):
    with Model() as server:
        status, said, result, page = run_accept(server, tmp_path)
    assert (status, result["verdict"]) == (0, "right"), said
    left_out = {c["name"]: c["why"] for c in result["server"]["cases"] if c["verdict"] != "right"}
    assert left_out == {"needle-6000": "CONTEXT=1000", "needle-16000": "CONTEXT=1000"}
    measured = [(s["prompt"], s["at_once"]) for s in result["server"]["speed"]]
    assert measured == [(100, 1), (100, 4), (1000, 1), (1000, 4)]
    assert "Accepted: 22 cases right, 0 wrong, 2 skipped." in page
    assert result["server"]["memory"] > 1 << 20  # of this process, which serves


def test_two_servers_are_compared_and_the_first_one_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first-secret")
    monkeypatch.setenv("AGAINST_API_KEY", "sk-other-secret")
    with Model("forgets-turns") as server, Model("html-in-answer") as other:
        status, said, result, page = run_accept(server, tmp_path, "--against", other.url)
        keys = [{h.get("Authorization") for h in one.headers} for one in (server, other)]
    assert keys == [{"Bearer sk-first-secret"}, {"Bearer sk-other-secret"}]
    assert status == 1
    assert "found wrong: turns, expected all right; see the page" in said.splitlines()[-1]
    assert {c["name"] for c in result["against"]["cases"] if c["verdict"] == "wrong"} == set()
    parted = set(re.findall(r"<b>([\w-]+)</b>: \w+, the other \w+; the answers differ", page))
    assert parted == {"turns", "sentence", "twice", "streamed", "among-others"}
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "secret" not in said + page + json.dumps(result)


def test_a_key_that_a_server_sends_back_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first-secret")
    with Model("echo-key") as server:
        status, said, result, page = run_accept(server, tmp_path)
    assert status == 1
    verdicts = [one["verdict"] for one in result["server"]["cases"]]
    assert verdicts == ["wrong", *["skipped"] * (len(verdicts) - 1)]
    assert "Bearer [key]" in page
    assert "secret" not in said + page + json.dumps(result)


@pytest.mark.parametrize(
    ("models", "options", "line"),
    [
        (["a", "b"], (), "several models: a, b, expected one; MODEL_NAME=…"),
        (["a"], ("--model-name", "x\x1b[2K"), "MODEL_NAME: found 'x\\x1b[2K', expected one of a"),
        (["a"], ("--url", "file:///etc/x"), "URL: found 'file:///etc/x', expected a server"),
        (["a"], ("--context", "7"), "CONTEXT: found '7', expected a number of tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(models, options, line, tmp_path):
    with Model(models=models) as server:
        assert line in refusal("accept", "--url", server.url, "--out", tmp_path / "a", *options)


def test_no_server_and_a_key_that_is_none_are_one_line_each(tmp_path, monkeypatch):
    assert "make serve" in refusal("accept", "--port", free_port(), "--out", tmp_path / "a")
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    last = refusal("accept", "--port", free_port(), "--out", tmp_path / "a")
    assert "OPENAI_API_KEY: found blanks" in last
    assert "two" not in last


def test_what_the_nano_cannot_pass_is_skipped_by_name_and_never_right():
    with Model("nano") as server:
        endpoint = client.find_model(server.url, "", "")
        assert case.identify_model(endpoint)[1]
        outcomes = [case.run_case(endpoint, one, True) for one in CASES]
    assert {o.name for o in outcomes if o.verdict == "skipped"} == {
        "effort-max", "needle-1000", "needle-6000", "needle-16000", "tool-call", "turns",
        "languages", "json", "context-limit", "loops",
    }  # fmt: skip
    assert all(o.why and not o.exchanges for o in outcomes if o.verdict == "skipped")


@pytest.mark.parametrize(("fault", "verdict"), [("limit-2", "wrong"), ("", "right")])
def test_a_limit_is_seen_by_what_the_nano_can_say_too(fault, verdict):
    one = next(case for case in CASES if case.name == "no-max-tokens")
    with Model(fault) as server:
        outcome = case.run_case(client.find_model(server.url, "", ""), one, nano=True)
    assert outcome.verdict == verdict
    assert outcome.exchanges[0][0].startswith('{"messages": "Write one sentence')


# ------------------------------------------------------------------------------- streams and speed

END = client.Endpoint("http://127.0.0.1:9", "m", "sk-secret")


def joined(*pieces: str) -> client.Reply:
    return client._join_events(
        [(float(i), piece.encode()) for i, piece in enumerate(pieces)], END, 9.0
    )


def chunk(**delta: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}\r\n\r\n"


def test_the_first_token_is_the_first_text_and_an_event_may_come_in_pieces():
    text = chunk(content="It is sk-secret.")
    reply = joined(chunk(role="assistant"), ": wait\n", text[:20], text[20:], "data: [DONE]\n")
    assert (reply.first, reply.tokens, reply.whole) == (3.0, 1, True)
    assert reply.answer.content == "It is [key]."


@pytest.mark.parametrize(
    "event",
    ["", "[]", "5", "{", '{"error": {"message": "full"}}', '{"choices": 1}', '{"choices": [[]]}',
     '{"choices": [{"delta": {"content": 5}}]}', '{"choices": [], "usage": {"prompt_tokens": "x"}}',
     '{"choices": ' + "[" * 5000],
)  # fmt: skip
def test_an_event_of_another_form_is_one_line(event):
    with pytest.raises(UserError) as stopped:
        joined(f"data: {event}\n")
    assert str(stopped.value).isprintable()


def test_a_rate_is_told_of_enough_tokens_and_a_hang_is_a_fault(monkeypatch):
    def reply(tokens: int, first: float) -> client.Reply:
        return client.Reply(client.Answer("x", "", "stop"), (), 130, tokens, first, 6.0)

    assert speed.summarize_replies(100, [reply(21, 1.0)], 6.0).rate == 4.0
    both = speed.summarize_replies(100, [reply(21, 1.0), reply(21, 3.0)], 6.0)
    assert (both.first, both.rate, both.counted) == (2.0, 8.0, 130)
    assert speed.summarize_replies(100, [reply(3, 1.0)], 6.0).rate is None
    assert "without a token" in speed.summarize_replies(100, [reply(0, 0.0)], 6.0).why
    monkeypatch.setattr(speed, "LIMIT", -4.9)  # and 5 s for 100 tokens
    with Model("hang") as server:
        found = list(speed.measure(client.Endpoint(server.url, "m"), 100))
    assert all("no whole answer" in one.why for one in found)


def test_a_prompt_has_the_tokens_that_the_server_counts():
    with Model() as server:
        server.in_a_word = 3
        found = list(speed.measure(client.Endpoint(server.url, "m"), 1000))
    assert [(one.prompt, one.at_once) for one in found] == [
        (100, 1),
        (100, 4),
        (1000, 1),
        (1000, 4),
    ]
    for one in found:  # a sentence of nine words is never cut
        assert one.prompt - 3 * 9 < one.counted < one.prompt + 3 * 9


def test_the_memory_of_a_server_elsewhere_is_not_told():
    assert resident_bytes("https://api.example.com") is None
    assert resident_bytes(f"http://127.0.0.1:{free_port()}") is None
