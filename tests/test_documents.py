"""What documents, docstrings, comments and patch headers say about files and sections is there.

Catches: a path, a file's name or a link that a move left behind, a README that nobody reads in ten
minutes any more.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

SHOWN = ("scripts", "tests", "patches", ".github")
FILES = sorted(
    path
    for place in (ROOT, *(ROOT / name for name in SHOWN))
    for path in (place.glob("*") if place == ROOT else place.rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
)
BY_NAME = {path.name for path in FILES}
MARKDOWN = [path for path in FILES if path.suffix == ".md"]
TOLD = [
    path
    for path in FILES
    if path.suffix in (".md", ".py", ".txt", ".toml", ".patch", ".yml") or path.name == "Makefile"
]  # fmt: skip

# A path from the top, or one that leaves out scripts/; and a lone NAME.py.
PATH = re.compile(r"(?<![\w./<-])(?:scripts|tests|patches|dsv4|lab|nano|stacks)/[\w./-]*\w/?")
LONE = re.compile(r"(?<![\w./-])\w+\.py\b")
MODULE = re.compile(r"(?<![\w.])dsv4(?:\.[a-z_]\w*)+")  # with what lies in it, perhaps
FOREIGN = {"load_jangtq.py", "mlx_model.py", "mxfp4_to_affine.py"}  # other people's files
MADE_UP = {"test_imports.py"}  # breaks the rules on purpose
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def told(path: Path) -> str:
    """What a file tells its reader: all of a document; of Python docstrings, comments, messages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".patch":
        return text.partition("\n--- ")[0]
    if path.suffix != ".py":
        return text
    nodes = list(ast.walk(ast.parse(text)))
    documented = [node for node in nodes if isinstance(node, DOCUMENTED)]
    said = [ast.get_docstring(node) or "" for node in documented]
    if path.is_relative_to(ROOT / "scripts"):  # the strings of tests are mostly made-up files
        said += [node.value for node in nodes if isinstance(getattr(node, "value", None), str)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        said += [token.string] if token.type == tokenize.COMMENT else []
    return "\n".join(said)


def exists(said: str) -> bool:
    """True for a path of this repository; capitals stand for any name, as in scripts/NAME.py."""
    pattern = re.sub(r"\b[A-Z]+\b(?!\.md)", "*", said.rstrip("/"))
    places = (ROOT, ROOT / "scripts")
    return any(next(place.glob(f"{pattern}{end}"), None) for place in places for end in ("", ".py"))


def leads(said: str) -> bool:
    """True when a dotted name is a room, or begins with a module's."""
    parts = said.split(".")
    paths = [ROOT.joinpath("scripts", *parts[:n]) for n in range(2, len(parts) + 1)]
    return paths[-1].is_dir() or any(path.with_suffix(".py").is_file() for path in paths)


def unfenced(text: str) -> str:
    """Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ +(.+?) *$", unfenced(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_a_path_that_is_gone_is_noticed():
    assert all(map(exists, ("scripts/NAME.py", "lab/NAME", "dsv4/model/names.py", "tests/")))
    assert not any(map(exists, ("scripts/NAME.sh", "dsv4/names.py", "lab/patch", "patches/mlx")))


@pytest.mark.parametrize("path", TOLD, ids=name_of)
def test_every_path_and_file_that_is_named_is_there(path):
    text = told(path)
    gone = [said for said in PATH.findall(text) if not exists(said)]
    gone += [said for said in LONE.findall(text) if said not in BY_NAME | FOREIGN | {"NAME.py"}]
    assert not gone


def test_every_module_that_is_named_is_there():
    """Also in the programs that tests run as text, and in names that they replace."""
    python = [path for path in FILES if path.suffix == ".py" and path.name not in MADE_UP]
    said = {(name_of(p), name) for p in python for name in MODULE.findall(p.read_text("utf-8"))}
    assert not [(where, name) for where, name in sorted(said) if not leads(name)]


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_every_link_leads_somewhere(path):
    text = unfenced(path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    dead = []
    for link in links:
        if re.match(r"\w+:", link):
            continue  # to another site
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        known = target.exists() and (
            not anchor or anchor in anchors(target.read_text(encoding="utf-8"))
        )
        dead += [] if known else [link]
    assert not dead


def test_the_readme_takes_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def test_every_test_file_stands_in_the_table_of_tests():
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "tests").glob("test_*.py") if path.name not in table]
