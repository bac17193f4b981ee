"""A hub that lies, breaks or does not stop: one escaped line, bounded time and memory.

Most tests ask in this process, with huggingface_hub pointed at the hub of this machine. Catches:
JSON of other types believed, names and hashes that lead out or reach the terminal, answers without
end, a server's wish to wait unheard or obeyed for ever, its words lost, a link that ran out taken
for a missing login, a pinned commit that vanished, our own records taken from a hub.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import socket
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from conftest import script
from hub_server import TOKEN, Fault, Hub
from test_download import environment

from dsv4.hub import client, patience, refusals, remote, wire
from dsv4.hub import environment as settings
from dsv4.hub.client import listing
from dsv4.hub.transfer import Transfer
from dsv4.hub.upload import made, upload
from dsv4.runtime import server
from dsv4.stop import Stop
from dsv4.storage import volume
from dsv4.storage.checkpoint import read_json
from dsv4.storage.shard import read_shard

REPO = "user/model"
SHARD = "model-00001-of-00001.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


def checkpoint() -> dict[str, bytes]:
    """One shard of one tensor, as small as a checkpoint can be."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    shard = len(header).to_bytes(8, "little") + header + bytes(range(64))
    index = json.dumps({"weight_map": {"a": SHARD}}).encode()
    return {SHARD: shard, "model.safetensors.index.json": index, "config.json": b"{}",
            "tokenizer.json": b'{"a": 1}'}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """The hub, with one repository; huggingface_hub in this process asks it, without a login."""
    from huggingface_hub import close_session, constants

    with Hub() as hub:
        hub.add(REPO, checkpoint())
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def login(hub, monkeypatch):
    """With a login, and uploads that go the LFS way."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def line(stopped: pytest.ExceptionInfo) -> str:
    """The one line that a user would see, which holds nothing that a terminal obeys."""
    text = str(stopped.value)
    assert text.isprintable()
    assert len(text) < 700
    assert TOKEN not in text
    return text


def fetch(folder: Path, name: str = SHARD, patience: float = 0) -> None:
    """One file, as download and inspect fetch it."""
    found = listing(REPO, "main")
    file = next(file for file in found.files if file.name == name)
    Transfer(REPO, found.commit, folder, patience, lambda count: None).fetch(file)


# ------------------------------------------------------------------------- JSON of another form

HASH, SHA, TWO = "0" * 64, "0" * 40, "hostile \x1b]0;OWNED\x07\x1b[2K\rpassed: all good"


def entry(**changes: object) -> dict:
    return {"rfilename": "a.json", "size": 1, "blobId": SHA} | changes


def of(*siblings: object, **changes: object) -> dict:
    return {"id": REPO, "sha": SHA, "siblings": list(siblings) or [entry()]} | changes


def large(**changes: object) -> dict:
    return of(entry(lfs={"sha256": HASH, "size": 1, "pointerSize": 134} | changes))


FORMS = {
    "a list": [],
    "a string": "x",
    "null": None,
    "a number": 5,
    "an empty object": {},
    "sha a number": of(sha=5),
    "sha a list": of(sha=[SHA]),
    "sha null": of(sha=None),
    "sha short": of(sha="0" * 12),
    "sha with escapes": of(sha=TWO),
    "sha that leads out": of(sha="../" * 13 + "x"),
    "sha of other digits": of(sha="٣" * 40),
    "siblings null": of(siblings=None),
    "siblings a string": of(siblings="abc"),
    "siblings an object": of(siblings={"a": 1}),
    "siblings a number": of(siblings=7),
    "a file that is a string": of("a.json"),
    "a file that is null": of(None),
    "a file that is a list": of([1]),
    "no name": of({"size": 1, "blobId": SHA}),
    "a name that is a number": of(entry(rfilename=5)),
    "a name that is a list": of(entry(rfilename=["a.json"])),
    "no size": of({"rfilename": "a.json", "blobId": SHA}),
    "size a string": of(entry(size="1")),
    "size negative": of(entry(size=-1)),
    "size a float": of(entry(size=1.5)),
    "size true": of(entry(size=True)),
    "size null": of(entry(size=None)),
    "size beyond all disks": of(entry(size=10**18)),
    "size a list": of(entry(size=[1])),
    "lfs a string": of(entry(lfs="x")),
    "lfs a list": of(entry(lfs=[HASH])),
    "lfs a number": of(entry(lfs=1)),
    "lfs empty": of(entry(lfs={})),
    "lfs hash a number": large(sha256=5),
    "lfs hash null": large(sha256=None),
    "lfs hash that leads out": large(sha256="../" * 21 + "x"),
    "lfs hash with escapes": large(sha256=TWO),
    "lfs hash of 1 MB": large(sha256="a" * 1_000_000),
    "lfs hash with a newline": large(sha256=HASH[1:] + "\n"),
    "blobId a number": of(entry(blobId=5)),
    "blobId null": of(entry(blobId=None)),
    "blobId short": of(entry(blobId="abc")),
    "blobId that leads out": of(entry(blobId="../" * 13 + "x")),
    "a name twice": of(entry(), entry()),
    "a file and a folder": of(entry(), entry(rfilename="a.json/b.json")),
    "a name with escapes": of(entry(rfilename=TWO + ".json")),
    "a name with a newline": of(entry(rfilename="a\nerror: b.json")),
    "a name turned around": of(entry(rfilename="a\u202egnp.json")),
    "a name that is no text": of(entry(rfilename="a\ud800.json")),
    "a name that climbs": of(entry(rfilename="a/../../b.json")),
    "a name from the root": of(entry(rfilename="/etc/b.json")),
    "a name with a void": of(entry(rfilename="a//b.json")),
    "a name of 1 MB": of(entry(rfilename="a" * 1_000_000 + ".json")),
    "a name of 1,000 folders": of(entry(rfilename="a/" * 1000 + "b.json")),
    "a name with NUL": of(entry(rfilename="a\0.json")),
    "a name of another system": of(entry(rfilename="C:\\a.json")),
    "a name that another system cuts": of(entry(rfilename="a. /b.json")),
}  # fmt: skip
TEXTS = {
    "size 1e400": json.dumps(of(entry(size=111))).replace("111", "1e400"),
    "size NaN": json.dumps(of(entry(size=111))).replace("111", "NaN"),
    "size of 5,000 digits": json.dumps(of(entry(size=111))).replace("111", "1" * 5000),
    "nested 100,000 deep": "[" * 100_000,
    "nested in an object": '{"sha":' * 50_000,
    "empty": " ",
    "cut": '{"sha": "',
    "no UTF-8": "\udcff",
    "a page": "<html>Pay here",
}


@pytest.mark.parametrize("form", [*FORMS, *TEXTS])
def test_a_listing_of_another_form_is_refused(hub, form):
    text = TEXTS[form] if form in TEXTS else json.dumps(FORMS[form])
    body = text.encode("utf-8", "surrogateescape")
    hub.faults.append(Fault("api/models", 200, body=body))
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main")
    assert line(stopped).startswith(f"hub: {REPO}: found ")


def test_what_the_build_does_not_read_may_have_any_form(hub):
    """A strange file beside the wanted ones, as a picture of another kind, stops nothing."""
    info = of(entry(), entry(rfilename="a\x1b.png", size="?"), extra=[1], lastModified=5)
    hub.faults.append(Fault("api/models", 200, body=json.dumps(info).encode()))
    assert [file.name for file in listing(REPO, "main").files] == ["a.json"]


# ---------------------------------------------------------------------------------- refusals

BODIES = (b"[]", b'[{"error": 1}]', b'"x"', b"5", b"null", b'{"error": {"a": 1}}', b'{"errors": 5}',
          b'{"errors": [5, null]}', b'{"error": [1, [2]]}', b"[" * 60_000, b"\xff\xfe", b"",
          json.dumps({"error": TWO}).encode(), b"<html>")  # fmt: skip


@pytest.mark.parametrize("code", [400, 402, 403, 404, 409, 413, 416, 418, 422, 500])
def test_a_refusal_with_any_body_is_one_line(hub, tmp_path, code):
    for body in BODIES:
        for path in ("api/models", "resolve", "^[0-9a-f]{64}/"):
            hub.faults[:] = [Fault(path, code, body=body)]
            with pytest.raises(Stop) as stopped:
                fetch(tmp_path)
            assert f"HTTP {code}" in line(stopped)


@pytest.mark.parametrize("code", [201, 204, 206, 300, 302, 304, 305, 399, 600])
def test_a_status_that_is_no_answer_is_one_line(hub, tmp_path, code):
    for path in ("api/models", "resolve", "^[0-9a-f]{64}/"):
        hub.faults[:] = [Fault(path, code, body=b"" if code in (204, 304) else b"{}")]
        with pytest.raises(Stop) as stopped:
            fetch(tmp_path)
        assert f"{code}" in line(stopped)
    assert not (tmp_path / SHARD).exists()


def test_a_servers_words_are_shown_escaped_and_short(hub):
    hub.faults.append(Fault("api/models", 403, body=json.dumps({"error": TWO * 100}).encode()))
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main")
    assert r"hostile \x1b]0;OWNED\x07" in line(stopped)
    assert "…" in line(stopped)


def test_a_token_in_a_servers_words_is_not_shown(hub, login):
    said = json.dumps({"error": f"Bearer {TOKEN} is not enough"}).encode()
    hub.faults.append(Fault("api/models", 403, body=said))
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main")
    assert "[token]" in line(stopped)


def test_a_link_that_ran_out_is_fetched_anew(hub, tmp_path):
    """The store's 403 is no word on the login: the hub itself gave the link."""
    hub.faults.append(Fault("^[0-9a-f]{64}/", 403, times=1, body=b"<Error>AccessDenied</Error>"))
    fetch(tmp_path, patience=5)
    assert (tmp_path / SHARD).read_bytes() == checkpoint()[SHARD]


