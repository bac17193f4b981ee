"""Hostile and damaged inputs by the thousand: headers, documents, records, links.

For each: exit status 0, 1 or 2 and never a traceback, one clear line where it stops, bounded time
and memory, nothing outside the folder changed, nothing printed raw. `make test` runs a fifth of
them; FUZZ=N makes N times as many, SEED others. Catches: whatever nobody thought of by name.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import NANO, SEED, must
from here import here

from dsv4.errors import UserError
from dsv4.storage.backup import FOLDER
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import read_shard
from dsv4.verification.checks import documents

FUZZ = int(os.environ.get("FUZZ", "1"))
SECONDS = 10  # for one input, on a busy machine
MEMORY = 400 << 20  # beyond what was used before
# Rewrites a terminal, forges lines, turns text around.
EVIL = "\x1b]0;OWNED\x07\x1b[2K\rpassed: all good\nerror: forged\u202e\x9b\0"
NAMES = [
    "../outside/kept", "/etc/passwd", "a/../../outside/kept", "..", ".", "", "a\0b", "a\\b",
    "C:\\x", "~/x", "config.json", "encoding/x", ".before-repair/x", EVIL, "n" * 5000,
]  # fmt: skip


@pytest.fixture(params=[0.2, pytest.param(1, marks=pytest.mark.full)])
def times(request):
    """How many times the counts below a test runs."""
    return FUZZ * request.param


@pytest.fixture
def rng(times):
    return random.Random(f"{SEED} {times}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The nano's right bundle."""
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    for name in ("convert", "finalize", "patch"):
        must(name, "--source", NANO, "--bundle", folder)
    return folder


class Place:
    """A folder with a bundle, and beside it files that nobody may touch."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.bundle = shutil.copytree(bundle, folder / "bundle")
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "kept").write_text("kept")
        (self.outside / "folder").mkdir()
        (self.outside / "folder" / "config.json").write_text("{}")
        self._before = self._state()
        self._memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _state(self) -> dict:
        return {
            p: (p.lstat().st_mode, p.read_bytes() if p.is_file() else b"")
            for p in sorted(self.outside.rglob("*"))
        }

    def run(self, name: str, *arguments: object) -> int:
        """Run a command in this process and hold it to the rules; returns its status."""
        start = time.monotonic()
        status, out, err = here(name, *arguments)
        said = out + err
        assert time.monotonic() - start < SECONDS
        assert status in (0, 1, 2), status
        assert "Traceback" not in said
        assert all(c.isprintable() or c == "\n" for c in said), ascii(said)[:500]
        assert "\npassed: all good" not in said
        assert not any(line.startswith("error: forged") for line in said.splitlines())
        assert self._state() == self._before
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._memory
        assert grown * (1 if sys.platform == "darwin" else 1024) < MEMORY
        return status


# --------------------------------------------------------------------------------- any JSON value


def anything(rng: random.Random, depth: int = 0):
    """A JSON value that has no business where it comes to stand."""
    kinds = [
        lambda: None, lambda: rng.random() < 0.5, lambda: rng.choice([0, 1, -1, 7, 10**9, 10**400]),
        lambda: rng.choice([1.5, -0.0, 1e308, float("inf"), float("nan")]),
        lambda: rng.choice([*NAMES, "x", "affine", "é", "\ud800"]),
        lambda: [anything(rng, depth + 1) for _ in range(rng.randrange(3))],
        lambda: {rng.choice(NAMES): anything(rng, depth + 1) for _ in range(rng.randrange(3))},
    ]  # fmt: skip
    return rng.choice(kinds[: 5 if depth > 2 else None])()


def places_in(value, path=()):
    """The paths of all values in a JSON document, some 60 at most of each list or object."""
    yield path
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list) else items
    for key, one in items[:60]:
        yield from places_in(one, (*path, key))


def mutated(rng: random.Random, document):
    """The document with a value replaced, a key renamed or dropped, in one to three places."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(list(places_in(document)))
        if not path:
            if rng.random() < 0.1:
                return anything(rng)
            continue
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        what = rng.random()
        if what < 0.6 or isinstance(holder, list):
            holder[path[-1]] = anything(rng)
        elif what < 0.8:
            del holder[path[-1]]
        else:
            holder[rng.choice(NAMES)] = holder.pop(path[-1])
    return document


