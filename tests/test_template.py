"""The chat template makes the prompts that DeepSeek's own encoding makes, wherever it is rendered.

Catches: another prompt than the encoder's for any of 2,000 random conversations by either
release's efforts, in transformers' Jinja or in a strict one; arguments read otherwise than Python's
json reads them; something refused by one and not by the other; a foreign template that hangs or
fills memory.
"""

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import random_talk
from conftest import NANO, ROOT
from jinja2 import StrictUndefined, TemplateError
from random_talk import OFFICIAL

from dsv4.model import template_sandbox
from dsv4.model.chat_template import (
    RELEASES,
    SANDBOX,
    TemplateFault,
    conversations,
    encoding_release,
    known_release,
    render_all,
    template_text,
)

SEED = "2026-11-25"
TALKS = 2000
OURS = json.loads((ROOT / "tests" / "conversations.json").read_text(encoding="utf-8"))


def render(text, conversation):
    """Return the prompt of one conversation. Raises TemplateFault."""
    (prompt,) = render_all(text, [conversation])
    if isinstance(prompt, TemplateFault):
        raise prompt
    return prompt


@pytest.fixture(scope="module")
def encodings():
    return {release: random_talk.encoder(OFFICIAL, release) for release in random_talk.RELEASES}


@pytest.fixture(scope="module")
def compiled():
    return {
        name: template_sandbox.environment().from_string(template_text(name)) for name in RELEASES
    }


def seeded(number, seed=SEED):
    return random.Random(f"{seed}-{number}")


def attempt(make, refusal):
    """What `make` returns, or None when it refuses."""
    try:
        return make()
    except refusal:
        return None


def unequal(talks, encodings, render_for):
    """The talks of which encoder and template differ, as (number, release); how many are prompts.

    A talk without an effort, which is all that releases differ in, is tried with one of them.
    """
    wrong, made = [], 0
    for turn, (number, talk) in enumerate(talks):
        releases = list(encodings)
        if "reasoning_effort" not in talk:
            releases = [releases[turn % len(releases)]]
        for release in releases:
            encoding = encodings[release]
            # The encoder refuses by assertions, and by whatever Python raises at a wrong type.
            wanted = attempt(lambda e=encoding, t=talk: random_talk.official(e, t), Exception)
            made += wanted is not None
            if render_for(release, talk) != wanted:
                wrong.append((number, release))
    return wrong, made


def our_talks(release):
    for entry in OURS:
        if entry["release"] in (release, "both"):
            asked = ("messages", "tools", "enable_thinking", "reasoning_effort")
            talk = {**{key: entry[key] for key in asked}, "add_generation_prompt": True}
            yield entry["name"], talk, entry["prompt"]


@pytest.mark.parametrize("release", random_talk.RELEASES)
def test_our_conversations_are_rendered_as_recorded(release):
    talks = list(our_talks(release))
    assert len(talks) > 30
    told = render_all(template_text(release), [talk for _, talk, _ in talks])
    assert [name for (name, _, want), got in zip(talks, told, strict=True) if got != want] == []


def test_random_conversations_are_rendered_as_encoded(encodings, compiled):
    print(f"seed {SEED}, {TALKS} conversations")

    def rendered(release, talk):
        return attempt(lambda: compiled[release].render(**talk), TemplateError)

    talks = ((number, random_talk.talk(seeded(number))) for number in range(TALKS))
    wrong, made = unequal(talks, encodings, rendered)
    assert wrong == [], f"of the talks with seed {SEED}"
    assert made > TALKS  # of about 2,800: most are prompts, not refusals


def call_with(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]}


def test_arguments_are_read_as_json_reads_them(encodings, compiled):
    numbers = [f'{{"a": {n}, "b": [{n}]}}' for n in random_talk.NUMBERS + random_talk.CONSTANTS]
    lone = [
        r'{"a": "\ud83d", "b": ["\udc4b\ud83d"]}',
        r'{"a": "\ud83dx\udc4b\ud83d\ud83d\udc4b\u00e9"}',
    ]
    known = [*random_talk.NO_JSON, *random_talk.NO_OBJECT, *numbers, *lone]
    texts = known + [random_talk.broken(seeded(number)) for number in range(800)]

    def rendered(release, talk):
        return attempt(lambda: compiled[release].render(**talk), TemplateError)

    talks = ((text, call_with(text)) for text in texts)
    wrong, made = unequal(talks, {"0731": encodings["0731"]}, rendered)
    assert wrong == []
    assert made > len(texts) / 2


def test_a_strict_jinja_renders_the_same(encodings):
    """minijinja, in Rust; what it is known to differ in is kept out (see whole_floats)."""
    import minijinja

    env = minijinja.Environment(undefined_behavior="strict")
    env.add_filter("tojson", template_sandbox.tojson)
    env.add_function("raise_exception", template_sandbox.raise_exception)
    for release in RELEASES:
        env.add_template(release, template_text(release))

    def rendered(release, talk):
        try:
            return env.render_template(release, **talk)
        except (TemplateError, minijinja.TemplateError):
            return None

    talks = ((n, whole_floats(random_talk.talk(seeded(n, "strict")))) for n in range(500))
    assert unequal(talks, encodings, rendered)[0] == []
    for release in random_talk.RELEASES:
        for name, talk, prompt in [*our_talks(release), *conversations(release)]:
            assert env.render_template(release, **talk) == prompt, name


