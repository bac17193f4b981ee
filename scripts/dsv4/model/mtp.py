"""The three ways to store what lies under `mtp.`: MTP's layers, or DSpark's stages.

| choice     | MTP's tensors in the bundle                                                        |
|------------|------------------------------------------------------------------------------------|
| source     | the source's numbers: FP4 as mxfp4, FP8 as mxfp8, all others in the source's dtype |
| as-experts | as those of the main layers, experts by the quantizer                              |
| dropped    | none                                                                               |

No server computes with them; a drafter can be made of them. The choice is a part of the quantizer's
digest, which every shard and config.json record: "…-mtp-source". A digest without it, such as older
versions wrote, means as-experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Tensor, TensorSpec

PREFIX = "mtp."
SOURCE, AS_EXPERTS, DROPPED = "source", "as-experts", "dropped"


def is_mtp(name: str) -> bool:
    """Return True for a tensor or a module of MTP or DSpark."""
    return name.startswith(PREFIX)


def digest_suffix(choice: str) -> str:
    """Return the end of a quantizer's digest for a choice; "" for as-experts."""
    return "" if choice == AS_EXPERTS else f"-mtp-{choice}"


def choice_of(digest: str | None) -> str:
    """Return the choice that a recorded digest names.

    >>> choice_of("1-mtp-dropped"), choice_of("1")
    ('dropped', 'as-experts')
    """
    found = re.search(f"-mtp-({SOURCE}|{DROPPED})$", digest or "")
    return found[1] if found else AS_EXPERTS


def without_dropped(source: Checkpoint, choice: str) -> Checkpoint:
    """Return the source as the conversion sees it: without MTP if that is dropped."""
    return replace(source, left_out=PREFIX) if choice == DROPPED else source


def unloaded_bytes(tensors: Iterable[Tensor | TensorSpec]) -> int:
    """Return the bytes of MTP's tensors, which no server loads."""
    return sum(tensor.nbytes for tensor in tensors if is_mtp(tensor.name))
