"""`make inspect` on bundles of a hub on this machine: what is read, what is said.

Catches: a bundle judged by its tensors' bytes (180 GB fetched), a fault of a published bundle that
level 1 knows and inspect does not name, a hostile header or server that makes it read on and on.
"""

from __future__ import annotations

import json
import os
import re

import pytest
from conftest import script
from hub_server import TOKEN, Fault, Hub

REPO = "user/bundle"


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def inspect(hub, *options: str, token: str = ""):
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    known |= {"HF_ENDPOINT": hub.url, "HF_HOME": "/nonexistent", "NO_PROXY": "127.0.0.1"}
    known |= {"HF_TOKEN": token} if token else {}
    run = script("inspect_bundle", "--repo", REPO, "--patience", 0, *options, env=known)
    assert "Traceback" not in run.stderr
    assert TOKEN not in run.stdout + run.stderr
    return run


def test_several_bundles_end_in_one_table(hub, good, stock):
    hub.add("a/good", contents(good))
    hub.add("b/stock", contents(stock))
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": "/nonexistent", "NO_PROXY": "127.0.0.1"}
    repos = "a/good b/stock c/none"
    run = script("inspect_bundle", "--repo", repos, "--patience", 0, env={**os.environ, **env})
    table = run.stdout[run.stdout.index("| bundle |") :].splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| a/good", "| b/stock", "| c/none"]
    assert table[2].endswith("| none |")
    assert "experts affine 5.00; shared, attention, embedding affine 9.00; head BF16" in table[2]
    assert "stock-experts" in table[3]
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: b/stock, c/none: found faults in 2")


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_good_bundle_passes_and_only_headers_are_read(hub, good):
    files = contents(good)
    hub.add(REPO, files)
    run = inspect(hub)
    assert (run.returncode, run.stderr) == (0, "")
    assert "yes vMLX 1.6.81" in run.stdout
    assert "yes mlx-vlm 0.7.10" in run.stdout
    texts = sum(len(d) for n, d in files.items() if n.endswith((".json", ".py", ".jinja")))
    shards = [d for n, d in files.items() if n.endswith(".safetensors")]
    sent = sum(r.sent for r in hub.asked("resolve|^[0-9a-f]{64}/"))
    assert sent == texts + sum(min(len(d), max(64 << 10, header_bytes(d))) for d in shards)
    assert sent < sum(map(len, files.values())) / 4
    assert f"{sent:,} bytes of it read" in run.stdout


def test_a_stock_bundle_is_named_with_its_cure(hub, stock):
    hub.add(REPO, contents(stock))
    run = inspect(hub)
    assert run.returncode == 1
    assert "error: stock-experts" in run.stdout
    assert "no  vMLX 1.3.97, loader patched: stock-experts" in run.stdout
    last = run.stderr.strip().splitlines()
    assert len(last) == 1
    assert last[0].startswith(f"error: {REPO}: found stock-experts, ")
    assert "repair it by: make repair SOURCE=… (it needs the FP4 source)" in last[0]


def test_each_runtime_is_judged_by_what_it_needs(hub, good):
    files = contents(good)
    jang = json.loads(files["jang_config.json"])
    del jang["quantization"]
    config = json.loads(files["config.json"])
    config["eos_token_id"] = 1
    del files["encoding/encoding_dsv4.py"]
    changed = {"jang_config.json": jang, "config.json": config}
    hub.add(REPO, files | {n: json.dumps(c).encode() for n, c in changed.items()})
    out = inspect(hub).stdout
    assert "no  vMLX 1.3.97, loader patched: stop tokens in config.json 1" in out
    missing = "no encoding/encoding_dsv4.py; jang_config.json: group_size None"
    assert f"no  vMLX 1.6.81: {missing}" in out
    assert "yes mlx-lm 0.32.2" in out


def test_a_missing_shard_cannot_be_mended(hub, good):
    files = contents(good)
    shard = next(n for n in sorted(files) if n.endswith(".safetensors"))
    hub.add(REPO, {n: d for n, d in files.items() if n != shard})
    run = inspect(hub)
    assert run.returncode == 1
    assert "not repairable by make repair" in run.stderr
    assert "shard-missing" in run.stderr


def test_a_cut_shard_is_found_by_its_length(hub, good):
    files = contents(good)
    shard = next(n for n in sorted(files) if n.endswith(".safetensors"))
    hub.add(REPO, files | {shard: files[shard][:-1]})
    assert f"{shard}: found" in inspect(hub).stdout


def test_a_tensor_that_the_source_has_is_missed(hub, good, source):
    files = contents(good)
    index = json.loads(files["model.safetensors.index.json"])
    shard = index["weight_map"].pop("norm.weight")
    data = files[shard].replace(b'"norm.weight"', b'"morn.weight"')
    index["weight_map"]["morn.weight"] = shard
    hub.add(REPO, files | {shard: data, "model.safetensors.index.json": json.dumps(index).encode()})
    hub.add("them/source", contents(source))
    out = inspect(hub, "--against", "them/source").stdout
    assert "error: tensor-missing (1×)" in out
    assert "error: tensor-extra (1×)" in out


def test_a_long_header_takes_a_second_request(hub, good):
    files = contents(good)
    shard = next(n for n in sorted(files) if n.endswith(".safetensors"))
    old = files[shard]
    length = header_bytes(old) - 8
    padded = old[8 : 8 + length] + b" " * 300_000
    files[shard] = len(padded).to_bytes(8, "little") + padded + old[8 + length :]
    hub.add(REPO, files)
    assert inspect(hub).returncode == 0
    assert len([r for r in hub.asked(shard) if r.store]) == 2


def test_a_header_that_claims_gigabytes_is_not_followed(hub, good):
    files = contents(good)
    shard = next(n for n in sorted(files) if n.endswith(".safetensors"))
    hub.add(REPO, files | {shard: (1 << 40).to_bytes(8, "little") + files[shard][8:]})
    run = inspect(hub)
    assert run.returncode == 1
    assert "error: shard-broken" in run.stdout
    assert len([r for r in hub.asked(shard) if r.store]) == 1


def test_a_server_without_ranges_is_not_read_to_the_end(hub, good):
    hub.add(REPO, contents(good))
    hub.faults.append(Fault(".", no_range=True))
    assert inspect(hub).returncode == 0


def test_a_private_bundle_is_read_with_the_users_login(hub, good):
    hub.add(REPO, contents(good), private=True)
    run = inspect(hub)
    assert run.returncode == 1
    assert re.fullmatch(r"error: hub: .*and no login.*\n", run.stderr)
    assert inspect(hub, token=TOKEN).returncode == 0


def test_no_bundle_at_all_has_one_clear_line(hub):
    hub.add(REPO, {"README.md": b"hello"})
    run = inspect(hub)
    assert run.returncode == 1
    assert "config-broken" in run.stderr
