"""Bundles of any maker: recognised by their names, compared number by number, faults named.

Specimens are made of the nano by mlx-vlm's, mlx_lm's and jang's own converters. The layouts of
tools that are no packages (branches of mlx-lm, mlx-serve, oMLX, Thump604) are those specimens under
other names, by the table that is tested; their real bundles were not at hand.

Catches: a right bundle of another tool that fails; a wrong number, label or name of one that
passes; advice to delete what somebody else made.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import bundles
import numpy as np
import pytest
from bundles import Arrays, edit, edit_json, places
from conftest import NANO, ROOT, SCRIPTS, kept, made_once, must

from dsv4.acceptance import nano
from dsv4.model.load import open_bundle
from dsv4.model.naming_schemes import SCHEMES, has_name, recognize_scheme
from dsv4.model.source import open_source
from dsv4.model.storage_view import build_view
from dsv4.repair.context import RepairContext, RepairOptions
from dsv4.repair.engine import repair_bundle, undo_repair
from dsv4.storage.backup import Backup
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Shard, Tensor
from dsv4.verification.checks.headers import describe_layout
from dsv4.verification.checks.loading import write_headers_only
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.report.finding_types import FAULTS
from dsv4.verification.report.findings import Findings
from dsv4.verification.report.summary import summary_row
from dsv4.verification.scan import scan

PYTHON = ROOT / ".toolchain/new/bin/python"
# What a specimen depends on beside this machine.
MAKERS = (NANO, *(SCRIPTS / name for name in (
    "stacks/new.txt", "lab/specimens.py", "lab/upstream.py", "lab/locations.py",
    "dsv4/toolchain/python_env.py", "dsv4/toolchain/hide_torchvision.py",
)))  # fmt: skip
# Specimens, and those that follow from one by the table: layout → the specimen it is made of.
MADE = ("vlm-affine8", "jang-affine2", "jangtq-2", "jang-native", "lm-affine4")
LAYOUT_OF = {
    "vlm-affine8": "mlx-vlm", "jang-affine2": "storage names",
    "jangtq-2": "jang, prestacked", "jang-native": "jang, native",
    "lm-affine4": "mlx_lm, jang's model",
}  # fmt: skip
RELAID = (
    "jang, prestacked", "mlx-serve", "mlx-lm, attn_hc", "mlx-lm, hc_attn", "mlx-lm, wo_a split",
    "oMLX", "Thump604, hc_attn", "Thump604, attn_hc",
)  # fmt: skip
# Specimens that no other test needs; making one takes longer than judging it.
LATER = ("jang-native", "lm-affine4")
WITH_MTP = {"oMLX": "jang-affine2"}  # which the other layouts' specimen has not
# Of how a conversation is led; nothing that logits would show.
STEERING = ("eos-", "chat-", "tokenizer-", "encoding-", "generation-", "special-", "jang-config-",
            "answer-limit", "sampling-differs")  # fmt: skip


def marked(name: str, *more: str) -> object:
    """Return a case of pytest, left to test-full if its specimen is one of LATER."""
    return pytest.param(name, *more, marks=pytest.mark.full if name in LATER else [])


@pytest.fixture(scope="session")
def specimen(tmp_path_factory) -> Callable[[str], Path]:
    """name → a bundle that a real tool made, or one of those under another layout's names."""

    def make(name: str) -> Path:
        if name in RELAID:
            return made_once(
                tmp_path_factory,
                name.replace(" ", "-"),
                lambda folder: bundles.relaid(
                    make(WITH_MTP.get(name, "vlm-affine8")), folder, name
                ),
            )
        out = kept(f"specimen-{name}", lambda folder: tool(name, folder), MAKERS)
        return out / name

    return make


def tool(name: str, folder: Path) -> None:
    must("lab/specimens", "--out", folder, "--python", PYTHON, name)


def judge(folder: Path, level: int = 2) -> set[str]:
    """The errors that verify finds against the nano, but for what steers a conversation."""
    found = bundles.judge(folder, NANO, level=level)
    return {f.name for f in found.errors if not f.name.startswith(STEERING)}


# --- Right bundles ------------------------------------------------------------------------------

