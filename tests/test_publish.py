"""`make publish` to a hub on this machine: what goes up, what does not, and what is refused.

Uploads go the LFS way here (HF_HUB_DISABLE_XET=1), but in two tests: the real hub takes files by
Xet's protocol, which the hub here receives without putting them together.
Catches: a bundle that nobody verified, or that changed since; half a bundle on the hub; shards of
an earlier one left beside it; a token, a local path or a stray file in public.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import must, script
from hub_server import TOKEN, Fault, Hub, sha256

from dsv4.hub.provenance import Record
from dsv4.hub.repository import HubFile

TO = "user/DeepSeek-V4-nano-MLX"


@pytest.fixture(scope="module")
def verified(good, source, tmp_path_factory) -> Path:
    """A folder with bundle, source and verify.json, as `make verify` leaves them."""
    folder = tmp_path_factory.mktemp("verified")
    shutil.copytree(good, folder / "bundle")
    shutil.copytree(source, folder / "source")
    (folder / "source" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "source" / "LICENSE").write_text("Do what you like.\n")
    record(folder / "source")
    must("patch", "--bundle", folder / "bundle", "--source", folder / "source")
    verify(folder)
    return folder


def record(source: Path) -> None:
    """Write what download would have recorded of this source."""
    files = {p.name: HubFile(p.name, p.stat().st_size, "ab" * 32) for p in source.glob("*.*")}
    origin = Record("deepseek-ai/DeepSeek-V4-Flash", "main", "c" * 40, files)
    for name in files:
        origin.set_verified(source, name)
    origin.write(source)


def verify(folder: Path, *options: object) -> None:
    must("verify", "--bundle", folder / "bundle", "--source", folder / "source", "--jobs", 1,
         "--json", folder / "verify.json", "--without-loader", *options)  # fmt: skip


@pytest.fixture
def place(verified, tmp_path) -> Path:
    """That folder, to be changed; the report speaks of the copy, as if verified there."""
    folder = shutil.copytree(verified, tmp_path / "v")
    report = json.loads((folder / "verify.json").read_text())
    report["bundle"] = str((folder / "bundle").resolve())
    report["source"]["folder"] = str(folder / "source")
    (folder / "verify.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def publish(
    hub, folder: Path, *options: object, token: str = TOKEN, code: int = 0, xet: str = "1"
) -> str:
    """Run the script; returns its output, or its one line on stderr when it has to fail."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    known |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    known |= {"HF_HUB_DISABLE_XET": xet} | ({"HF_TOKEN": token} if token else {})
    run = script(
        "publish", "--bundle", folder / "bundle", "--source", folder / "source", "--to", TO,
        "--report", folder / "verify.json", "--page", folder / "verify.html", "--patience", 0,
        *options, env=known,
    )  # fmt: skip
    assert run.returncode == code, (run.stdout, run.stderr)
    assert TOKEN not in run.stdout + run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == (1 if code else 0), run.stderr
    return lines[0] if code else run.stdout


def published(hub) -> dict[str, bytes]:
    repo = hub.repos[TO]
    return repo.commits[repo.refs["main"]]


def sent_up(hub) -> int:
    return sum(r.received for r in hub.requests if r.store and r.method == "PUT" and r.status < 300)


def test_a_dry_run_shows_everything_and_uploads_nothing(hub, place):
    out = publish(hub, place, "--dry-run", token="")
    assert {request.method for request in hub.requests} == {"GET"}
    assert f"would be deleted: unknown, or nothing when {TO} is new" in out
    assert "license: mit\nbase_model: deepseek-ai/DeepSeek-V4-Flash\n" in out
    assert f"commit `{'c' * 40}`" in out
    assert "| layers.0 | 8." in out
    assert "Nothing was run on Metal" in out
    assert "would be uploaded: model.safetensors.index.json" in out
    assert "nothing was uploaded" in out


def test_what_is_published_is_what_was_verified(hub, place):
    bundle = place / "bundle"
    (bundle / "notes.txt").write_text("my own")
    (bundle / "encoding" / "__pycache__").mkdir()
    (bundle / "encoding" / "__pycache__" / "x.pyc").write_bytes(b"\0")
    (place / "verify.html").write_text(f"<p>{bundle.resolve()} {place / 'source'}</p>")
    out = publish(hub, place)
    files = published(hub)
    for name in json.loads((place / "verify.json").read_text())["hashes"]:
        assert files.pop(name) == (bundle / name).read_bytes()
    made = {"README.md", "verify.json", "verify.html", "LICENSE", ".gitattributes"}
    assert set(files) == made
    assert "stays here: notes.txt" in out
    assert all(str(place).encode() not in data for data in published(hub).values())
    assert json.loads(files["verify.json"])["bundle"] == TO
    assert len(hub.commits) == 1