def whole_floats(value):
    """Without floats that are whole: minijinja hands 2.0 to a filter in Python as 2."""
    if isinstance(value, float) and value == int(value):
        return value + 0.5 if abs(value) < 1e15 else str(value)
    if isinstance(value, dict):
        return {key: whole_floats(member) for key, member in value.items()}
    return [whole_floats(member) for member in value] if isinstance(value, list) else value


@pytest.mark.parametrize("trimming", [False, True])
def test_neither_trimming_nor_strict_names_change_a_prompt(trimming):
    env = template_sandbox.environment().overlay(
        trim_blocks=trimming, lstrip_blocks=trimming, undefined=StrictUndefined
    )
    for release in random_talk.RELEASES:
        strict = env.from_string(template_text(release))
        for name, talk, prompt in conversations(release):
            assert strict.render(**talk) == prompt, name


def test_transformers_makes_the_same_prompts():
    from transformers import PreTrainedTokenizerFast

    for release in random_talk.RELEASES:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(NANO / "tokenizer.json"), chat_template=template_text(release)
        )
        for name, talk, prompt in [*our_talks(release), *conversations(release)]:
            made = tokenizer.apply_chat_template(talk["messages"], tokenize=False, **without(talk))
            assert made == prompt, name


def without(talk, key="messages"):
    return {name: value for name, value in talk.items() if name != key}


def test_transformers_continues_an_answer(encodings):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(NANO / "tokenizer.json"), chat_template=template_text("0731")
    )
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2, "}]
    wanted = "<｜begin▁of▁sentence｜><｜User｜>Count.<｜Assistant｜></think>1, 2, "
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        == wanted
    )
    messages[1]["wo_eos"] = True
    assert encodings["0731"].encode_messages(messages, "chat") == wanted


def test_the_nano_is_rendered_as_its_own_encoding_does(compiled):
    encoding = random_talk.encoder(NANO / "encoding" / "encoding_dsv4.py", "nano")
    wrong = []
    for number in range(300):
        talk = plain_talk(seeded(number, "nano"))
        thinking = "thinking" if talk["enable_thinking"] else "chat"
        effort = talk["reasoning_effort"]
        wanted = encoding.encode_messages(talk["messages"], thinking, reasoning_effort=effort)
        if compiled["nano"].render(**talk) != wanted:
            wrong.append(number)
    assert wrong == []


def plain_talk(rng):
    """What the nano's encoding knows: a system message, questions and answers in turn."""
    messages = [random_talk.system(rng)] if rng.random() < 0.5 else []
    for message in messages:
        message.pop("tools", None)
        message.pop("response_format", None)
    for _ in range(rng.randrange(4)):
        answer = {
            "role": "assistant",
            "content": random_talk.content(rng),
            "reasoning_content": "so",
        }
        messages += [{"role": "user", "content": random_talk.content(rng)}, answer]
    messages.append({"role": "user", "content": random_talk.text(rng)})
    return {
        "messages": messages,
        "add_generation_prompt": True,
        "enable_thinking": rng.random() < 0.5,
        "reasoning_effort": rng.choice((None, "low", "high", "max")),
    }


@pytest.mark.parametrize("release", random_talk.RELEASES)
def test_the_built_in_prompts_are_the_encoders(encodings, release):
    talks = conversations(release)
    assert len(talks) >= 24
    assert [
        n for n, t, prompt in talks if random_talk.official(encodings[release], t) != prompt
    ] == []


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_has_a_template_that_makes_the_built_in_prompts(release):
    talks = conversations(release)
    told = render_all(template_text(release), [talk for _, talk, _ in talks])
    assert [name for (name, _, want), got in zip(talks, told, strict=True) if got != want] == []


def test_the_built_in_prompts_tell_the_releases_apart(compiled):
    for release in RELEASES:
        for other in RELEASES:
            made = [
                attempt(lambda t=talk, o=other: compiled[o].render(**t), TemplateError) == prompt
                for _, talk, prompt in conversations(release)
            ]
            assert all(made) == (release == other), (release, other)


