"""Print the dependencies of each command, for make: the modules that it imports.

For every scripts/NAME.py a line `needs_NAME := …` with all modules of scripts/dsv4 that it imports,
directly or not, their packages, and the files beside a module that it names (a table, a template, a
module that is run by `-m`). Parses the files without running them, so any Python will do. make
keeps the result in build/needs.mk and renews it when a script changes.

    python3 scripts/lab/depend.py > build/needs.mk
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]


def named_modules(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names of dsv4 that one node may mean."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


@cache
def uses(path: Path) -> frozenset[Path]:
    """Return the files of scripts/dsv4 that one file names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in named_modules(node):
            if name.startswith("dsv4") and name.replace(".", "").replace("_", "").isalnum():
                found |= files_of(name)
            elif isinstance(node, ast.Constant) and 0 < len(name) < 80 and name.isprintable():
                beside = path.parent / name
                if "/" not in name and path.parent != SCRIPTS and beside.is_file():
                    found.add(beside)
    return frozenset(found)


def files_of(module: str) -> set[Path]:
    """Return a module's file and those of the packages above it, if they exist."""
    parts = module.split(".")
    packages = [SCRIPTS.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return {p for p in (*packages, SCRIPTS.joinpath(*parts).with_suffix(".py")) if p.is_file()}


def reach(path: Path) -> set[Path]:
    """Return all files that `path` depends on, itself included."""
    found, left = {path}, [path]
    while left:
        one = left.pop()
        new = uses(one) - found if one.suffix == ".py" else set()
        found |= new
        left += new
    return found


def main() -> int:
    every = set()
    for command in sorted(SCRIPTS.glob("*.py")):
        needed = sorted(p.relative_to(SCRIPTS.parent).as_posix() for p in reach(command))
        print(f"needs_{command.stem} := {' '.join(needed)}")
        every.update(needed)
    print(
        *(f"{name}:" for name in sorted(every)), sep="\n"
    )  # a rule for each, so that a deleted file is no error
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
