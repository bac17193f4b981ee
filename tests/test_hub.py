"""What is added to huggingface_hub: errors in one line, retries, limits.

Most tests ask in this process, with huggingface_hub pointed at the hub of this machine. Catches:
names, sizes and hashes believed that cannot be, bytes beyond the announced size, a server's request
to wait ignored or obeyed for ever, an expired link taken for a missing login, a token or an escape
sequence printed, a setting of the environment that ends in a traceback, shards of others deleted.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
from conftest import script
from hub_server import TOKEN, Fault, Hub
from test_download import environment

from dsv4.acceptance import client
from dsv4.errors import UserError
from dsv4.hub import http, hub_errors, remote_headers, repository, retry
from dsv4.hub.file_transfer import Transfer
from dsv4.hub.repository import listing
from dsv4.hub.upload import Item, text_item, upload
from dsv4.storage import filesystem
from dsv4.storage.checkpoint import read_json
from dsv4.storage.safetensors_file import read_shard

REPO = "user/model"
SHARD = "model-00001-of-00001.safetensors"
STORE = "^[0-9a-f]{64}/"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
HASH, SHA, ESCAPES = "0" * 64, "0" * 40, "hostile \x1b]0;OWNED\x07\x1b[2K\rpassed: all good"


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
        repository.quiet()
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


def fetch(folder: Path, patience: float = 0) -> None:
    """The shard, as download fetches it."""
    found = listing(REPO, "main")
    file = next(file for file in found.files if file.name == SHARD)
    Transfer(REPO, found.commit, folder, patience, lambda count: None).fetch(file)


# --- Listings -------------------------------------------------------------------------------------


def entry(**changes: object) -> dict:
    return {"rfilename": "a.json", "size": 1, "blobId": SHA} | changes


def of(*siblings: object, **changes: object) -> dict:
    return {"id": REPO, "sha": SHA, "siblings": list(siblings) or [entry()]} | changes


FORMS = {
    "a list": [],
    "no commit": of(sha=None),
    "a commit that leads out": of(sha="../" * 13 + "x"),
    "no files": of(siblings=None),
    "a file that is a string": of("a.json"),
    "no size": of({"rfilename": "a.json", "blobId": SHA}),
    "size negative": of(entry(size=-1)),
    "a hash that leads out": of(entry(lfs={"sha256": "../x", "size": 1, "pointerSize": 134})),
    "no hash": of(entry(blobId=None)),
    "a name that climbs": of(entry(rfilename="encoding/../../b.json")),
    "a name with a void": of(entry(rfilename="encoding//b.json")),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_listing_of_another_form_is_refused(hub, form):
    hub.faults.append(Fault("api/models", 200, body=json.dumps(FORMS[form]).encode()))
    with pytest.raises(UserError) as stopped:
        listing(REPO, "main")
    assert line(stopped).startswith(f"hub: {REPO}: found ")


def test_hidden_names_are_left_on_the_hub(hub):
    ours = (".download.json", ".before-repair/repair.json", ".lock", f".{SHARD}.abc.partial",
            ".headers/" + SHARD, "encoding/x.partial", "encoding/.x", ".gitattributes")  # fmt: skip
    hub.repos[REPO].commit(checkpoint() | dict.fromkeys(ours, b"{}"))
    for wanted in (repository.is_source_file, repository.is_any_file):
        files = listing(REPO, "main", wanted=wanted).files
        assert {file.name for file in files} == set(checkpoint())


def test_names_that_differ_in_case_need_a_volume_that_tells(hub, tmp_path, monkeypatch):
    hub.repos[REPO].commit(checkpoint() | {"CONFIG.json": b"[]"})
    monkeypatch.setattr(filesystem, "is_case_insensitive", lambda folder: True)
    with pytest.raises(UserError) as stopped:
        remote_headers.fetch_skeleton(REPO, "main", tmp_path / "s", 0)
    assert "'CONFIG.json' and 'config.json'" in line(stopped)
    with pytest.raises(UserError, match="names that the volume"):
        filesystem.check_case(REPO, ["\u00e4.json", "a\u0308.json"], tmp_path)
    monkeypatch.setattr(filesystem, "is_case_insensitive", lambda folder: False)
    filesystem.check_case(REPO, ["A", "a"], tmp_path)


def test_a_pointer_in_place_of_a_file_is_called_one(hub, tmp_path):
    path = tmp_path / SHARD
    path.write_bytes(POINTER)
    for read in (read_shard, read_json):
        with pytest.raises(
            UserError, match=r"a Git LFS pointer in place of the file.*git lfs pull"
        ):
            read(path)
    hub.repos[REPO].commit(checkpoint() | {SHARD: POINTER})
    remote_headers.fetch_skeleton(REPO, "main", tmp_path / "s", 0)
    with pytest.raises(UserError, match="a Git LFS pointer"):
        read_shard(tmp_path / "s" / SHARD)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 402, 403, 404, 409, 416, 500])
def test_a_refusal_with_any_body_is_one_line(hub, tmp_path, code):
    for body in (json.dumps({"error": ESCAPES}).encode(), b"", b"<html>", b"\xff\xfe"):
        for path in ("api/models", "resolve", STORE):
            hub.faults[:] = [Fault(path, code, body=body)]
            with pytest.raises(UserError) as stopped:
                fetch(tmp_path)
            assert f"HTTP {code}" in line(stopped)


def test_a_servers_message_is_shown_escaped_short_and_without_the_token(hub, login):
    body = json.dumps({"error": f"Bearer {TOKEN} is not enough; {ESCAPES * 100}"}).encode()
    hub.faults.append(Fault("api/models", 403, body=body))
    with pytest.raises(UserError) as stopped:
        listing(REPO, "main")
    assert r"[token] is not enough; hostile \x1b]0;OWNED\x07" in line(stopped)
    assert "…" in line(stopped)


def test_an_expired_link_is_fetched_anew(hub, tmp_path):
    """The store's 403 says nothing of the login: the hub itself gave the link."""
    hub.faults.append(Fault(STORE, 403, times=1, body=b"<Error>AccessDenied</Error>"))
    fetch(tmp_path, patience=5)
    assert (tmp_path / SHARD).read_bytes() == checkpoint()[SHARD]


