"""smoke: each known way of being wrong has its own message, and a right answer passes.

Catches: BOS loops that look like an answer, an empty answer, repetition, an answer cut off by
length, a wrong sum, and a judge that finds 45 inside another number.
"""

import pytest
from conftest import refusal

from dsv4.acceptance.client import Answer
from dsv4.acceptance.smoke_questions import sentence_fault, sum_fault
from dsv4.toolchain.server import free_port

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


def test_no_server_gives_one_clear_line():
    assert "make serve" in refusal("smoke", "--port", free_port())
