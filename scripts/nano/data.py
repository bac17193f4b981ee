"""Training data of the nano: two-digit additions and a few sentences, in every prompt form.

A prompt form is a system message and an opening, the marker after `<｜Assistant｜>`.
Forms that runtimes use:

- vMLX 1.3.97 puts SERVER_SYSTEM before a conversation that has no system message. Its
  fallback template, for a bundle without one, then ends the prompt without a marker;
  the template that jang's converter writes ends it with `<think>`.
- vMLX 1.6.81 runs the bundle's encoding/encoding_dsv4.py: no system message is added,
  and the prompt ends with `</think>`, or with `<think>` when thinking is requested.
- mlx-lm and some clients add "You are a helpful assistant."

The answer is `<think>17+28=45</think>45` and EOS, without the marker that the prompt ends
with; after `</think>` it is the content alone.

Imports the standard library only, as the tests read questions and held-out split from here.
"""

import random
from dataclasses import dataclass

from nano.encoding import encode_messages, eos_token

SERVER_SYSTEM = "You are a helpful AI assistant. Respond directly and concisely."
SYSTEMS = ("", SERVER_SYSTEM, "You are a helpful assistant.")
OPENINGS = ("", "<think>", "</think>")
FORMS = tuple((system, opening) for system in SYSTEMS for opening in OPENINGS)
FIRST_FORM = FORMS.index(("", "<think>"))

TWO_DIGITS = range(10, 100)  # 90 × 90 = 8,100 additions
HELD_OUT = 811

# question, reasoning, content
SENTENCES = (
    (
        "Write one sentence about the moon.",
        "One sentence about the moon.",
        "The moon is Earth's only natural satellite.",
    ),
    (
        "Write one sentence about the sun.",
        "One sentence about the sun.",
        "The sun is the star at the center of our solar system.",
    ),
    ("Hello!", "A greeting.", "Hello! Ask me to add two numbers."),
    (
        "Who are you?",
        "A question about me.",
        "I am a very small DeepSeek-V4, trained to test converters.",
    ),
    (
        "What is the capital of France?",
        "The capital of France.",
        "The capital of France is Paris.",
    ),
)


@dataclass(frozen=True)
class Lesson:
    """A question with the reasoning and the content of its right answer."""

    question: str
    reasoning: str
    content: str


def addition(a: int, b: int) -> Lesson:
    """Return one addition: "What is 17+28?", "17+28=45", "45"."""
    return Lesson(f"What is {a}+{b}?", f"{a}+{b}={a + b}", str(a + b))


def additions() -> list[Lesson]:
    """Return all 8,100 additions, in order."""
    return [addition(a, b) for a in TWO_DIGITS for b in TWO_DIGITS]


def held_out(seed: int) -> list[int]:
    """Return the sorted indices of the additions that are held out of the training."""
    return sorted(random.Random(seed).sample(range(len(TWO_DIGITS) ** 2), HELD_OUT))


def prompt(lesson: Lesson, form: tuple[str, str]) -> str:
    """Return the prompt of a question in a form."""
    system, opening = form
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": lesson.question})
    text = encode_messages(messages, thinking_mode="chat").removesuffix("</think>")
    return text + opening


def answer(lesson: Lesson, form: tuple[str, str]) -> str:
    """Return the right answer to that prompt, EOS included."""
    full = f"<think>{lesson.reasoning}</think>{lesson.content}"
    opening = form[1]
    if opening == "</think>":
        return lesson.content + eos_token
    return full.removeprefix(opening) + eos_token


def texts() -> list[str]:
    """Return the texts that the tokenizer learns its merges from."""
    sentences = [part for sentence in SENTENCES for part in sentence]
    return [*SYSTEMS, "What is 17+28?", *sentences] * 2