# What is wrong with what these tools make: jang's labels have storage names alone, where mlx_lm
# does not look, and its top level says 2 bits; native drops the compressor; jang's BF16 bundle,
# which mlx_lm's is made of, has rounded its controls and the hash table.
WRONG = {
    "jang-affine2": {"label-missing", "label-bits-wrong"},
    "jang-native": {"tensor-missing", "not-compared"},
    "lm-affine4": {"controls-rounded", "dtype-wrong", "control-differs", "passthrough-differs"},
}


@pytest.mark.parametrize("name", [marked(name) for name in (*MADE, *RELAID)])
def test_a_bundle_of_another_maker_is_judged_by_its_numbers(specimen, name):
    folder = specimen(name)
    view = build_view(open_bundle(folder))
    assert view.recognized.scheme.name == LAYOUT_OF.get(name, name)
    assert not view.recognized.unknown
    assert not view.recognized.others
    assert judge(folder) == WRONG.get(name, set())


@pytest.fixture(params=["MTP", "DSpark"])
def names(request) -> list[str]:
    """The weights of a source."""
    folder = NANO if request.param == "MTP" else request.getfixturevalue("dspark")
    return [name for name in open_source(folder).tensors if not name.endswith(".scale")]


def test_every_line_of_every_table_leads_there_and_back(names):
    for layout in SCHEMES.values():
        for name in names:
            disk = layout.runtime_name(name)
            if disk is not None:
                place = layout.locate(disk.replace(".G.", ".1."))
                expert = re.search(r"experts\.(\d+)", name)
                assert place.name.replace(".E.", f".{expert and expert[1]}.") == name


def test_a_layout_is_told_by_its_names_alone(names):
    for layout in SCHEMES.values():
        mine = {(layout.runtime_name(name) or "").replace(".G.", ".0.") for name in names} - {""}
        told = recognize_scheme(mine)
        assert not told.unknown, layout.name
        assert told.known == len(mine)
        assert told.scheme.name == layout.name or "oMLX" in layout.name  # by MTP's stages alone


def test_names_and_stacks_beyond_any_model_are_not_followed():
    told = recognize_scheme([f"layers.{'a' * i}.odd" for i in range(3000)])
    assert len(told.unknown) == 3000
    path = "language_model.model.layers.0.ffn.switch_mlp.up_proj.weight"
    stack = Tensor(path, "U32", (10**9, 1, 1), Path("x"), 0, 4 * 10**9)
    shard = Shard(Path("x"), {path: stack}, {}, 0)
    view = build_view(Checkpoint(Path(), {}, {path: "x"}, {"x": shard}))
    assert not view.tensors
    assert "no stack of experts" in view.odd[path]


def test_what_is_left_out_is_a_note(specimen):
    findings = Findings()
    bundle = scan(specimen("vlm-affine8"), findings)
    assert "MTP left out" in describe_layout(bundle)
    assert "mtp" not in " ".join(bundle.tensors)


def test_a_vision_tower_is_a_note(specimen, tmp_path):
    folder = shutil.copytree(specimen("vlm-affine8"), tmp_path / "bundle")
    edit(folder, lambda a: a.update({"vision_tower.x.weight": ("F32", np.ones(3, np.float32))}))
    assert judge(folder) == set()


def test_a_bundle_of_unknown_names_is_described(specimen, tmp_path):
    folder = shutil.copytree(specimen("vlm-affine8"), tmp_path / "bundle")
    edit(folder, lambda a: [a.update({f"odd.{n}": a.pop(n)}) for n in list(a)])
    found = bundles.judge(folder, NANO, level=1)
    assert "odd.language_model" in places(found, "layout-unknown")
    assert "the nearest, " in places(found, "layout-unknown")


def test_no_advice_deletes_what_somebody_else_made():
    findings = Findings()
    for storage in (True, False):
        findings.storage = storage
        for name in FAULTS:
            findings.add(name, "", "", "")
        assert not [f.name for f in findings if "delete" in f.repair]
    findings.ours = True
    assert [f for f in findings if "delete" in f.repair]


def test_a_pruned_layer_has_as_many_experts_as_its_router(specimen, tmp_path):
    folder = shutil.copytree(specimen("vlm-affine8"), tmp_path / "bundle")
    edit(folder, lambda a: prune(a, 2, [0, 2, 3, 5, 6, 7]))
    assert judge(folder) == set()
    edit(folder, lambda a: swapped(a, ".2."))
    assert judge(folder) == {"expert-differs"}
    edit(folder, lambda a: prune(a, 1, [0, 1, 2], router=False))
    assert "expert-missing" in judge(folder, level=1)


