"""The stack that `make demo` and TOOLCHAIN_PYTHON take by default, in its own venv.

`make test` installs it into .toolchain/new. Catches: a bundle that the newest vMLX refuses or reads
otherwise than transformers does, with compress ratios 4 and 128 and beyond the sliding window too.
"""

import matrix
import pytest
from conftest import NANO, ROOT

from dsv4.proof.stacks import STACKS
from dsv4.runtime.server import ask, running
from dsv4.served.nano import held_out
from dsv4.served.questions import MOON, sentence_fault

PYTHON = ROOT / ".toolchain" / "new" / "bin" / "python"
STACK = next(stack for stack in STACKS if stack.name == "new")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return matrix.bundles(tmp_path_factory.mktemp("matrix"), ["mlx", matrix.RANDOM])


@pytest.mark.parametrize("name", ["mlx", matrix.RANDOM])
def test_it_computes_what_transformers_computes(bundles, name, tmp_path, monkeypatch):
    some = matrix.questions(name)[:5]
    monkeypatch.setattr(matrix, "questions", lambda name: some)
    found = matrix.logits_of(STACK, PYTHON, bundles[name], tmp_path)
    assert set(found) == {"prefill", "decode"}
    assert max(map(matrix.typical, found.values())) <= matrix.NEAR, found


def test_it_answers(bundles, tmp_path):
    additions = held_out(NANO, 10)
    with running(PYTHON, bundles["mlx"], tmp_path / "server.log") as url:
        assert sentence_fault(ask(url, MOON, 60)) is None
        for a, b in additions:
            answer = ask(url, f"What is {a}+{b}?", 20)
            assert (answer.content.strip(), answer.finish_reason) == (str(a + b), "stop")