def test_a_store_that_stays_shut_is_told_without_advice_to_log_in(hub, tmp_path):
    hub.faults.append(Fault(STORE, 403, body=b"<Error>AccessDenied</Error>"))
    with pytest.raises(UserError) as stopped:
        fetch(tmp_path)
    store = hub.store_url.removeprefix("http://")
    assert f"HTTP 403 from {store}, where the hub keeps files" in line(stopped)
    assert "AccessDenied" in line(stopped)
    assert "login" not in line(stopped)


def test_the_hubs_own_403_is_final(hub):
    hub.faults.append(Fault("api/models", 403))
    with pytest.raises(UserError):
        listing(REPO, "main", patience=30)
    assert len(hub.requests) == 1


# --- Waiting --------------------------------------------------------------------------------------


class Limited(Exception):
    """A 429 with these headers."""

    def __init__(self, **headers: str) -> None:
        import httpx2

        given = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
        self.response = httpx2.Response(429, headers=given)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": " 100 "}, 100),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, 0),
        ({"RateLimit": '"api"; r=0; t=55', "Retry_After": "60"}, 60),
        ({"Retry_After": "soon"}, 0),
        ({}, 0),
    ],
)
def test_the_delay_that_a_server_asks_for_is_understood(headers, seconds):
    assert hub_errors.requested_delay(Limited(**headers)) == seconds


def delays(errors: list[Exception], patience: float) -> list[float]:
    """The delays until success, or -1 at the end where it gives up."""
    found: list[float] = []

    def attempt() -> None:
        if errors:
            raise errors.pop(0)

    try:
        retry.with_retries(attempt, patience, pause=found.append)
    except Limited:
        found.append(-1)
    return found