def test_files_go_up_by_xet_where_the_hub_speaks_it(hub, place):
    hub.xet = True
    shards = {p.name: p.read_bytes() for p in (place / "bundle").glob("*.safetensors")}
    hub.meant = {sha256(data): data for data in shards.values()}
    publish(hub, place, xet="0")
    assert shards.items() <= published(hub).items()
    assert sum(r.received for r in hub.asked("^v1/xorbs")) > 0.5 * sum(map(len, shards.values()))


def test_xet_where_nobody_speaks_it_has_one_clear_line(hub, place):
    assert "xet-write-token" in publish(hub, place, xet="0", code=1)


def test_publishing_twice_uploads_nothing_the_second_time(hub, place):
    publish(hub, place)
    hub.requests.clear()
    assert "published at" in publish(hub, place)
    assert sent_up(hub) == 0
    assert len(hub.commits) == 1


def test_an_interrupted_upload_shows_nothing_and_goes_on(hub, place):
    hub.faults.append(Fault("/upload", 403, method="PUT"))
    assert "HTTP 403" in publish(hub, place, code=1)
    hub.faults[:] = [Fault("commit/main", 500)]
    assert "HTTP 500" in publish(hub, place, code=1)
    assert set(published(hub)) == {".gitattributes"}
    hub.faults.clear()
    hub.requests.clear()
    publish(hub, place)
    assert sent_up(hub) == 0  # the shards were up already
    assert len(hub.commits) == 1


def test_shards_of_an_earlier_bundle_go_in_the_same_commit_and_a_dry_run_lists_them(hub, place):
    old = "model-00009-of-00009.safetensors"
    kept = {"picture.png": b"kept", f"earlier/{old}": b"kept"}
    hub.add(TO, {old: b"old"} | kept)
    out = publish(hub, place, "--dry-run")
    assert [said for said in out.splitlines() if "deleted" in said] == [f"would be deleted: {old}"]
    assert old in published(hub)
    assert f"deleted in the same commit: {old}" in publish(hub, place)
    assert old not in published(hub)
    assert kept.items() <= published(hub).items()
    assert len(hub.commits) == 1


def test_bytes_that_changed_on_the_way_are_noticed(hub, place):
    hub.faults.append(Fault("commit/main", corrupt=True))
    assert "found other bytes (1 files so)" in publish(hub, place, code=1)


def test_a_page_of_an_earlier_report_is_refused(hub, place):
    (place / "verify.html").write_text("<p>earlier</p>")
    os.utime(place / "verify.html", (0, 0))
    assert "a page older than the report" in publish(hub, place, code=1)


def test_a_report_on_another_bundle_is_refused(hub, place):
    report = json.loads((place / "verify.json").read_text())
    report["hashes"] = dict.fromkeys(report["hashes"], "0" * 64)
    (place / "verify.json").write_text(json.dumps(report))
    assert "0000000000000000… as verified" in publish(hub, place, code=1)


def test_a_bundle_that_changed_since_is_refused(hub, place):
    shard = next((place / "bundle").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"{shard.name}: found SHA-256" in publish(hub, place, code=1)
    assert TO not in hub.repos


def test_a_file_that_verify_has_not_read_is_refused(hub, place):
    (place / "bundle" / "special_tokens_map.json").write_text("{}")
    assert "a file that verify has not read" in publish(hub, place, code=1)


WRONG = {
    "name": "eos-wrong", "severity": "error", "count": 1, "why": "", "repair": "", "places": [],
}  # fmt: skip
REFUSED = {
    "failed": ({"verdict": "failed", "findings": [WRONG]}, "failed (eos-wrong)"),
    "headers only": ({"levels": [1]}, "found level 1 only"),
    "no source": ({"errors": {}}, "numbers that were compared with no source"),
    "another format": ({"format": 9}, "found format 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_report_that_does_not_prove_it_is_refused(hub, place, name):
    change, words = REFUSED[name]
    report = json.loads((place / "verify.json").read_text()) | change
    (place / "verify.json").write_text(json.dumps(report))
    assert words in publish(hub, place, code=1)
    assert TO not in hub.repos


def test_without_a_report_nothing_is_published(hub, place):
    (place / "verify.json").unlink()
    assert "found no report" in publish(hub, place, code=1)


@pytest.mark.parametrize("secret", ["/home/ann/models/x", "hf_" + "A1b2C3d4" * 4])
def test_nothing_of_this_machine_goes_out(hub, place, secret):
    path = place / "bundle" / "jang_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": secret}))
    line = publish(hub, place, code=1)
    assert "expected nothing of this machine" in line
    assert not secret.startswith("hf_") or secret not in line


def test_no_login_and_a_bad_one_are_said_first(hub, place):
    assert "found no login" in publish(hub, place, token="", code=1)
    assert "HTTP 401" in publish(hub, place, token="hf_old", code=1)
    hub.faults.append(Fault("api/repos/create", 403))
    assert "HTTP 403: this login may not do that" in publish(hub, place, code=1)


def test_to_must_name_a_repository(hub, place):
    assert "found 'nothing', expected user/name" in publish(hub, place, "--to", "nothing", code=1)
