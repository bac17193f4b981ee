"""Limits on untrusted files, checked before they are read.

They follow from the largest model of the family, DeepSeek-V4-Pro: 61 layers of 384 experts make
70,272 expert matrices, 210,816 tensors of a bundle. Its index has some 20 MB, its config.json with
a label for each matrix 10 MB; the tokenizer has 6.4 MB. Each limit is at least three times what
that needs.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from dsv4.errors import UserError, with_path

MIB = 1 << 20
DOCUMENT = 64 * MIB  # bytes of a JSON or text file
HEADER = 32 * MIB  # bytes of a shard's header: 270,000 tensors; safetensors itself takes 100 MB
MARKS = 3_000_000  # commas and brackets of a document or a header; a tensor's entry has eight
DEPTH = 64  # lists and objects inside one another
AXES = 8  # of a tensor
COLUMNS = MIB  # of a matrix: a row of it is decoded at one go
FILES = 20_000  # in a folder
LAYERS = 1_000  # main or MTP
MATRICES = DOCUMENT // 64  # of routed experts: an index names each, in 64 bytes at least
IMATRIX = 16 << 30  # bytes
POINTER = b"version https://git-lfs.github.com/spec/"  # first bytes of a Git LFS pointer


def read_bounded(path: Path, most: int = DOCUMENT) -> bytes:
    """Read a file of at most `most` bytes.

    Raises UserError for a larger one, of which nothing is read, and for anything but a plain file.
    """
    with with_path(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for its writer
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}", "no plain file", "one", "do not use this folder")
            data = b"" if status.st_size > most else file.read(min(status.st_size, most) + 1)
    if max(status.st_size, len(data)) > most:
        size = max(status.st_size, len(data))
        raise UserError(f"{path}", f"{size:,} bytes", f"at most {most:,}", "do not use this file")
    return data


def check_json_size(data: bytes, where: str) -> None:
    """Raise UserError for JSON with more than MARKS parts. A part takes 100 bytes once parsed."""
    marks = sum(data.count(mark) for mark in b",[{")
    if marks > MARKS:
        todo = "do not use this file"
        raise UserError(where, f"{marks:,} commas and brackets", f"at most {MARKS:,}", todo)


def check_lfs_pointer(data: bytes, where: str) -> None:
    """Raise UserError when `data`, a file's first bytes, is a Git LFS pointer."""
    if data.startswith(POINTER):
        raise UserError(where, "a Git LFS pointer in place of the file", "the file itself",
                   "fetch it: git lfs pull in its clone, or make download")  # fmt: skip


def check_surrogates(data: bytes, value: Any) -> None:
    """Raise UnicodeEncodeError when a string of `value` has half of a surrogate pair.

    Such a string could not be written again. data: the JSON text of `value`.
    """
    if b"\\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode()


def is_shallow(value: Any, depth: int = DEPTH) -> bool:
    """Return True when lists and objects are nested at most `depth` deep."""
    if not isinstance(value, (dict, list)):
        return True
    parts = value.values() if isinstance(value, dict) else value
    inner = (part for part in parts if isinstance(part, (dict, list)))
    return depth > 0 and all(is_shallow(part, depth - 1) for part in inner)


def list_files(folder: Path) -> dict[str, int]:
    """Return relative path → size in bytes of every file below a folder.

    Links to folders are not entered. Raises UserError when there are more than FILES.
    """
    found: dict[str, int] = {}
    number = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        number += len(folders) + len(names)
        if number > FILES:
            raise UserError(f"{folder}", f"more than {FILES:,} files", "a bundle", "check BUNDLE")
        for path in (Path(place) / name for name in sorted(names)):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found