def test_a_requested_delay_is_kept_even_beyond_patience(capsys):
    assert delays([Limited(Retry_After="900")], 30) == [900]
    assert "trying again in 900 s, as it asks" in capsys.readouterr().out
    assert delays([Limited(Retry_After="900")] * 9, 30) == [900] * 4 + [-1]
    assert delays([Limited(Retry_After="86400")], 30) == [-1]
    assert delays([Limited(Retry_After="1")] * 99, 30) == [1, 2, 4, 8, -1]
    assert delays([Limited(Retry_After="9")], 0) == [-1]
    assert delays([Limited()] * 8, 1000) == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("path", ["api/models", "resolve", STORE])
def test_a_delay_too_long_is_told_at_once(hub, tmp_path, path):
    """huggingface_hub itself would sleep for as long as it is told, in silence."""
    hub.faults.append(Fault(path, 429, headers={"Retry-After": "7200"}))
    start = time.monotonic()
    with pytest.raises(UserError) as stopped:
        fetch(tmp_path, patience=30)
    assert "wait 7,200 s, as the hub asks" in line(stopped)
    assert time.monotonic() - start < 10


def test_no_request_comes_before_the_requested_time(hub):
    hub.faults.append(Fault("api/models", 503, times=1, headers={"Retry-After": "2"}))
    start = time.monotonic()
    listing(REPO, "main", patience=1)
    assert time.monotonic() - start >= 2
    assert len(hub.requests) == 2


# --- Bytes beyond what was announced --------------------------------------------------------------


def test_a_file_that_goes_on_past_its_size_is_cut_there(hub, tmp_path):
    data = checkpoint()[SHARD]
    hub.faults.append(Fault(STORE, endless=True, body=data + bytes(1 << 20)))
    fetch(tmp_path)
    assert (tmp_path / SHARD).read_bytes() == data
    assert hub.requests[-1].sent < 40 << 20


def test_a_range_from_a_server_without_ranges_is_refused(hub):
    """Its bytes would be those of the beginning."""
    hub.faults.append(Fault(STORE, no_range=True))
    found = listing(REPO, "main")
    file = next(file for file in found.files if file.name == SHARD)
    with pytest.raises(UserError, match="in place of a range of it"):
        remote_headers.read_range(REPO, found.commit, file, 8, 20, 0)
    assert remote_headers.read_range(REPO, found.commit, file, 0, 20, 0) == checkpoint()[SHARD][:20]


# --- Uploads --------------------------------------------------------------------------------------

MADE = [text_item("a.json", "{}")]
STEPS = ("api/repos/create", "api/models/.*/revision", "preupload", "commit/main")


def shard_of(folder: Path) -> Item:
    data = checkpoint()[SHARD]
    (folder / SHARD).write_bytes(data)
    return Item(
        repository.HubFile(SHARD, len(data), hashlib.sha256(data).hexdigest()), folder / SHARD
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("code", "said", "advice"),
    [
        (400, "invalid license: \x1b[31mfoo", "would be refused again"),
        (403, "Private repository storage limit reached", "an account that has access"),
    ],
)
def test_a_refused_upload_shows_the_servers_message(hub, login, step, code, said, advice):
    hub.faults.append(Fault(step, code, body=json.dumps({"error": said}).encode()))
    with pytest.raises(UserError) as stopped:
        upload("user/new", MADE, False, 0)
    assert said.replace("\x1b", r"\x1b") in line(stopped)
    assert advice in line(stopped)


def test_a_refused_object_shows_the_servers_message(hub, login, tmp_path):
    errors = {"objects": [{"oid": HASH, "size": 1, "error": {"code": 402, "message": "no room"}}]}
    hub.faults.append(Fault("objects/batch", 200, body=json.dumps(errors).encode()))
    with pytest.raises(UserError) as stopped:
        upload("user/new", [shard_of(tmp_path)], False, 0)
    assert "no room" in line(stopped)


def test_a_commit_that_is_put_off_is_made_when_the_hub_says(hub, login):
    hub.faults.append(Fault("commit/main", 429, times=1, headers={"Retry-After": "1"}))
    commit = upload("user/new", MADE, False, 1)
    assert hub.repos["user/new"].refs["main"] == commit


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, login, monkeypatch):
    from huggingface_hub import HfApi

    original = HfApi.create_commit

    def lose(*args: object, **options: object) -> None:
        original(*args, **options)
        raise ConnectionError("lost")

    monkeypatch.setattr(HfApi, "create_commit", lose)
    assert upload("user/new", MADE, False, 5) == hub.repos["user/new"].refs["main"]
    assert len(hub.commits) == 1


