"""Turn lessons into token tensors."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nano.data import FORMS, Lesson, answer, prompt

PAD = 2


@dataclass(frozen=True)
class Sheet:
    """Lessons of one form as tokens.

    ids: int64 (lessons, length), padded at the end; wanted: bool, the same shape, true
    where the next token belongs to the answer.
    """

    ids: Tensor
    wanted: Tensor


def sheet(
    tokenizer: Tokenizer, lessons: list[Lesson], form: tuple[str, str], pad: int = PAD
) -> Sheet:
    """Return the lessons in one form, as tokens."""
    prompts = tokenizer.encode_batch([prompt(lesson, form) for lesson in lessons])
    answers = tokenizer.encode_batch([answer(lesson, form) for lesson in lessons])
    length = max(len(p.ids) + len(a.ids) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(lessons), length), pad)
    wanted = torch.zeros((len(lessons), length), dtype=torch.bool)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        start, end = len(p.ids), len(p.ids) + len(a.ids)
        ids[row, :end] = torch.tensor(p.ids + a.ids)
        wanted[row, start - 1 : end - 1] = True
    return Sheet(ids, wanted)


def sheets(tokenizer: Tokenizer, lessons: list[Lesson]) -> list[Sheet]:
    """Return one sheet a form, in the order of FORMS."""
    return [sheet(tokenizer, lessons, form) for form in FORMS]


def concatenate(parts: list[Sheet], pad: int = PAD) -> Sheet:
    """Return the rows of several sheets as one, padded to the longest."""
    length = max(part.ids.shape[1] for part in parts)

    def widen(rows: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)

    return Sheet(
        torch.cat([widen(part.ids, pad) for part in parts]),
        torch.cat([widen(part.wanted, False) for part in parts]),
    )