@pytest.mark.parametrize(
    ("talk", "sentence"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "Unknown role narrator"),
        ({"messages": [{"content": "x"}]}, "Unknown role None"),
        ({"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "medium"},
         "Unknown reasoning_effort medium, expected one of low, high, max"),
        ({"messages": [{"role": "user", "content": None}]}, "role user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
        ({"messages": [{"role": "developer", "content": ""}]}, "role developer has no content"),
        ({"messages": [{"role": "user", "content": "x", "task": "joke"}]}, "Unknown task joke"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "A tool has no"),
        (call_with("[1]"), "JSON but no object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "A tool call has no"),
    ],
)  # fmt: skip
def test_what_the_encoder_refuses_is_refused_in_a_sentence(talk, sentence):
    with pytest.raises(TemplateFault, match=sentence):
        render(template_text("0731"), talk)


def test_an_encoding_is_recognised_by_its_program_alone():
    official = OFFICIAL.read_bytes()
    assert encoding_release(official) == "0731"
    assert encoding_release(official[official.index(b'"""') :]) == "0731"
    assert encoding_release(b"# a note\n\n" + official) == "0731"
    assert encoding_release(official.replace(b"relentless", b"lenient")) == "first"
    assert encoding_release(official + b"# another line\n") == "0731"
    assert known_release(official + b"# another line\n") is None
    assert encoding_release(b"def broken(:") is None
    assert encoding_release((NANO / "encoding" / "encoding_dsv4.py").read_bytes()) == "nano"
    assert encoding_release(b"") is None


# What a template from anywhere may do to whoever renders it.
DOUBLING = (
    "{%% set n = namespace(a=%s) %%}{%% for i in range(99) %%}"
    "{%% set n.a = n.a %s n.a %%}{%% endfor %%}"
)
HOSTILE = {
    "a loop of 10^9": "{% for i in range(10**9) %}{% endfor %}",
    "a text times 10^10": "{{ 'a' * 10**10 }}",
    "a power of powers": "{{ 10**(10**8) }}",
    "center": "{{ 'a'.center(10**10) | length }}",
    "the filter center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a\n' | indent(10**10) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "format as a method": "{{ '{:>10000000000}'.format(1) }}",
    "a text doubled": DOUBLING % ("'a'", "~"),
    "a list doubled": DOUBLING % ("[1]", "+"),
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros of itself": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
    "1,000 ifs": "{% if true %}" * 1000 + "{% endif %}" * 1000,
    "10^5 parentheses": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
    "10^5 brackets": "{{ " + "[" * 10**5 + "1" + "]" * 10**5 + " }}",
    "10^5 sums": "{{ 1" + "+1" * 10**5 + " }}",
    "an endless prompt": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "a file": "{% include '/etc/passwd' %}",
    "the interpreter": "{{ ''.__class__.__mro__ }}",
    "a change to a message": "{{ messages.append(1) }}",
    "no template": "{% if %}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_sentence(name):
    began = time.monotonic()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TemplateFault) as fault:
        render(HOSTILE[name], {"messages": []})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 10 < len(str(fault.value)) < 400
    assert "\n" not in str(fault.value)
    # On a busy machine the clock runs on while nothing is done, so processor time counts.
    assert after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime < 2
    assert time.monotonic() - began < 10


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory has no bound that is kept")
@pytest.mark.parametrize("name", ["a text doubled", "a list doubled", "indent"])
def test_a_hostile_template_leaves_the_memory_alone(name):
    assert 10 << 20 < memory_of(HOSTILE[name]) < 300 << 20


def memory_of(text):
    """Return the peak resident bytes of template_sandbox.py and its children with a template."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-I', sys.argv[1]], stdin=0, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    asked = json.dumps({"template": text, "conversations": [{"messages": []}]})
    told = subprocess.run(
        [sys.executable, "-c", code, SANDBOX], input=asked, capture_output=True, text=True
    )
    return int(told.stdout) << 10


def test_what_was_rendered_before_the_end_is_kept():
    text = "{% if n == 2 %}{{ (n + 1) ** (10**8) }}{% endif %}{{ n }}"
    first, second, third, fourth = render_all(text, [{"n": n} for n in (0, 1, 2, 3)])
    assert (first, second) == ("0", "1")
    assert isinstance(third, TemplateFault)
    assert str(third) == str(fourth) == "it takes more than a second of processor time"


def test_a_fault_of_one_conversation_is_not_the_others():
    told = render_all("{{ 'x' * n }}", [{"n": 10**10}, {"n": 2}])
    assert isinstance(told[0], TemplateFault)
    assert told[1] == "xx"


def test_a_template_of_transformers_own_kind_renders():
    text = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
    text += "{% break %}{% endfor %}"
    assert render(text, {"messages": [{"a": "<é>"}, 2]}) == '{"a": "<é>"}'
    assert len(render("{{ strftime_now('%Y') }}", {})) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
def test_rendering_ends_with_whoever_asked(tmp_path):
    # A template cannot wait, so a stand-in takes the same bounds and sleeps.
    sleeper = (
        f"import os, sys, time; sys.path.insert(0, {str(SANDBOX.parent)!r});"
        "import template_sandbox; template_sandbox.set_limits();"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, sleeper], stdout=subprocess.PIPE, text=True
    ) as asking:
        child = int(asking.stdout.readline())
        asking.kill()
    deadline = time.monotonic() + template_sandbox.WALL_SECONDS / 2
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def alive(pid):
    """Whether a process is there and no zombie that nobody has taken notice of."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