def text_of(rng: random.Random, document) -> bytes:
    """JSON text of a document, now and then damaged."""
    data = json.dumps(document).encode("utf-8", "surrogatepass")
    what = rng.random()
    if what < 0.1:
        return data[: rng.randrange(len(data) + 1)]
    if what < 0.2:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.randbytes(3) + data[at:]
    if what < 0.23:
        return b"[" * 100_000
    return data


# ---------------------------------------------------------------------------------------- headers


def test_headers(rng, times, bundle, tmp_path):
    """A shard's header, mutated as JSON and as bytes."""
    whole = next(bundle.glob("*.safetensors")).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header = {name: header[name] for name in list(header)[:12]}
    path = tmp_path / "x.safetensors"
    stopped = 0
    for _ in range(round(2000 * times)):
        text = text_of(rng, mutated(rng, header))
        size = len(text) if rng.random() < 0.9 else rng.choice([0, 1, 2**63, 2**64 - 1, 10**8])
        path.write_bytes(size.to_bytes(8, "little") + text + whole[8 + length :][: 1 << 14])
        start = time.monotonic()
        try:
            read_shard(path)
        except UserError as stop:
            stopped += len(str(stop)) < 5000
        assert time.monotonic() - start < SECONDS
    assert stopped > 1000 * times


@pytest.mark.parametrize("what", ["names", "twice", "factors", "digits", "nested", "layers"])
def test_headers_that_are_large(what, tmp_path):
    """A hundred thousand of something, in a header of a few megabytes."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    many = 100_000
    header = {
        "names": lambda: {f"n{i}": entry for i in range(many)},
        "twice": lambda: {f"n{i}": entry for i in range(many)},
        "factors": lambda: {"x": {**entry, "shape": [1] * 20_000}},
        "digits": lambda: {"x": {**entry, "shape": [10**4000] * 3}},
        "nested": lambda: {"x": {**entry, "shape": [[]] * many}},
        "layers": lambda: {f"layers.{'9' * 5000}.ffn.experts.0.w1.weight": entry},
    }[what]()
    text = json.dumps(header)
    if what == "twice":
        text = text[:-1] + f', "n{many - 1}": {json.dumps(entry)}}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    start = time.monotonic()
    with contextlib.suppress(UserError):
        read_shard(path)
    assert time.monotonic() - start < SECONDS


# -------------------------------------------------------------------------------------- documents


@pytest.fixture
def cached(monkeypatch):
    """Templates are rendered in a process of their own: once for each text."""
    from functools import cache

    for name in ("template_fault", "template_faults"):
        if hasattr(documents, name):
            monkeypatch.setattr(documents, name, cache(getattr(documents, name)))


def test_documents(rng, times, bundle, tmp_path, cached):
    """verify's level 1, patch and repair on mutated JSON files."""
    place = Place(tmp_path, bundle)
    names = ["config.json", INDEX, "tokenizer.json", "generation_config.json", "jang_config.json",
             "tokenizer_config.json"]  # fmt: skip
    right = {name: json.loads((bundle / name).read_bytes()) for name in names}
    statuses = []
    for _ in range(round(500 * times)):
        name = rng.choice(names)
        document = right[name]
        if name == "tokenizer_config.json":  # its template has a test of its own
            document = {k: v for k, v in document.items() if k != "chat_template"}
        (place.bundle / name).write_bytes(text_of(rng, mutated(rng, document)))
        verify = ("verify", "--bundle", place.bundle, "--level", "1", "--without-loader")
        commands = [
            verify, verify, (*verify, "--source", NANO), ("patch", "--bundle", place.bundle),
            ("repair", "--bundle", place.bundle, "--dry-run", "--without-loader"),
        ]  # fmt: skip
        statuses.append(place.run(*rng.choice(commands)))
        for other in names:
            shutil.copy2(bundle / other, place.bundle / other)
    assert 0 < sum(map(bool, statuses)) < len(statuses)


# ---------------------------------------------------------------------------------------- records