def prune(arrays: Arrays, layer: int, experts: list[int], router: bool = True) -> None:
    """Leave some experts of a layer, with their rows of the router."""
    for name, (dtype, array) in arrays.items():
        mine = f".layers.{layer}.ffn." in name
        routed = ".switch_mlp." in name or (router and ".gate." in name)
        if mine and routed and array.shape[0] == 8:
            arrays[name] = dtype, array[experts]


# --- Planted faults -----------------------------------------------------------------------------


def named(arrays: Arrays, name: str, part: str = "weight") -> str:
    """What a tensor of the source is called in these arrays."""
    told = recognize_scheme(arrays)
    found = [
        disk for disk in arrays
        if (place := told.scheme.locate(disk))
        and place.name.replace(".E.", ".0.") == name and disk.endswith(part)
    ]  # fmt: skip
    return found[0]


def code(arrays: Arrays) -> None:
    """Bits of an expert's codes, which FP4, affine and TurboQuant all have."""
    base = "layers.1.ffn.experts.0.w1"
    turbo = any(name.endswith("tq_packed") and "mtp" not in name for name in arrays)
    part = "tq_packed" if turbo else "weight"
    arrays[named(arrays, f"{base}.{part}", part)][1].reshape(-1).view(np.uint8)[37] ^= 0x44


def scale(arrays: Arrays) -> None:
    part = "scale" if any(name.endswith("wq_a.scale") for name in arrays) else "scales"
    array = arrays[named(arrays, f"layers.2.attn.wq_a.{part}", part)][1]
    array.reshape(-1).view(np.uint8)[array.itemsize - 1] ^= 2


def control(arrays: Arrays) -> None:
    array = arrays[named(arrays, "layers.0.hc_attn_fn", "")][1]
    array.reshape(-1)[5] *= 1.5


def norm(arrays: Arrays) -> None:
    array = arrays[named(arrays, "layers.1.attn_norm.weight")][1]
    array.view(np.uint16).reshape(-1)[3] ^= 1 << 6


def rounded(arrays: Arrays) -> None:
    name = named(arrays, "layers.0.hc_ffn_base", "")
    values = arrays[name][1]
    values = values if values.dtype.kind == "f" else (values.astype(np.uint32) << 16).view("f4")
    arrays[name] = "F16", values.astype(np.float16)


def dropped(arrays: Arrays) -> None:
    del arrays[named(arrays, "norm.weight")]


def extra(arrays: Arrays) -> None:
    arrays["model.layers.0.attn.unheard_of"] = "F32", np.ones(3, np.float32)


def mixed(arrays: Arrays) -> None:
    """A norm under the names of a layout that this one is not."""
    old = named(arrays, "layers.2.ffn_norm.weight")
    ways = (layout.runtime_name("layers.2.ffn_norm.weight") for layout in SCHEMES.values())
    told = recognize_scheme(arrays).scheme
    new = next(way for way in ways if way != old and not has_name(told, way))
    arrays[new] = arrays.pop(old)


def swapped(arrays: Arrays, layer: str = ".1.") -> None:
    """Two experts change places."""
    for name in list(arrays):
        array = arrays[name][1]
        if "switch_mlp" in name or re.search(r"ffn\.experts\.w", name):
            if array.shape[0] > 4 and layer in name:
                array[[2, 3]] = array[[3, 2]]
        elif found := re.fullmatch(r"(.*layers\.1\..*experts\.)2(\..*)", name):
            other = f"{found[1]}3{found[2]}"
            arrays[name], arrays[other] = arrays[other], arrays[name]


FAULTY: dict[str, tuple[Callable[[Arrays], object], set[str]]] = {
    "code": (code, {"expert-differs", "expert-level-wrong", "expert-beyond-bound"}),
    "scale": (scale, {"module-differs"}),
    "control": (control, {"control-differs"}),
    "norm": (norm, {"passthrough-differs"}),
    "rounded": (rounded, {"controls-rounded"}),
    "dropped": (dropped, {"tensor-missing"}),
    "extra": (extra, {"tensor-extra"}),
    "mixed": (mixed, {"layout-mixed"}),
    "swapped": (swapped, {"expert-differs", "expert-level-wrong"}),
}