def test_a_store_that_stays_shut_is_told_without_advice_to_log_in(hub, tmp_path):
    hub.faults.append(Fault("^[0-9a-f]{64}/", 403, body=b"<Error>AccessDenied</Error>"))
    with pytest.raises(Stop) as stopped:
        fetch(tmp_path)
    store = hub.store_url.removeprefix("http://")
    assert f"HTTP 403 from {store}, where the hub keeps files" in line(stopped)
    assert "AccessDenied" in line(stopped)
    assert "login" not in line(stopped)


def test_the_hubs_own_403_is_final(hub):
    hub.faults.append(Fault("api/models", 403))
    with pytest.raises(Stop):
        listing(REPO, "main", patience=30)
    assert len(hub.requests) == 1


# ------------------------------------------------------------------------------ asked to wait


class Limited(Exception):
    """A 429 with these headers."""

    def __init__(self, **headers: str) -> None:
        import httpx2

        given = {name.replace("_", "-"): value.encode("latin-1") for name, value in headers.items()}
        self.response = httpx2.Response(429, headers=given)


NOON = "Wed, 25 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "100"}, 100),
        ({"Retry_After": " 7 "}, 7),
        ({"Retry_After": "Wed, 25 Nov 2026 12:05:00 GMT", "Date": NOON}, 300),
        ({"Retry_After": "Wed, 25 Nov 2026 11:00:00 GMT", "Date": NOON}, 0),
        ({"Retry_After": "Wed, 25 Nov 2020 12:00:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, 0),
        ({"RateLimit": '"api"; r=0; t=55', "Retry_After": "60"}, 60),
        ({"RateLimit_Reset": "30"}, 30),
        ({"Retry_After": "²"}, 0),
        ({"Retry_After": "-5"}, 0),
        ({"Retry_After": "1e9"}, 0),
        ({"Retry_After": "9" * 30}, 0),
        ({"Retry_After": "Wed, 99 Foo 99999 77:00:00 GMT"}, 0),
        ({"Retry_After": "soon"}, 0),
        ({"RateLimit": '"api";r=0;t=²'}, 0),
        ({}, 0),
    ],
)  # fmt: skip
def test_what_a_server_asks_is_understood(headers, seconds):
    assert refusals.asked_wait(Limited(**headers)) == pytest.approx(seconds, abs=2)