def test_records(rng, times, bundle, tmp_path):
    """unrepair and download by records that somebody else wrote."""
    place = Place(tmp_path, bundle)
    source = shutil.copytree(NANO, tmp_path / "source")
    files = {"size": 7, "sha256": "0" * 64, "verified_mtime_ns": 1, "low_disk": "fetched"}
    record = {"repo": "user/name", "revision": "main", "commit": "0" * 40,
              "files": {"config.json": files, "x": files}}  # fmt: skip
    repaired = {"created": ["new.json"], "unfinished": {"experts": ["a"], "mark": {"k": "v"}}}
    for _ in range(round(400 * times)):
        names = rng.sample(NAMES, 3)
        if rng.random() < 0.5:
            kept = place.bundle / FOLDER / "files"
            kept.mkdir(parents=True)
            one = {**repaired, "created": names} if rng.random() < 0.5 else mutated(rng, repaired)
            (kept.parent / "repair.json").write_bytes(text_of(rng, one))
            place.run("repair", "--bundle", place.bundle, "--undo")
            shutil.rmtree(place.bundle / FOLDER, ignore_errors=True)
            if not (place.bundle / "config.json").is_file():  # a record may name it as new
                shutil.copy2(bundle / "config.json", place.bundle)
        else:
            one = {**record, "files": dict.fromkeys(names, files)}
            one = one if rng.random() < 0.5 else mutated(rng, record)
            (source / ".download.json").write_bytes(text_of(rng, one))
            command = [("download", "--source", source, "--repo", "user/name", "--patience", "0"),
                       ("check", "--source", source, "--bundle", tmp_path / "b", "--repo", "x/y"),
                       ("patch", "--bundle", place.bundle, "--source", source)]  # fmt: skip
            with offline():
                place.run(*command[rng.choice([0, 0, 2])])


@contextlib.contextmanager
def offline():
    """No hub: nothing listens on port 9."""
    from huggingface_hub import constants

    kept = constants.ENDPOINT
    constants.ENDPOINT = "http://127.0.0.1:9"
    try:
        yield
    finally:
        constants.ENDPOINT = kept


# ------------------------------------------------------------------------------------------ links


def test_links(rng, times, bundle, tmp_path):
    """A link, a folder or a FIFO under a name that a command would write, read or remove."""
    spots = ["encoding", "config.json", "tokenizer.json", ".config.json.partial", ".lock",
             ".tokenizer.json.partial", FOLDER, f"{FOLDER}/files", f"{FOLDER}/repair.json", INDEX,
             "generation_config.json", ".generation_config.json.partial", "chat_template.jinja",
             "encoding/encoding_dsv4.py", "jang_config.json", "stray.safetensors"]  # fmt: skip
    for number in range(round(250 * times)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        place = Place(folder, bundle)
        (place.bundle / FOLDER / "files").mkdir(parents=True)
        (place.bundle / FOLDER / "repair.json").write_text("{}")
        for spot in rng.sample(spots, rng.choice([1, 1, 2])):
            path = place.bundle / spot
            if not path.parent.is_dir() or path.parent.is_symlink():
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(True)
            plant(rng, path, place.outside)
        commands = [
            ("patch", "--bundle", place.bundle), ("repair", "--bundle", place.bundle, "--undo"),
            ("finalize", "--source", NANO, "--bundle", place.bundle),
            ("requantize", "--source", NANO, "--bundle", place.bundle, "--quantizer", "mxfp4"),
            ("verify", "--bundle", place.bundle, "--level", "1", "--without-loader"),
        ]  # fmt: skip
        place.run(*rng.choice(commands))
        shutil.rmtree(folder)


def plant(rng: random.Random, path: Path, outside: Path) -> None:
    """Something that is no plain file, or that leads away."""
    what = rng.randrange(5)
    if what < 3:
        path.symlink_to([outside / "kept", outside / "folder", path.name][what])
    elif what == 3:
        path.mkdir()
    else:
        os.mkfifo(path)


def test_the_numbers_of_a_fuzzed_bundle(rng, times, bundle, tmp_path):
    """Level 2 on a bundle whose data were changed: findings, no traceback."""
    place = Place(tmp_path, bundle)
    shard = next(place.bundle.glob("*.safetensors"))
    right = np.frombuffer(shard.read_bytes(), np.uint8)
    length = 8 + int.from_bytes(right[:8].tobytes(), "little")
    for _ in range(round(12 * times)):
        data = right.copy()
        for _ in range(rng.choice([1, 20])):
            at = rng.randrange(length, len(data) - 64)
            data[at : at + rng.randrange(1, 64)] = rng.randrange(256)
        shard.write_bytes(data.tobytes())
        options = ("--level", "2", "--without-loader", "--source", NANO)
        place.run("verify", "--bundle", place.bundle, *options)