PLANTED = [(name, fault) for name in MADE for fault in FAULTY]
PLANTED += [(n, f) for n in RELAID for f in ("code", "scale", "dropped", "mixed", "swapped")]


@pytest.mark.parametrize(("name", "fault"), [marked(*one) for one in PLANTED])
def test_a_planted_fault_is_named(specimen, tmp_path, name, fault):
    change, names = FAULTY[fault]
    folder = shutil.copytree(specimen(name), tmp_path / "bundle")
    before = judge(folder) if name in WRONG else set()
    edit(folder, change)
    assert (judge(folder) - before) & names or before >= names


LABELS = {
    "vlm-affine8": "language_model.model.layers.1.ffn.switch_mlp.up_proj",
    "mlx-lm, hc_attn": "model.layers.1.ffn.switch_mlp.up_proj",
    "mlx-serve": "layers.1.ffn.experts.w3",
    "Thump604, attn_hc": "model.layers.1.mlp.switch_mlp.up_proj",
    "mlx-lm, wo_a split": "model.layers.0.attn.wo_a",
    "jang-affine2": "layers.0.attn.wkv",
}


@pytest.mark.parametrize("part", ["bits", "mode", "group_size", "all"])
@pytest.mark.parametrize("name", LABELS)
def test_a_label_that_is_not_the_tensors_is_named(specimen, tmp_path, name, part):
    folder = shutil.copytree(specimen(name), tmp_path / "bundle")
    wrong = {"bits": 6, "mode": "nvfp4", "group_size": 128}

    def change(config: dict) -> None:
        for key in ("quantization", "quantization_config"):
            labels = config.get(key) or {}
            if part == "all":
                labels.pop(LABELS[name], None)
            elif LABELS[name] in labels:
                labels[LABELS[name]][part] = wrong[part]

    edit_json(folder / "config.json", change)
    assert {name for name in judge(folder, level=1) if "label" in name}


# --- What the runtimes themselves make of them --------------------------------------------------

ASK = """
import sys, json, numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/lab"]
import logits
logits.hide()
from pathlib import Path
prompts = json.loads(sys.argv[2])
for how, folder, out in json.loads(sys.argv[3]):
    try:
        model = logits.HOW[how](Path(folder))
        np.save(out, np.concatenate([model.rows(ids, 0)[-1:] for ids in prompts]))
    except Exception as error:
        print(folder, how, type(error).__name__, file=sys.stderr)
from dsv4.verification.checks.loader_replay import replay_loaders
for folder, out in json.loads(sys.argv[4]):
    Path(out).write_text(json.dumps(replay_loaders(Path(folder), ["mlx-vlm"])["mlx-vlm"]))
"""


@pytest.mark.full
def test_the_verdict_is_what_the_runtimes_own_logits_say(specimen, tmp_path):
    """Right by verify: near the source. Wrong by verify: refused, or far from it."""
    right = specimen("vlm-affine8")
    swap = shutil.copytree(right, tmp_path / "swapped")
    edit(swap, swapped)
    label = shutil.copytree(right, tmp_path / "label")
    edit_json(label / "config.json", lambda c: wrong_label(c))
    affine2 = specimen("jang-affine2")
    cases = [
        ("source", NANO), ("mlx-vlm", right), ("mlx-vlm", swap), ("mlx-vlm", label),
        ("loader", affine2), ("loader", right), ("mlx-vlm", specimen("mlx-lm, hc_attn")),
    ]  # fmt: skip
    ids = nano.token_prompts(NANO, nano.held_out(NANO, 8))
    asked = [
        (how, str(folder), str(tmp_path / f"{i}.npy")) for i, (how, folder) in enumerate(cases)
    ]
    headers = [hollowed(cases[i][1], tmp_path / f"{i}.hollow") for i in (1, 3, 6)]
    subprocess.run(
        [PYTHON, "-c", ASK, SCRIPTS, json.dumps(ids), json.dumps(asked), json.dumps(headers)],
        check=True, capture_output=True, env={"HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"},
    )  # fmt: skip
    got = [np.load(out) if Path(out).is_file() else None for _, _, out in asked]
    far = [None if x is None else nano.compare(x, got[0]).distance for x in got]
    assert far[1] < 0.05
    assert judge(right) == set()
    assert far[2] > 0.05
    assert "expert-differs" in judge(swap)
    assert far[3] is None or far[3] > 0.05
    assert "label-mode-wrong" in judge(label)
    assert far[4] < 0.5  # two bits; a wrong decoding is beyond 1
    assert judge(affine2) == WRONG["jang-affine2"]  # for mlx_lm, not for vMLX
    assert far[5] is far[6] is None
    given = [json.loads(Path(out).read_text()) for _, out in headers]  # by mlx-vlm's loader
    assert given[0] == {"parameters": 123, "unfed": [], "unused": [], "misfit": []}
    assert any("down_proj.scales" in name for name, *_ in given[1]["misfit"])
    assert any("hc_attn" in name for name in given[2]["unused"])
    loads = runtime_verdicts(scan(right, Findings()), Findings())
    assert "does not load" in loads["vMLX 1.6.81"]
    assert not loads["mlx-vlm 0.7.10"]
    loads = runtime_verdicts(scan(affine2, Findings()), Findings())
    assert not loads["vMLX 1.6.81"]
    assert "no right label" in loads["mlx-lm 0.32.2 with jang 2.5.50's model"]