def waits_for(errors: list[Exception], given: float) -> list[float]:
    """The waits until success, or until patience gives up."""
    waits: list[float] = []

    def attempt() -> None:
        if errors:
            raise errors.pop(0)

    try:
        patience.patiently(attempt, given, pause=waits.append)
    except Limited:
        waits.append(-1)
    return waits


def test_an_asked_wait_is_kept_even_beyond_patience(capsys):
    assert waits_for([Limited(Retry_After="900")], 30) == [900]
    assert "trying again in 900 s, as it asks" in capsys.readouterr().out
    assert waits_for([Limited(Retry_After="900")] * 9, 30) == [900] * 4 + [-1]
    assert waits_for([Limited(Retry_After="86400")], 30) == [-1]
    assert waits_for([Limited(Retry_After="1")] * 99, 30) == [1, 2, 4, 8, -1]
    assert waits_for([Limited(Retry_After="9")], 0) == [-1]


def test_an_asked_wait_too_long_is_told(hub):
    hub.faults.append(Fault("api/models", 429, headers={"Retry-After": "7200"}))
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main", patience=30)
    assert "wait 7,200 s, as the hub asks" in line(stopped)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("value", ["²", "x" * 9000, "-1", ""])
def test_a_wait_that_is_none_is_ours(hub, value):
    headers = {"Retry-After": value, "RateLimit": value}
    hub.faults.append(Fault("api/models", 429, times=1, headers=headers))
    assert listing(REPO, "main", patience=5).commit == hub.repos[REPO].refs["main"]