def test_only_shards_of_the_root_that_the_bundle_lacks_are_deleted(hub, login, tmp_path):
    other = {"original/model.safetensors": b"x", "lora/adapter_model.safetensors": b"y"}
    hub.repos[REPO].commit(checkpoint() | other | {"model-00002-of-00002.safetensors": b"z"})
    commit = upload(REPO, [shard_of(tmp_path), *MADE], False, 0)
    assert set(hub.repos[REPO].commits[commit]) == {*checkpoint(), *other, "a.json"}


# --- Environment ----------------------------------------------------------------------------------

SETTINGS = [
    ("HF_HUB_DOWNLOAD_TIMEOUT", "abc", "whole seconds"),
    ("HF_HUB_ETAG_TIMEOUT", "soon", "whole seconds"),
    ("ALL_PROXY", "socks4://me:secret@x:1", "http://HOST:PORT"),
    ("HTTPS_PROXY", "gopher://me:secret@x:1", "http://HOST:PORT"),
    ("SSL_CERT_FILE", "/nonexistent/ca.pem", "a file of certificates"),
    ("SSL_CERT_FILE", "/dev/null", "a file of certificates"),
]


@pytest.mark.parametrize(("name", "value", "expected"), SETTINGS)
def test_a_setting_that_cannot_work_is_named(monkeypatch, name, value, expected):
    for other in http.CONNECTION:
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    check = http.install.__wrapped__ if name.startswith("HF_") else http.make_client
    with pytest.raises(UserError) as stopped:
        check()
    assert line(stopped).startswith(f"{name}: found ")
    assert expected in line(stopped)
    assert "secret" not in line(stopped)


def test_settings_that_work_are_left_alone(monkeypatch):
    for value in ("socks5://127.0.0.1:9", "http://me:word@proxy:8080/", "127.0.0.1:3128", ""):
        monkeypatch.setenv("ALL_PROXY", value)
        http.make_client().close()


@pytest.mark.parametrize("name", ["download", "check"])
def test_a_command_names_a_setting_that_cannot_work(hub, tmp_path, name):
    given = ["--source", tmp_path / "s", "--repo", REPO]
    given += ["--bundle", tmp_path / "b"] if name == "check" else ["--patience", 0]
    known = environment(hub, tmp_path / "s", TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="abc")
    run = script(name, *given, env=known)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "HF_HUB_DOWNLOAD_TIMEOUT: found 'abc'" in run.stdout + run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("data", [b"\xff\xfe", "hf_sécret".encode(), b"hf_secret\x07secret"])
def test_a_token_that_none_can_be_is_told_and_not_shown(hub, tmp_path, monkeypatch, data):
    from huggingface_hub import constants

    (tmp_path / "token").write_bytes(data)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError) as stopped:
        listing(REPO, "main")
    assert line(stopped).startswith("the hub's login: found a token ")
    assert "cret" not in line(stopped)


def test_a_login_that_cannot_be_read_is_one_line(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError) as stopped:
        listing(REPO, "main")
    assert f"the hub's login: found {tmp_path}: Is a directory" in line(stopped)
    assert "HF_HOME" in line(stopped)


def test_an_endpoint_that_is_no_address_is_told(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "huggingface.co")
    with pytest.raises(UserError, match="check HF_ENDPOINT"):
        listing(REPO, "main", patience=30)


def test_offline_mode_is_told_at_once(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE set"):
        listing(REPO, "main", patience=3)
    assert time.monotonic() - start < 1


def test_no_proxy_is_asked_for_a_server_of_this_machine(hub, monkeypatch):
    """The server that demo, selftest and smoke ask."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    status, data = client.http_exchange(hub.url, "GET", f"/api/models/{REPO}/revision/main", "", 20)
    assert (status, json.loads(data)["id"]) == (200, REPO)