def test_vmlx_does_not_load_what_says_turboquant_and_is_none(specimen, tmp_path):
    folder = shutil.copytree(specimen("jang-affine2"), tmp_path / "bundle")
    edit_json(folder / "jang_config.json", lambda c: c.update(weight_format="mxtq"))
    loads = runtime_verdicts(scan(folder, Findings()), Findings())
    assert "says TurboQuant" in loads["vMLX 1.6.81"]


def hollowed(bundle: Path, folder: Path) -> tuple[str, str]:
    """(a folder with the bundle's headers alone, where the loader's answer goes)."""
    folder.mkdir()
    write_headers_only(scan(bundle, Findings()), folder)
    return f"{folder}", f"{folder}.json"


def wrong_label(config: dict) -> None:
    for key in ("quantization", "quantization_config"):
        for layer in range(3):
            name = f"language_model.model.layers.{layer}.ffn.switch_mlp.down_proj"
            config[key][name] = {"group_size": 32, "bits": 4, "mode": "affine"}


# --- Repair, and the row of inspect -------------------------------------------------------------


def mended(folder: Path) -> list[str]:
    """Let repair's own steps mend a bundle; returns what they left."""
    options = RepairOptions(folder, NANO, quantizer="mlx", without_loader=True, python=PYTHON)
    repair = RepairContext(options, open_source(NANO), Backup(folder))
    repair_bundle(repair)
    return repair.left


def test_controls_of_another_layout_are_not_written_without_room(specimen, tmp_path, monkeypatch):
    folder = shutil.copytree(specimen("vlm-affine8"), tmp_path / "bundle")
    edit(folder, rounded)
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    monkeypatch.setattr("dsv4.storage.disk_space.free_bytes", lambda path: 0)
    assert any("0 bytes free" in line for line in mended(folder))
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == before


@pytest.mark.parametrize("name", ["vlm-affine8", "jang-affine2", "jangtq-2", "mlx-lm, hc_attn"])
def test_repair_mends_in_other_layouts_what_it_mends_in_ours(specimen, tmp_path, name):
    folder = shutil.copytree(specimen(name), tmp_path / "bundle")
    edit(folder, rounded)
    edit_json(folder / "config.json", damaged)
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].popitem())
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {"controls-rounded", "index-entry-missing", "eos-wrong"} <= bundles.judge(
        folder, None, level=1
    ).names
    assert mended(folder) == []
    assert bundles.judge(folder, NANO).names <= {"label-stray"}
    undo_repair(folder)
    assert before == {path: path.read_bytes() for path in before}


def damaged(config: dict) -> None:
    config["eos_token_id"] = 7
    for key, label in (config.get("quantization") or {}).items():
        if isinstance(label, dict) and ("up_proj" in key or "wq_a" in key):
            label["bits"] = 6


def test_a_row_says_what_a_bundle_is(specimen):
    findings = Findings()
    bundle = scan(specimen("jangtq-2"), findings)
    cells = summary_row("x/y", 5, bundle, findings)
    assert cells[2:5] == (
        "jang, prestacked",
        "experts mxtq 2.13; shared, attention, embedding, head affine 9.00",
        "vMLX 1.6.81",
    )