def test_no_request_comes_before_the_asked_time(hub):
    hub.faults.append(Fault("api/models", 503, times=1, headers={"Retry-After": "2"}))
    start = time.monotonic()
    listing(REPO, "main", patience=1)
    assert time.monotonic() - start >= 2
    assert len(hub.requests) == 2


# ------------------------------------------------------------------------------ without an end


def peak_of(call) -> int:
    """The most bytes that Python held while `call` ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("status", [200, 302, 404])
def test_an_answer_without_end_is_left(hub, status):
    headers = {"Location": "/elsewhere"} if status == 302 else {}
    body = b'{"a":1,' * 9000
    hub.faults.append(Fault("api/models", status, endless=True, body=body, headers=headers))

    def ask() -> None:
        with pytest.raises(Stop) as stopped:
            listing(REPO, "main")
        assert ("HTTP 404" if status == 404 else "more than 8,388,608 bytes") in line(stopped)

    assert peak_of(ask) < 80 << 20
    assert hub.requests[0].sent < 40 << 20


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip"])
def test_a_gzip_bomb_is_left(hub, status, coding):
    body = gzip.compress(bytes(200 << 20), 1)
    for _ in coding.split()[1:]:
        body = gzip.compress(body, 1)
    hub.faults.append(Fault("api/models", status, body=body, headers={"Content-Encoding": coding}))

    def ask() -> None:
        with pytest.raises(Stop) as stopped:
            listing(REPO, "main")
        line(stopped)

    assert peak_of(ask) < 80 << 20


def test_a_gzipped_listing_is_read(hub):
    body = gzip.compress(json.dumps(of(entry())).encode())
    hub.faults.append(Fault("api/models", 200, body=body, headers={"Content-Encoding": "gzip"}))
    assert len(listing(REPO, "main").files) == 1


def test_a_file_that_goes_on_past_its_size_is_cut_there(hub, tmp_path):
    data = checkpoint()[SHARD]
    hub.faults.append(Fault("^[0-9a-f]{64}/", endless=True, body=data + bytes(1 << 20)))
    fetch(tmp_path)
    assert (tmp_path / SHARD).read_bytes() == data
    assert hub.requests[-1].sent < 40 << 20


def test_a_wrong_file_without_end_is_refused(hub, tmp_path):
    hub.faults.append(Fault("^[0-9a-f]{64}/", endless=True, body=bytes(1 << 20)))
    with pytest.raises(Stop, match="bytes with the hash"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_ranges_costs_no_memory(hub):
    """A part from the end of a long file, from a server that sends all of it."""
    hub.faults.append(Fault("^[0-9a-f]{64}/", endless=True, body=bytes(1 << 20)))
    found = listing(REPO, "main")
    file = client.HubFile(SHARD, 1 << 40, HASH)

    def ask() -> None:
        begin = 100 << 20
        part = remote.read_range(REPO, found.commit, file, begin, begin + 5, 0)
        assert part == bytes(5)

    assert peak_of(ask) < 20 << 20


def test_bytes_that_drip_are_not_waited_for():
    ticks = iter(range(10_000))
    drip = (b"x" for _ in range(5000))
    with pytest.raises(wire.Slow, match="less than 1,000 bytes a second"):
        list(wire.bounded(drip, None, None, lambda: next(ticks)))
    assert next(ticks) < 70
    with pytest.raises(wire.Slow, match="had not ended after 120 s"):
        list(wire.bounded((b"x" * 9000 for _ in range(999)), 10**9, 120, lambda: next(ticks)))
    steady = [b"x" * 2000] * 500
    assert list(wire.bounded(steady, None, None, lambda: next(ticks))) == steady


@pytest.mark.parametrize("path", ["api/models", "resolve", "^[0-9a-f]{64}/"])
def test_headers_that_drip_are_not_waited_for(hub, tmp_path, monkeypatch, path):
    monkeypatch.setattr(wire, "HEAD_SECONDS", 0.5)
    hub.faults.append(Fault(path, drip=0.05))
    with pytest.raises(Stop) as stopped:
        fetch(tmp_path)
    assert "an answer that had not begun after 0.5 s" in line(stopped)


def test_dripping_bytes_are_no_progress():
    came = [0]

    def attempt() -> None:
        came[0] += 1
        raise refusals.Slow("drip")

    waits: list[float] = []
    with pytest.raises(refusals.Slow):
        patience.patiently(attempt, 7, lambda: came[0], waits.append)
    assert waits == [1, 2, 4]


# ----------------------------------------------------------------------------------- names


def test_hidden_names_are_left_on_the_hub(hub, capsys):
    ours = (".download.json", ".before-repair/repair.json", ".lock", f".{SHARD}.abc.partial",
            ".x.json", ".headers/" + SHARD, "encoding/x.partial", ".gitattributes")  # fmt: skip
    hub.repos[REPO].commit(checkpoint() | dict.fromkeys(ours, b"{}"))
    for wanted, more in ((client.WANTED, 4), (("*",), 6)):
        found = listing(REPO, "main", wanted=wanted)
        assert {file.name for file in found.files} == set(checkpoint())
        out = capsys.readouterr().out
        assert "hidden files are left alone: .before-repair/repair.json" in out
        assert f"and {more} more" in out


def test_names_that_differ_in_case_need_a_volume_that_tells(hub, tmp_path, monkeypatch):
    hub.repos[REPO].commit(checkpoint() | {"CONFIG.json": b"[]"})
    monkeypatch.setattr(volume, "is_blind", lambda folder: True)
    with pytest.raises(Stop) as stopped:
        remote.fetch_skeleton(REPO, "main", tmp_path / "s", 0)
    assert "'CONFIG.json' and 'config.json'" in line(stopped)
    monkeypatch.setattr(volume, "is_blind", lambda folder: False)
    volume.check_case(REPO, ["A", "a"], tmp_path)


def test_one_name_in_two_spellings_needs_such_a_volume_too(tmp_path, monkeypatch):
    monkeypatch.setattr(volume, "is_blind", lambda folder: True)
    with pytest.raises(Stop, match="names that the volume"):
        volume.check_case(REPO, ["\u00e4.json", "a\u0308.json"], tmp_path)


# ------------------------------------------------------------------------------- skeletons


def test_a_listing_of_a_million_files_is_refused(hub, tmp_path):
    many = ",".join('{"rfilename":"a"}' for _ in range(400_000))
    hub.faults.append(
        Fault("api/models", 200, body=f'{{"sha":"{SHA}","siblings":[{many}]}}'.encode())
    )
    with pytest.raises(Stop, match="400,000 files, expected at most 20,000"):
        remote.fetch_skeleton(REPO, "main", tmp_path / "s", 0)


def test_a_skeleton_has_a_bound(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MOST", 100)
    with pytest.raises(Stop, match="more than 100 bytes of JSON and headers"):
        remote.fetch_skeleton(REPO, "main", tmp_path / "s", 0)


def test_tensors_of_a_published_checkpoint_come_from_its_headers(hub):
    (tensor,) = remote.tensors(REPO, "main").values()
    assert (tensor.name, tensor.shape, tensor.path) == ("a", (64,), Path(SHARD))


# ---------------------------------------------------------------------------------- pointers


def test_a_pointer_in_place_of_a_file_is_called_one(tmp_path):
    path = tmp_path / SHARD
    path.write_bytes(POINTER)
    for read in (read_shard, read_json):
        with pytest.raises(Stop, match=r"a Git LFS pointer in place of the file.*git lfs pull"):
            read(path)
    path.write_bytes(b"version https://elsewhere")
    with pytest.raises(Stop, match="a header of"):
        read_shard(path)


def test_published_pointers_are_called_so(hub):
    hub.repos[REPO].commit(checkpoint() | {SHARD: POINTER})
    with pytest.raises(Stop, match="a Git LFS pointer"):
        remote.tensors(REPO, "main")


# ----------------------------------------------------------------------------------- uploads

MADE = [made("a.json", "{}")]
STEPS = ("api/repos/create", "api/models/.*/revision", "preupload", "commit/main")


def shard_of(folder: Path):
    from dsv4.hub.upload import Item

    data = checkpoint()[SHARD]
    (folder / SHARD).write_bytes(data)
    return Item(client.HubFile(SHARD, len(data), hashlib.sha256(data).hexdigest()), folder / SHARD)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("code", "said", "advice"),
    [
        (400, "invalid license: \x1b[31mfoo", "would be refused again"),
        (402, "storage limit reached", "would be refused again"),
        (403, "Private repository storage limit reached", "an account that has access"),
        (413, "too large", "would be refused again"),
        (422, "no", "would be refused again"),
        (409, "conflict", "run the same command again"),
    ],
)
def test_a_refused_upload_shows_the_servers_words(hub, login, step, code, said, advice):
    if (code, step) == (409, STEPS[0]):
        return  # that it exists already is no refusal
    hub.faults.append(Fault(step, code, body=json.dumps({"error": said}).encode()))
    with pytest.raises(Stop) as stopped:
        upload("user/new", MADE, False, 0)
    assert said.replace("\x1b", r"\x1b") in line(stopped)
    assert advice in line(stopped)


def test_a_hub_that_is_busy_for_ever_is_left(hub, login):
    """huggingface_hub itself would ask again at once, without an end."""
    said = {"error": "Cannot create repo: another conflicting operation is in progress"}
    hub.faults.append(Fault("api/repos/create", 409, body=json.dumps(said).encode()))
    with pytest.raises(Stop) as stopped:
        upload("user/new", MADE, False, 1)
    assert "another conflicting operation is in progress" in line(stopped)
    assert len(hub.requests) == 2


def test_a_refused_object_shows_the_servers_words(hub, login, tmp_path):
    errors = {"objects": [{"oid": HASH, "size": 1, "error": {"code": 402, "message": "no room"}}]}
    hub.faults.append(Fault("objects/batch", 200, body=json.dumps(errors).encode()))
    with pytest.raises(Stop) as stopped:
        upload("user/new", [shard_of(tmp_path)], False, 0)
    assert "no room" in line(stopped)


ODD = ("[]", "{}", "5", '"x"', "null", '{"files": 5}', "<html>", '{"files": [1]}',
       '{"objects": [1]}', '{"commitOid": 5}')  # fmt: skip


@pytest.mark.parametrize("body", ODD)
@pytest.mark.parametrize("step", [*STEPS, "objects/batch"])
def test_an_uploads_answer_of_another_form_is_one_line(hub, login, tmp_path, step, body):
    """Or it is not needed, and the upload is checked by the hub's hashes in the end."""
    hub.faults.append(Fault(step, 200, body=body.encode(), times=1))
    said = ""
    try:
        upload("user/new", [*MADE, shard_of(tmp_path)], False, 0)
    except Stop as stop:
        said = str(stop)
    assert said.isprintable()


