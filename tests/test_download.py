"""The download stage against a hub on this machine: what arrives, what is said, what is kept.

Each test runs scripts/download.py as a user does. Catches: a resume that starts over, a wrong or
short file under its final name, a branch that moves under a running download, a complete source
that still needs the network, unclear words, and a token in any output.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import script
from hub_server import TOKEN, Fault, Hub, asks_for_part
from small import Sizes, save, source_arrays

from dsv4.hub.provenance import RECORD, provenance
from dsv4.storage import locks
from dsv4.storage.checkpoint import INDEX

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "download.py"
REPO = "deepseek-ai/DeepSeek-V4-Flash"
FIRST = "model-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A source checkpoint, file name → bytes: 5 shards of about 400 kB, JSON, encoding."""
    folder = tmp_path_factory.mktemp("origin")
    sizes = Sizes(hidden=512, width=256)
    arrays = source_arrays(sizes, np.random.default_rng(5))
    save(folder, arrays, -(-len(arrays) // 5), sizes.config())
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text("# an encoding\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "picture.png").write_bytes(b"not wanted")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub(files):
    with Hub() as hub:
        hub.add(REPO, files)
        yield hub


class Run:
    """One finished run: exit status and output, checked for the token in passing."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert TOKEN not in out + err
        assert "Traceback" not in err

    @property
    def line(self) -> str:
        """The one line on stderr."""
        lines = [line for line in self.err.splitlines() if line]
        assert len(lines) == 1, self.err
        return lines[0]


def command(hub, source: Path, *options: str, repo: str = REPO) -> list[str]:
    options = ("--patience", "0", *options)
    return [sys.executable, str(SCRIPT), "--source", str(source), "--repo", repo, *options]


def environment(hub, source: Path, token: str = "", **more: str) -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    known |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url}
    known |= {"HF_HOME": str(source.parent / "hf-home"), "NO_PROXY": "127.0.0.1"}
    return known | ({"HF_TOKEN": token} if token else {}) | more


def download(hub, source: Path, *options: str, repo: str = REPO, token: str = "", **env) -> Run:
    words = command(hub, source, *options, repo=repo)[2:]
    done = script("download", *words, env=environment(hub, source, token, **env), timeout=60)
    return Run(done.returncode, done.stdout, done.stderr)


def assert_whole(source: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if name != "picture.png":
            assert (source / name).read_bytes() == data, name
    assert not list(source.rglob("*.partial"))


def sent_of_shards(hub) -> int:
    """The bytes of shards that were sent, but for those of headers."""
    return sum(r.sent for r in hub.requests if r.store and not asks_for_part(r.range))


def test_a_download_brings_every_wanted_file_and_no_other(hub, files, tmp_path):
    run = download(hub, tmp_path / "s")
    assert (run.code, run.err) == (0, "")
    assert_whole(tmp_path / "s", files)
    assert not (tmp_path / "s" / "picture.png").exists()
    total = sum(len(d) for n, d in files.items() if n != "picture.png")
    assert f"{total / 1e6:.1f} MB" in run.out.splitlines()[1]


def test_a_complete_source_needs_no_network(hub, files, tmp_path):
    download(hub, tmp_path / "s")
    hub.requests.clear()
    run = download(hub, tmp_path / "s", HF_HUB_OFFLINE="1")
    assert run.code == 0
    assert "complete already" in run.out
    assert hub.requests == []


def test_the_login_does_not_reach_the_store(hub, tmp_path):
    hub.repos[REPO].gated = True
    assert download(hub, tmp_path / "s", token=TOKEN).code == 0
    asked = hub.asked("resolve|api/models") + [r for r in hub.requests if r.store]
    wrong = [r for r in asked if r.authorized is r.store]
    assert wrong == []


def cut_once(name: str) -> list[Fault]:
    """The connection breaks in the middle of a shard, and then its store has a fault."""
    store = f"^[0-9a-f]{{64}}/{name}"
    return [Fault(store, break_after=100_000, times=1, whole=True), Fault(store, 503, whole=True)]


def test_a_broken_transfer_goes_on_where_it_stopped(hub, files, tmp_path):
    hub.faults += cut_once(FIRST)
    first = download(hub, tmp_path / "s", "--workers", "1")
    assert first.code == 1
    assert "HTTP 503" in first.line
    assert not (tmp_path / "s" / FIRST).exists()
    hub.faults.clear()
    hub.requests.clear()
    assert download(hub, tmp_path / "s").code == 0
    assert_whole(tmp_path / "s", files)
    (request,) = [r for r in hub.asked(FIRST) if r.store and not asks_for_part(r.range)]
    assert request.range == "bytes=65536-"  # what came, but for the last piece of 64 KiB
    assert request.sent == len(files[FIRST]) - 65_536


def test_within_one_run_a_lost_connection_is_taken_up_again(hub, files, tmp_path):
    hub.faults += [*cut_once(FIRST)[:1], Fault("00002-of", 503, times=1, whole=True)]
    run = download(hub, tmp_path / "s", "--patience", "30")
    assert (run.code, run.err) == (0, "")
    assert_whole(tmp_path / "s", files)
    lost = 100_000 - 65_536
    assert sent_of_shards(hub) == lost + sum(len(d) for n, d in files.items() if "model-" in n)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_fetches_only_the_rest(hub, files, tmp_path, sig):
    killed = ("dsv4.hub.file_transfer", "Transfer._count", 20, sig)  # of some 70 pieces of 64 KiB
    words = command(hub, tmp_path / "s", "--workers", "2")[2:]
    done = script("download", *words, env=environment(hub, tmp_path / "s"), kill=killed)
    assert done.returncode == (-9 if sig == signal.SIGKILL else 130)
    assert "Traceback" not in done.stderr
    hub.faults.clear()
    hub.requests.clear()
    assert download(hub, tmp_path / "s").code == 0
    assert_whole(tmp_path / "s", files)
    total = sum(len(d) for n, d in files.items() if "model-" in n)
    # Only what the kernel had not yet been given is fetched twice: a buffer for each file.
    assert sent_of_shards(hub) < total - 300_000


def test_wrong_bytes_never_get_the_final_name(hub, files, tmp_path):
    hub.faults.append(Fault(FIRST, corrupt=True, whole=True))
    run = download(hub, tmp_path / "s")
    assert run.code == 1
    assert f"{FIRST}: found bytes with the hash" in run.line
    assert not (tmp_path / "s" / FIRST).exists()
    hub.faults.clear()
    assert download(hub, tmp_path / "s").code == 0
    assert_whole(tmp_path / "s", files)


def test_a_damaged_partial_file_is_fetched_anew(hub, files, tmp_path):
    """A machine that lost power: the partial file has its length, but not its bytes."""
    hub.faults += cut_once(FIRST)
    download(hub, tmp_path / "s")
    hub.faults.clear()
    (partial,) = (tmp_path / "s").glob(f".{FIRST}.*.partial")
    partial.write_bytes(bytes(65_536))
    assert download(hub, tmp_path / "s").code == 0
    assert_whole(tmp_path / "s", files)


def test_a_server_without_ranges_costs_time_but_no_bytes(hub, files, tmp_path):
    hub.faults += cut_once(FIRST)
    assert download(hub, tmp_path / "s").code == 1
    hub.faults[:] = [Fault(".", no_range=True)]
    assert download(hub, tmp_path / "s").code == 0
    assert_whole(tmp_path / "s", files)


def test_a_download_stays_at_the_commit_where_it_began(hub, files, tmp_path):
    source = tmp_path / "s"
    hub.faults.append(Fault("resolve", 503))  # not one file arrives
    download(hub, source)
    pinned = hub.repos[REPO].refs["main"]
    hub.faults.clear()
    newer = hub.repos[REPO].commit(files | {"README.md": b"newer"})
    run = download(hub, source)
    assert run.code == 0
    assert f"is at {newer[:12]} by now; this folder stays at {pinned[:12]}" in run.out
    assert not (source / "README.md").exists()
    assert provenance(source)["commit"] == pinned


def test_a_pinned_commit_that_vanished_says_how_to_go_on(hub, files, tmp_path):
    """A history that was squashed: another commit, most files the same."""
    source, repo = tmp_path / "s", hub.repos[REPO]
    hub.faults.append(Fault(FIRST, 404, whole=True))
    download(hub, source)
    had = {path.name for path in source.rglob("*") if path.is_file()}
    old = repo.refs["main"]
    hub.faults.clear()
    repo.commits.clear()
    repo.commit(files | {"README.md": b"newer"})
    run = download(hub, source)
    assert run.code == 1
    assert f"found the pinned commit {old[:12]} gone from the hub" in run.line
    assert f"delete {source / RECORD} and run download again" in run.line
    (source / RECORD).unlink()
    hub.requests.clear()
    assert download(hub, source).code == 0
    assert_whole(source, files | {"README.md": b"newer"})
    fetched = {request.path.rpartition("/")[2] for request in hub.asked("resolve")}
    assert FIRST in fetched
    assert not fetched & (had - {"config.json", INDEX})  # which a judgement reads again


def test_our_own_names_are_not_taken_from_a_hub(hub, files, tmp_path):
    """.download.json, .before-repair/ and locks of a hub would be believed, or undone, here."""
    ours = (RECORD, ".before-repair/repair.json", ".lock", ".headers/x.safetensors")
    hub.repos[REPO].commit(files | dict.fromkeys(ours, b'{"created": ["../x"]}'))
    run = download(hub, tmp_path / "s")
    assert (run.code, run.err) == (0, "")
    assert [p.name for p in (tmp_path / "s").glob(".*")] == [RECORD]
    assert provenance(tmp_path / "s")["repo"] == REPO
    assert "complete already" in download(hub, tmp_path / "s").out


def test_another_revision_needs_another_folder(hub, files, tmp_path):
    download(hub, tmp_path / "s")
    first = hub.repos[REPO].refs["main"]
    newer = hub.repos[REPO].commit(files | {"README.md": b"newer"}, "next")
    for revision in ("next", newer):
        run = download(hub, tmp_path / "s", "--revision", revision)
        assert run.code == 1
        assert f"found the commit {first[:12]} pinned" in run.line
    assert download(hub, tmp_path / "s", "--revision", first).code == 0
    run = download(hub, tmp_path / "s", repo="somebody/else")
    assert f"found a download of {REPO}" in run.line


def test_rehashing_finds_a_flipped_bit_and_the_next_run_mends_it(hub, files, tmp_path):
    source = tmp_path / "s"
    download(hub, source)
    stat = (source / FIRST).stat()
    data = bytearray(files[FIRST])
    data[-1] ^= 1
    (source / FIRST).write_bytes(data)
    os.utime(source / FIRST, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert download(hub, source).code == 0  # size and time are as they were
    run = download(hub, source, "--verify-hashes")
    assert run.code == 1
    assert f"{FIRST}: found another size or hash" in run.line
    hub.requests.clear()
    assert download(hub, source).code == 0
    assert_whole(source, files)
    assert sent_of_shards(hub) == len(files[FIRST])


def test_a_touched_file_is_hashed_but_not_fetched(hub, files, tmp_path):
    download(hub, tmp_path / "s")
    os.utime(tmp_path / "s" / FIRST)
    hub.requests.clear()
    assert download(hub, tmp_path / "s").code == 0
    assert sent_of_shards(hub) == 0


def test_files_from_elsewhere_are_hashed_not_fetched(hub, files, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for name, data in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    assert download(hub, source).code == 0
    assert sent_of_shards(hub) == 0
    assert provenance(source)["repo"] == REPO


def test_a_source_that_came_another_way_is_checked_by_its_headers(files, tmp_path):
    source = tmp_path / "s"
    for name, data in files.items():
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_bytes(data)
    assert download("http://127.0.0.1:9", source, repo="").code == 0
    assert provenance(source) is None
    (source / FIRST).write_bytes(files[FIRST][:-1])
    assert FIRST in download("http://127.0.0.1:9", source, repo="").line


def test_a_shard_that_the_hub_lacks_stops_before_any_shard_is_fetched(hub, files, tmp_path):
    hub.repos[REPO].commit({n: d for n, d in files.items() if n != FIRST})
    run = download(hub, tmp_path / "s")
    assert run.code == 1
    assert f"found {FIRST}" in run.line
    assert sent_of_shards(hub) == 0


OTHERS = ("adapter_model.safetensors", "consolidated.00.safetensors", "original/model.safetensors",
          "checkpoint-100/model.safetensors", "original/params.json")  # fmt: skip


def test_only_the_shards_that_the_index_names_are_fetched(hub, files, tmp_path):
    hub.repos[REPO].commit(files | dict.fromkeys(OTHERS, b"another's"))
    run = download(hub, tmp_path / "s")
    assert (run.code, run.err) == (0, "")
    assert_whole(tmp_path / "s", files)
    assert not hub.asked("|".join(OTHERS))
    assert not any((tmp_path / "s" / name).exists() for name in OTHERS)
    hub.requests.clear()
    assert "complete already" in download(hub, tmp_path / "s").out
    assert hub.requests == []


def test_a_record_of_more_shards_than_the_index_names_is_mended(hub, files, tmp_path):
    """An earlier version recorded every shard of the repository, and fetched them for ever."""
    source = tmp_path / "s"
    hub.repos[REPO].commit(files | dict.fromkeys(OTHERS, b"another's"))
    download(hub, source)
    record = json.loads((source / RECORD).read_text())
    record["files"]["original/model.safetensors"] = {"size": 9, "sha256": "0" * 64}
    (source / RECORD).write_text(json.dumps(record))
    hub.requests.clear()
    assert download(hub, source).code == 0
    assert not hub.asked("resolve")
    assert "complete already" in download(hub, source).out


def test_without_an_index_the_one_shard_is_fetched(hub, files, tmp_path):
    sizes = Sizes()
    save(tmp_path / "o", source_arrays(sizes, np.random.default_rng(6)), 10**6, sizes.config())
    shard = tmp_path / "o" / "model-00001-of-00001.safetensors"
    one = {name: data for name, data in files.items() if "model" not in name}
    one |= {"config.json": (tmp_path / "o" / "config.json").read_bytes()}
    one |= {"model.safetensors": shard.read_bytes()}
    del one["picture.png"]
    hub.repos[REPO].commit(one | dict.fromkeys(OTHERS, b"another's"))
    download(hub, tmp_path / "s")
    assert_whole(tmp_path / "s", one)
    assert set(json.loads((tmp_path / "s" / RECORD).read_text())["files"]) == set(one)
    hub.repos[REPO].commit({"config.json": b"{}", "adapter_model.safetensors": b"another's"})
    assert "found model.safetensors and 0 more" in download(hub, tmp_path / "t").line


def test_the_provenance_has_hashes_and_no_local_path(hub, tmp_path):
    download(hub, tmp_path / "s")
    origin = provenance(tmp_path / "s")
    assert origin["commit"] == hub.repos[REPO].refs["main"]
    assert set(origin["files"][FIRST]) == {"sha256"}
    assert set(origin["files"]["config.json"]) == {"git_sha1"}
    assert str(tmp_path) not in json.dumps(origin)


FAULTS = {
    "gated": ({"gated": True}, None, "", "a gated repository, and no login"),
    "private": ({"private": True}, None, "", "a private one, and no login"),
    "absent": ({}, None, TOKEN, "no such repository"),
    "bad login": ({}, None, "hf_SomeOldTokenThatWasRevoked", "HTTP 401: the login is rejected"),
    "401": ({}, Fault("resolve", 401), "", "hub: "),
    "403": ({}, Fault("resolve", 403), TOKEN, "HTTP 403: this login may not"),
    "404": ({}, Fault("resolve", 404), "", "HTTP 404"),
    "429": ({}, Fault("api/models", 429), "", "HTTP 429: too many requests"),
    "500": ({}, Fault("resolve", 500), "", "HTTP 500: the hub has a fault"),
    "503": ({}, Fault("api/models", 503), "", "HTTP 503: the hub has a fault"),
    "proxy": ({}, Fault("api/models", text="<html>Pay here"), "", "an answer that is no JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_refusal_has_one_clear_line(hub, tmp_path, name):
    kind, fault, token, words = FAULTS[name]
    for key, value in kind.items():
        setattr(hub.repos[REPO], key, value)
    hub.faults += [fault] if fault else []
    repo = "nobody/nothing" if name == "absent" else REPO
    run = download(hub, tmp_path / "s", repo=repo, token=token)
    assert run.code == 1
    assert run.line.startswith("error: hub: ")
    assert words in run.line
    assert token not in run.line or not token


def test_a_token_that_is_no_header_is_not_shown(hub, tmp_path):
    run = download(hub, tmp_path / "s", token="hf_secret\x07secret")
    assert run.code == 1
    assert "secret" not in run.line


def test_a_stalled_server_is_left_after_the_timeout(hub, tmp_path):
    hub.faults.append(Fault(FIRST, delay=5))
    run = download(hub, tmp_path / "s", "--workers", "1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert run.code == 1
    assert "no connection" in run.line


def test_patience_counts_from_the_last_byte():
    from dsv4.hub.hub_errors import TruncatedResponse
    from dsv4.hub.retry import with_retries

    came, waits = [0], []

    def attempt() -> None:
        came[0] += len(waits) < 20
        raise TruncatedResponse("x")

    with pytest.raises(TruncatedResponse):
        with_retries(attempt, 7, lambda: came[0], waits.append)
    assert waits == [1] * 20 + [2, 4]


def test_no_network_has_one_clear_line(tmp_path):
    assert "no connection" in download("http://127.0.0.1:9", tmp_path / "s").line
    assert "HF_HUB_OFFLINE" in download("http://127.0.0.1:9", tmp_path / "s",
                                        HF_HUB_OFFLINE="1").line  # fmt: skip


def test_an_unknown_revision_has_one_clear_line(hub, tmp_path):
    assert "no such revision" in download(hub, tmp_path / "s", "--revision", "gone").line


def test_a_file_name_that_leads_out_is_refused(hub, files, tmp_path):
    hub.repos[REPO].commit(files | {"encoding/../../evil.json": b"{}"})
    assert "'encoding/../../evil.json'" in download(hub, tmp_path / "s").line
    assert not (tmp_path / "evil.json").exists()


def test_a_disk_too_small_is_said_before_anything_is_fetched(tmp_path):
    from dsv4.errors import UserError
    from dsv4.hub import download as hub
    from dsv4.hub.provenance import Record
    from dsv4.hub.repository import HubFile
    from dsv4.storage.disk_space import check_free_space

    record = Record("r", "main", "c", {"big": HubFile("big", 1 << 60, "0" * 64)})
    needed = hub.remaining(tmp_path, record.files.values())
    with pytest.raises(
        UserError, match=r"free, expected .* for what is still to fetch; free space"
    ):
        check_free_space(tmp_path, needed, " for what is still to fetch", "free space")


def test_a_full_disk_has_one_clear_line_and_loses_nothing(hub, files, tmp_path):
    """A file-size limit stands for the disk that fills while a shard comes."""
    source = tmp_path / "s"
    hub.faults += cut_once(FIRST)
    download(hub, source, "--workers", "1")
    hub.faults.clear()
    limit = max(len(data) for data in files.values()) // 2

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command(hub, source, "--workers", "1"), env=environment(hub, source),
        capture_output=True, text=True, timeout=60, check=False, preexec_fn=lower,
    )  # fmt: skip
    run = Run(done.returncode, done.stdout, done.stderr)
    assert run.code == 1
    assert "found a full volume (File too large)" in run.line
    assert download(hub, source).code == 0
    assert_whole(source, files)


def test_two_downloads_into_one_folder_do_not_meet(hub, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    with locks.locked(source):
        assert "another run at work" in download(hub, source).line
    assert download(hub, source).code == 0


def test_the_bundle_names_the_commit_and_no_local_path(hub, tmp_path, good_copy):
    from conftest import must

    source = tmp_path / "s"
    download(hub, source)
    must("patch", "--bundle", good_copy, "--source", source)
    text = (good_copy / "jang_config.json").read_text()
    pinned = hub.repos[REPO].refs["main"]
    assert json.loads(text)["source_model"] == f"{REPO}@{pinned}"
    assert json.loads(text)["source"] == provenance(source)
    must("patch", "--bundle", good_copy)
    assert (good_copy / "jang_config.json").read_text() == text
    assert str(tmp_path) not in text
