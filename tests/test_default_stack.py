"""The stack that `make demo` and TOOLCHAIN_PYTHON take by default, in its own venv.

`make test` installs it into .toolchain/new. Catches: a bundle that the newest vMLX refuses or reads
otherwise than transformers does, with compress ratios 4 and 128 and beyond the sliding window too;
a server of vMLX, mlx-vlm or mlx_lm in which tools, thinking or efforts are lost on the way, or of
which acceptance says what is not so.
"""

import json
import shutil

import matrix
import pytest
import random_talk
from conftest import ROOT, must
from tokenizers import Tokenizer

from dsv4.acceptance import case, client
from dsv4.acceptance.cases import abilities, basics
from dsv4.model.chat_template import ENCODING
from dsv4.toolchain.server import SERVERS, model_name, running_server
from dsv4.toolchain.server_memory import resident_bytes
from dsv4.verification.checks.runtimes import STACKS

PYTHON = ROOT / ".toolchain" / "new" / "bin" / "python"
STACK = next(stack for stack in STACKS if stack.name == "new")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return matrix.bundles(tmp_path_factory.mktemp("matrix"), ["mlx", matrix.RANDOM])


@pytest.mark.parametrize("name", ["mlx", matrix.RANDOM])
@pytest.mark.full
def test_it_computes_what_transformers_computes(bundles, name, tmp_path, monkeypatch):
    some = matrix.questions(name)[:5]
    monkeypatch.setattr(matrix, "questions", lambda name: some)
    found = matrix.logits_of(STACK, PYTHON, bundles[name], tmp_path)
    assert set(found) == {"prefill", "decode"}
    assert max(map(matrix.typical, found.values())) <= matrix.NEAR, found


# What acceptance asks of each server; of those that do not serve by default only what is cheap.
SOME = ("models", "sentence", "stop-word", "thinking-off", "streamed", "tool-call")
ASKED = {"vmlx": [one.name for one in basics.CASES], "mlx-vlm": SOME, "mlx-lm": SOME}
# mlx-vlm 0.7.10 knows no stop words; mlx_lm 0.31.3 takes them as tokens, and " Paris" has others.
WRONG = {"vmlx": set(), "mlx-vlm": {"stop-word"}, "mlx-lm": {"stop-word"}}


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.full
def test_acceptance_says_of_each_server_what_is_so(kind, bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(basics, "ADDITIONS", 6)
    monkeypatch.setattr(basics, "MANY", basics.MANY[1:3])
    monkeypatch.setenv("HF_HOME", f"{tmp_path / 'none'}")  # without it mlx_lm listed no model
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    cases = [one for one in (*basics.CASES, *abilities.cases(1000, 0)) if one.name in ASKED[kind]]
    with running_server(PYTHON, bundles["mlx"], tmp_path / "server.log", kind=kind) as url:
        endpoint = client.find_model(url, "", "")
        named = client.Endpoint(url, model_name(kind, bundles["mlx"]))
        assert client.ask_question(named, case.WHO, 40).content == case.NANO
        assert resident_bytes(url) > 50e6
        first, nano = case.identify_model(endpoint)
        outcomes = {one.name: case.run_case(endpoint, one, nano) for one in cases}
    assert (first.verdict, nano) == ("right", True)
    skipped = {"effort-max", "tool-call"} & set(outcomes)
    assert {name for name, one in outcomes.items() if one.verdict == "skipped"} == skipped
    wrong = {name: one.why for name, one in outcomes.items() if one.verdict == "wrong"}
    assert set(wrong) == WRONG[kind], wrong


# The keys of the tool stand in the order of the alphabet, into which mlx-vlm brings them.
TOOL = {"description": "Returns a file.", "name": "read",
        "parameters": {"properties": {"path": {"type": "string"}}, "type": "object"}}  # fmt: skip
CALL = {"type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}}
TALKS = {
    "plain": {"messages": [{"role": "user", "content": "17+28?"}], "enable_thinking": False},
    "tools, thinking and an effort": {
        "messages": [
            {"role": "user", "content": "Read a.txt"},
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "eleven"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "enable_thinking": True,
        "reasoning_effort": "high",
    },
}


# One layer, one expert a token: on a CPU the nano takes half a minute for a prompt with tools. The
# layer has a compressor, as mlx_lm batches models without, and jang's cannot be batched.
SMALLEST = {
    "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1, "o_groups": 1,
    "o_lora_rank": 128, "n_routed_experts": 2, "num_experts_per_tok": 1, "num_hash_layers": 0,
    "num_nextn_predict_layers": 0, "compress_ratios": [128],
}  # fmt: skip


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A bundle with DeepSeek's own encoding of -0731, as the nano's knows no tools."""
    source = tmp_path_factory.mktemp("talking") / "source"
    must("lab/make_source", "--source", source, "--shards", 1, "--sizes", json.dumps(SMALLEST))
    shutil.copyfile(random_talk.OFFICIAL, source / ENCODING)
    folders = ("--source", source, "--bundle", source.with_name("bundle"))
    for stage in ("convert", "finalize", "patch"):
        must(stage, *folders)
    return source.with_name("bundle")


@pytest.mark.parametrize("kind", SERVERS)
def test_a_request_reaches_the_model_as_the_encoder_s_prompt(kind, talking, tmp_path):
    encoding = random_talk.encoder(random_talk.OFFICIAL, "0731")
    tokenizer = Tokenizer.from_file(str(talking / "tokenizer.json"))
    found, expected = {}, {}
    with running_server(PYTHON, talking, tmp_path / "server.log", kind=kind) as url:
        endpoint = client.find_model(url, "", "")
        for name, talk in TALKS.items():
            prompt = random_talk.official(encoding, {**talk, "add_generation_prompt": True})
            expected[name] = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
            options = {key: talk[key] for key in talk if key not in ("messages", "tools")}
            body = {**talk, "max_tokens": 1, "chat_template_kwargs": options}
            found[name] = client.ask(endpoint, body, 600).prompt_tokens
    assert found == expected
