"""Commands run in this process: a start of Python costs more than what most of them do."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path

from dsv4.errors import run


def here(name: str, *arguments: object) -> tuple[int, str, str]:
    """scripts/NAME.py with these arguments: exit status, stdout, stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    kept = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(importlib.import_module(name).main)
    except SystemExit as end:  # argparse's, of a wrong command line
        status = end.code
    finally:
        sys.argv = kept
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def must(name: str, *arguments: object) -> str:
    """Run a command that has to succeed; what it prints."""
    status, out, err = here(name, *arguments)
    assert status == 0, (out, err)
    return out


def refusal(name: str, *arguments: object) -> str:
    """Run a command that has to stop: exit 1 and one line in the project's form."""
    status, out, err = here(name, *arguments)
    assert status == 1, (status, out, err)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: "), err
    assert ": found " in last, last
    return last


def build_bundle(source: Path, bundle: Path, *options: object) -> Path:
    """Convert with these options, finalize and patch; return the bundle."""
    must("convert", "--source", source, "--bundle", bundle, *options)
    return finish_bundle(source, bundle)


def finish_bundle(source: Path, bundle: Path) -> Path:
    """Finalize and patch; return the bundle."""
    for stage in ("finalize", "patch"):
        must(stage, "--source", source, "--bundle", bundle)
    return bundle