def test_a_commit_that_is_put_off_is_made_when_the_hub_says(hub, login):
    hub.faults.append(Fault("commit/main", 429, times=1, headers={"Retry-After": "1"}))
    commit = upload("user/new", MADE, False, 1)
    assert hub.repos["user/new"].refs["main"] == commit


# ------------------------------------------------------------------------------- environment

SETTINGS = [
    ("HF_HUB_DOWNLOAD_TIMEOUT", "abc", "whole seconds"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "-5", "whole seconds"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "0", "whole seconds"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "1e3", "whole seconds"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "²", "whole seconds"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "9" * 20, "whole seconds"),
    ("HF_HUB_ETAG_TIMEOUT", "soon", "whole seconds"),
    ("HF_ENDPOINT", "", "a hub's address"),
    ("HF_ENDPOINT", "huggingface.co", "a hub's address"),
    ("HF_ENDPOINT", "http://[", "a hub's address"),
    ("HF_ENDPOINT", "ftp://127.0.0.1", "a hub's address"),
    ("HF_ENDPOINT", "https://", "a hub's address"),
    ("HF_ENDPOINT", "http://x:99999", "a hub's address"),
    ("HF_ENDPOINT", "http://x\x1b[2J", "a hub's address"),
    ("HTTP_PROXY", "http://[", "http://HOST:PORT"),
    ("http_proxy", "http://x:port", "http://HOST:PORT"),
    ("HTTPS_PROXY", "http://x:99999", "http://HOST:PORT"),
    ("HTTPS_PROXY", "gopher://x:1", "http://HOST:PORT"),
    ("ALL_PROXY", "socks4://x:1", "http://HOST:PORT"),
    ("all_proxy", "socks://x:1", "http://HOST:PORT"),
    ("ALL_PROXY", "socks5://", "http://HOST:PORT"),
    ("ALL_PROXY", "http://a b", "http://HOST:PORT"),
    ("SSL_CERT_FILE", "/nonexistent/ca.pem", "a file of certificates"),
    ("SSL_CERT_FILE", "/dev/null", "a file of certificates"),
    ("SSL_CERT_FILE", "/", "a file of certificates"),
    ("SSL_CERT_DIR", "/nonexistent", "a folder of certificates"),
    ("SSL_CERT_DIR", "/nonexistent:/dev/null", "a folder of certificates"),
    ("REQUESTS_CA_BUNDLE", "/nonexistent/ca.pem", "a file of certificates"),
    ("CURL_CA_BUNDLE", "/nonexistent/ca.pem", "a file of certificates"),
]


@pytest.mark.parametrize(("name", "value", "expected"), SETTINGS)
def test_a_setting_that_cannot_work_is_named(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    check = settings.check_settings if name.startswith("HF_") else settings.check_ways
    with pytest.raises(Stop) as stopped:
        check()
    assert line(stopped).startswith(f"{name}: found {value!a}, expected ")
    assert expected in line(stopped)


@pytest.mark.parametrize("data", [b"\xff\xfe", "hf_sécret".encode(), b"hf_secret\x07secret"])
def test_a_token_that_none_can_be_is_told_and_not_shown(hub, tmp_path, monkeypatch, data):
    from huggingface_hub import constants

    (tmp_path / "token").write_bytes(data)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main")
    assert line(stopped).startswith("the hub's login: found a token ")
    assert "cret" not in line(stopped)


def test_a_proxys_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "ftp://me:secret@p@x:1")
    with pytest.raises(Stop) as stopped:
        settings.check_ways()
    assert "secret" not in line(stopped)
    assert "@x:1" in line(stopped)


def test_settings_that_work_are_left_alone(monkeypatch):
    for name, value in {
        "HTTP_PROXY": "127.0.0.1:3128", "HTTPS_PROXY": "https://me:word@proxy:8080/",
        "ALL_PROXY": "", "SSL_CERT_FILE": "", "HF_HUB_DOWNLOAD_TIMEOUT": "30",
        "HF_ENDPOINT": "https://hub.example:8443/path/",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    settings.check_settings()
    settings.check_ways()


def commands(folder: Path) -> dict[str, list[object]]:
    """What speaks with a hub, as far as it gets."""
    (folder / "report.json").write_text("{}")
    return {
        "download": ["--source", folder / "s", "--repo", REPO, "--patience", 0],
        "inspect_bundle": ["--repo", REPO, "--patience", 0],
        "publish": ["--bundle", folder, "--to", REPO, "--report", folder / "report.json"],
        "check": ["--source", folder / "s", "--bundle", folder / "b", "--repo", REPO],
    }


@pytest.mark.parametrize("name", ["download", "inspect_bundle", "publish", "check"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks4://127.0.0.1:9"), ("HF_HUB_DOWNLOAD_TIMEOUT", "abc")],
)
def test_each_command_names_a_setting_that_cannot_work(hub, tmp_path, name, variable, value):
    known = environment(hub, tmp_path / "s", TOKEN, **{variable: value})
    run = script(name, *commands(tmp_path)[name], env=known)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    said = run.stdout if name == "check" else run.stderr
    assert f"{variable}: found '{value}'" in said
    assert len(run.stderr.splitlines()) == 1


class Socks(threading.Thread):
    """A SOCKS5 proxy without a login (RFC 1928) for one connection at a time, to this machine."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"socks5://127.0.0.1:{self.server.getsockname()[1]}"
        self.asked: list[str] = []

    def run(self) -> None:
        while True:
            client, _ = self.server.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb", 0) as read:
            read.read(read.read(2)[1])
            client.sendall(b"\5\0")
            kind = read.read(4)[3]
            host = read.read(4) if kind == 1 else read.read(read.read(1)[0])
            name = socket.inet_ntoa(host) if kind == 1 else host.decode()
            port = int.from_bytes(read.read(2), "big")
            self.asked.append(f"{name}:{port}")
            with socket.create_connection(("127.0.0.1", port)) as there:
                client.sendall(b"\5\0\0\1" + bytes(6))
                back = threading.Thread(target=self.copy, args=(there, client), daemon=True)
                back.start()
                self.copy(client, there)
                back.join()

    @staticmethod
    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def socks():
    proxy = Socks()
    proxy.start()
    yield proxy
    proxy.server.close()


def test_a_listing_and_a_file_come_through_a_socks_proxy(hub, socks, tmp_path, monkeypatch):
    from huggingface_hub import constants

    there = hub.url.replace("127.0.0.1", "hub.invalid")  # what is here is asked for directly
    monkeypatch.setattr(constants, "ENDPOINT", there)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, there)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("ALL_PROXY", socks.url)
    monkeypatch.setenv("NO_PROXY", "")
    fetch(tmp_path)
    assert (tmp_path / SHARD).read_bytes() == checkpoint()[SHARD]
    assert {f"http://{host}" for host in socks.asked} == {there}


def test_no_proxy_is_asked_for_this_machine(hub, tmp_path, monkeypatch):
    """Neither for a hub, nor for the server that demo, selftest and smoke ask."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    fetch(tmp_path)
    assert (tmp_path / SHARD).read_bytes() == checkpoint()[SHARD]
    status, data = server.exchange(hub.url, "GET", f"/api/models/{REPO}/revision/main", "", 20)
    assert (status, json.loads(data)["id"]) == (200, REPO)


def test_a_login_that_cannot_be_read_is_one_line(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main")
    assert f"the hub's login: found {tmp_path}: Is a directory" in line(stopped)
    assert "HF_HOME" in line(stopped)


def test_socks_without_its_package_is_one_line(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    with pytest.raises(Stop) as stopped:
        listing(REPO, "main")
    assert "no package socksio" in line(stopped)
    assert "make venv installs it" in line(stopped)
