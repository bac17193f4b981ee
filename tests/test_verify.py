"""scripts/verify.py: what it proves, what it says, and when it refuses to pass.

Catches: a level that looks at nothing, a kernel that disagrees with MLX, a flipped bit that some
tensor's comparison does not see, a report that does not say how to repair.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import bundles
import mlx.core as mx
import numpy as np
import pytest
from conftest import SCRIPTS, must, refusal, script

from dsv4.errors import UserError
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.quantization.formats import get_quantizer
from dsv4.quantization.fp4 import E2M1
from dsv4.storage import tensor_reader
from dsv4.toolchain import patches
from dsv4.verification.checks import check_all, conversation, documents
from dsv4.verification.numbers import affine, aggregate, case_table, compare, compare_all, kernels
from dsv4.verification.numbers.tolerances import MLX
from dsv4.verification.report.finding_types import FAULTS
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan


@pytest.fixture(scope="module")
def elsewhere(good, tmp_path_factory):
    """The good bundle as another tool would have made it: without the requantizer's marks."""
    return bundles.split(good, tmp_path_factory.mktemp("elsewhere") / "bundle", marks=False)


# --- The whole command --------------------------------------------------------------------------


def test_a_good_bundle_passes_and_the_report_counts(good, source, tmp_path):
    out = tmp_path / "folder" / "verify.json"
    said = must("verify", "--bundle", good, "--source", source, "--json", out)
    assert "passed: everything that was asked for was checked and holds\n" in said
    assert "98,304 of 98,304 groups byte for byte as expected" in said
    assert "24 routed-expert matrices in MTP layers" in said
    result = json.loads(out.read_text())
    assert (result["verdict"], result["findings"], result["levels"]) == ("passed", [], [1, 2])
    assert result["quantizer"]["requantize_quantizer"] == "mlx"
    cells = {(c["block"], c["layer"], c["projection"]) for c in result["errors"]["experts"]}
    assert len(cells) == (4 + 1) * 3
    assert all(0.05 < c["relative_rms"] < 0.12 for c in result["errors"]["experts"])
    assert set(result["hashes"]) == {
        path.relative_to(good).as_posix() for path in good.rglob("*") if path.is_file()
    }
    assert result["hashes"]["config.json"] == compare_all.sha256(good / "config.json")
    assert result["versions"]["mlx"]


def test_a_stock_bundle_fails_by_name_and_says_what_repairs_it(stock, source):
    result = script("verify", "--bundle", stock, "--source", source, "--level", 1)
    assert result.returncode == 1
    assert "error: stock-experts (120×)" in result.stderr
    assert "repair: make repair SOURCE=…" in result.stderr
    assert (
        "mlx_lm: model.layers.0.mlp.switch_mlp.down_proj.biases: found no tensor" in result.stderr
    )
    assert "Traceback" not in result.stderr


def test_without_a_source_level_two_still_reads_everything(good):
    said = must("verify", "--bundle", good, "--without-loader")
    assert "numbers without NaN or Inf" in said
    assert "but the loaders were not run" in said


def test_hashes_come_at_level_one_when_asked(good, tmp_path):
    out = tmp_path / "verify.json"
    must("verify", "--bundle", good, "--without-loader", "--level", 1, "--json", out)
    assert json.loads(out.read_text())["hashes"] == {}
    must("verify", "--bundle", good, "--without-loader", "--level", 1, "--hashes", "--json", out)
    assert json.loads(out.read_text())["hashes"]["config.json"]


def test_a_python_without_the_toolchain_is_a_failure_not_a_pass(good, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S -I "$@"\n')
    bare.chmod(0o755)
    result = script("verify", "--bundle", good, "--level", 1, "--python", bare)
    assert result.returncode == 1
    assert "error: loader-not-checked" in result.stderr


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    assert "no such folder" in refusal("verify", "--bundle", tmp_path / "nowhere")


def test_an_empty_folder_is_a_failure(tmp_path):
    result = script("verify", "--bundle", tmp_path, "--without-loader")
    assert result.returncode == 1
    assert "FAILED: config-broken" in result.stderr


def test_help_names_every_level():
    command = [sys.executable, SCRIPTS / "verify.py", "--help"]
    assert "--level {1,2}" in subprocess.run(command, capture_output=True, text=True).stdout


# --- Signatures of known failures, without a source ---------------------------------------------


def test_zero_filled_experts_are_seen_without_a_source(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bundle")

    def change(arrays):
        for part in ("weight", "scales", "biases"):
            arrays[f"layers.0.ffn.experts.0.w1.{part}"][1][...] = 0

    bundles.edit(folder, change)
    findings = bundles.judge(folder, None)
    assert "experts-zero" in findings.names
    assert "layers.0.ffn.experts.0.w1" in bundles.places(findings, "experts-zero")


def test_nan_is_seen_without_a_source(good_copy):
    bundles.write_numbers(good_copy, "layers.0.ffn.experts.0.w1.scales", 7, [float("nan")])
    findings = bundles.judge(good_copy, None)
    assert "element [0, 7]" in bundles.places(findings, "nan-or-inf")


def test_the_stock_bundle_is_told_without_a_source(stock):
    named = bundles.judge(stock, None, level=1).names
    assert {"stock-experts", "controls-rounded", "label-missing", "eos-wrong"} <= named


def test_every_fault_has_a_reason_and_a_repair():
    for name, fault in FAULTS.items():
        assert fault.why.endswith("."), name
        assert fault.repair, name


# --- The loaders --------------------------------------------------------------------------------


def test_the_loaders_show_what_a_wrong_label_does(good_copy):
    gate = "model.layers.0.mlp.switch_mlp.gate_proj"
    bundles.edit_json(
        good_copy / "config.json", lambda config: config["quantization"][gate].update(bits=8)
    )
    findings = bundles.judge(good_copy, None, loader=True, level=1)
    said = bundles.places(findings, "loader-parameter-misfit")
    assert f"mlx_lm: {gate}.weight packed [8, 128, 32] packed [8, 128, 64]" in said


def test_an_unpatched_loader_is_told_by_what_it_does(good, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "dsv4.verification.checks.loading.loader_states",
        lambda python: {"jang_tools/load_jangtq.py": "pristine"},
    )
    findings = bundles.judge(good, None, loader=True, level=1)
    assert findings.names == {"loader-unpatched"}
    assert [finding.repair for finding in findings] == ["make patch_loader"]


def test_a_missing_expert_makes_the_loader_fail(good_copy):
    def change(arrays):
        del arrays["layers.1.ffn.experts.3.w1.weight"]

    bundles.edit(good_copy, change)
    findings = bundles.judge(good_copy, None, loader=True, level=1)
    assert "Expert stacking failed" in bundles.places(findings, "loader-fails")


@pytest.mark.parametrize("which", ["good", "stock"])
def test_what_an_unpatched_loader_drops_is_what_upstreams_function_drops(which, request):
    folder = request.getfixturevalue(which)
    opened = scan(folder, Findings())
    config = json.loads(json.dumps(opened.config))
    pristine_loader()["_patch_quant_config_inplace"](folder, config)
    lost = opened.config["quantization"].keys() - config["quantization"].keys()
    assert documents.dropped_by_unpatched_loader(opened) == len(lost)
    assert lost


def pristine_loader() -> dict:
    """The names of the installed load_jangtq.py as it was published, whatever was patched since."""
    patch = patches.read_patch(patches.PATCHES / "load_jangtq.patch")
    installed = importlib.util.find_spec("jang_tools.load_jangtq")
    text = Path(installed.origin).read_text()
    if patches.patch_state(text, patch) == "patched":
        text = patches.apply_hunks(text, [hunk.reversed for hunk in patch.hunks])
    names: dict = {"__name__": "pristine"}
    exec(compile(text, "load_jangtq.py", "exec"), names)
    return names


# --- Level 2 sees every tensor ------------------------------------------------------------------


@pytest.mark.parametrize("marks", [True, False], ids=["ours", "elsewhere"])
def test_a_flipped_bit_in_every_tensor_is_seen_in_every_tensor(
    good, elsewhere, source, marks, tmp_path
):
    folder = shutil.copytree(good if marks else elsewhere, tmp_path / "bundle")
    rng = np.random.default_rng(marks)
    parts: dict[str, list[str]] = {}
    for name in open_bundle(folder).tensors:
        base = name.rpartition(".")[0] if name.endswith(("weight", "scales", "biases")) else name
        parts.setdefault(base, []).append(name)
    for names in parts.values():
        tensor = open_bundle(folder).tensors[rng.choice(names)]
        bundles.flip(folder, tensor.name, int(rng.integers(tensor.nbytes)), int(rng.integers(8)))
    findings = Findings()
    opened, origin = scan(folder, findings), open_source(source)
    read = compare_all.read_numbers(opened, origin, 2, lambda done: None)
    places = [o.faults + o.wrong_places + o.explained_places for o in read.results]
    assert [o.name for o, seen in zip(read.results, places, strict=True) if not seen] == []
    assert len(read.results) == len(parts)
    aggregate.aggregate(read, findings)
    assert {"expert-differs", "module-differs", "control-differs"} <= findings.names


def test_a_bundle_from_elsewhere_is_held_to_mlx_formula(elsewhere, source):
    findings = Findings()
    opened, origin = scan(elsewhere, findings), open_source(source)
    read = compare_all.read_numbers(opened, origin, 2, lambda done: None)
    experts = [o for o in read.results if o.what == "expert"]
    assert all(o.exact == o.groups and not o.recomputed for o in experts)
    assert sum(o.fragile for o in experts) > 0
    aggregate.aggregate(read, findings)
    assert not findings.names


@pytest.mark.parametrize("name", ["affine4g32", "mxfp4", "lossless", "affine5g32"])
def test_every_quantizer_is_held_to_its_own_promise(name, stock, source, tmp_path):
    folder = shutil.copytree(stock, tmp_path / "bundle")
    must("requantize", "--source", source, "--bundle", folder, "--quantizer", name)
    must("patch", "--bundle", folder)
    assert bundles.judge(folder, source).names == set()
    parts = [n for n in open_bundle(folder).tensors if n.startswith("layers.1.ffn.experts.3.w2.")]
    for part in parts:
        bundles.flip(folder, part, 40)
        assert part.rpartition(".")[0] in bundles.places(
            bundles.judge(folder, source), "expert-differs"
        )
        bundles.flip(folder, part, 40)


def test_a_table_that_cannot_be_made_here_is_a_warning_and_bounds_hold(good_copy, source):
    metadata = next(iter(open_bundle(good_copy).shards.values())).metadata
    metadata = {**metadata, "requantize_table": "of another MLX"}
    bundles.save(good_copy, bundles.load(good_copy), 1, metadata)
    findings = bundles.judge(good_copy, source)
    assert (findings.names, findings.errors) == ({"quantizer-unknown"}, [])
    bundles.flip(good_copy, "layers.0.ffn.experts.0.w1.weight", 3, 2)
    assert "expert-level-wrong" in bundles.judge(good_copy, source).names


def test_an_unquantized_head_is_compared_as_what_it_is(good, source, tmp_path):
    """mlx-vlm wants the head in BF16, so requantize and convert leave it so."""
    folder = shutil.copytree(good, tmp_path / "bundle")
    assert bundles.judge(folder, source).names == set()
    bundles.flip(folder, "head.weight", 5)
    assert "element [0, 2]" in bundles.places(bundles.judge(folder, source), "module-differs")


def test_a_source_tensor_that_was_not_compared_is_named(good, source, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bundle")
    bundles.edit(folder, lambda arrays: arrays.pop("norm.weight"))
    assert "norm.weight" in bundles.places(bundles.judge(folder, source), "not-compared")


def test_a_name_of_another_layout_is_named_with_it(good_copy):
    def change(arrays):
        arrays["model.layers.0.mlp.switch_mlp.gate_proj.weight"] = arrays.pop("norm.weight")

    bundles.edit(good_copy, change)
    found = bundles.judge(good_copy, None, level=1)
    said = bundles.places(found, "layout-mixed")
    assert "model.layers.0.mlp.switch_mlp.gate_proj.weight, as " in said


def test_a_read_beyond_the_end_of_a_file_stops(good_copy):
    tensor = open_bundle(good_copy).tensors["norm.weight"]
    tensor.path.write_bytes(tensor.path.read_bytes()[: tensor.offset])
    with pytest.raises(UserError, match="its end"):
        tensor_reader.TensorReader().read(tensor)


def test_hidden_files_are_no_part_of_a_bundle():
    files = ["config.json", ".DS_Store", ".cache/x", "encoding/__pycache__/a.pyc", "encoding/a.py"]
    assert compare_all.visible_files(files) == ["config.json", "encoding/a.py"]


# --- The kernels --------------------------------------------------------------------------------


def quantized(values: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """What mx.quantize gives on the CPU: levels, and scales and biases rounded to F16."""
    packed, scales, biases = mx.quantize(
        mx.array(values), group_size=32, bits=bits, mode="affine", stream=mx.cpu
    )
    levels = np.empty(values.size, np.uint8)
    kernels.unpack(np.array(packed).view(np.uint8).reshape(-1), bits, levels)
    halves = [np.array(part).astype(np.float16).astype(np.float32) for part in (scales, biases)]
    return levels, halves[0].reshape(-1), halves[1].reshape(-1)


def weights(rng: np.random.Generator) -> np.ndarray:
    """Rows of every kind: two-sided, one-sided, all zero, tiny, one large among small."""
    values = rng.standard_normal((96, 256)).astype(np.float32) * 0.03
    values[:8], values[8:16], values[16] = abs(values[:8]), -abs(values[8:16]), 0
    values[17:20] *= 1e-7
    values[20:24, ::40] = 1
    values[24:60] = E2M1[rng.integers(0, 16, (36, 256))] * 0.125
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_formula_is_what_mlx_gives(bits):
    values = weights(np.random.default_rng(bits))
    levels, scales, biases = quantized(values, bits)
    counts = kernels.check_formula(
        values.reshape(-1), levels, scales, biases, bits, *kernels.ROUNDING["F16"]
    )
    assert counts[kernels.EXACT] == len(scales)
    assert counts[kernels.WRONG] == counts[kernels.EXPLAINED] == 0


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_mlx_keeps_within_the_bounds(bits):
    values = weights(np.random.default_rng(bits))
    levels, scales, biases = quantized(values, bits)
    counts, energy, error, worst = kernels.check_bounds(
        values.reshape(-1), levels, scales, biases, bits, *kernels.ROUNDING["F16"]
    )
    decoded = levels * scales.repeat(32) + biases.repeat(32)
    assert (
        counts[kernels.NOT_NEAREST] == counts[kernels.LOST_ZEROS] == counts[kernels.BAD_NUMBER] == 0
    )
    assert worst <= 1.001
    assert energy == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-5)
    assert error == pytest.approx(((decoded - values.reshape(-1)) ** 2).sum(), rel=1e-3)


def test_a_group_that_starts_its_maximum_at_zero_is_explained_not_wrong():
    """MLX's Metal and CUDA kernels do, so all-negative groups differ from its CPU code."""
    values = np.full(32, -1, np.float32)
    values[1::2] = -0.5
    levels, scales, biases = quantized(np.append(values[:31], 0).reshape(1, 32), 4)
    levels[31] = levels[1]
    counts = kernels.check_formula(values, levels, scales, biases, 4, *kernels.ROUNDING["F16"])
    assert (counts[kernels.EXACT], counts[kernels.EXPLAINED], counts[kernels.WRONG]) == (0, 1, 0)


def test_decoding_fp4_agrees_with_the_plain_one():
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, (5, 32), dtype=np.uint8)
    exponents = rng.integers(0, 255, (5, 2), dtype=np.uint8)
    values = np.empty(5 * 64, np.float32)
    kernels.decode_fp4(codes.reshape(-1), exponents.reshape(-1), values)
    pairs = np.stack([codes & 15, codes >> 4], -1).reshape(5, 2, 32)
    with np.errstate(over="ignore"):
        plain = E2M1[pairs] * np.ldexp(np.float32(1), exponents.astype(int) - 127)[..., None]
    assert np.array_equal(values, plain.reshape(-1).astype(np.float32))


def test_zeros_are_counted_as_decoding_counts_them():
    packed = np.random.default_rng(11).integers(0, 256, 4096, np.uint8)
    codes = np.stack([packed & 15, packed >> 4])
    assert case_table.count_zeros(packed.view(np.int64)) == (E2M1[codes] == 0).sum()


def test_every_case_of_a_table_is_judged():
    cases = case_table.check_cases(get_quantizer("mlx"), MLX)
    good, worst = cases.holds, cases.worst
    assert good[105:141].all()
    assert not good[[150, 255]].any()  # beyond what F16 can hold
    assert 0.9 < worst <= 1


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_quantizer_with_one_wrong_case_is_not_certified(part):
    """Greatest value 6, least -1, exponent 120: one nibble or one last bit is wrong."""
    right = get_quantizer("mlx")

    def encode(packed, exponents, parts):
        tally = right.encode(packed, exponents, parts)
        if exponents[0] == 120:
            parts[part][77 * len(parts[part]) // len(exponents)] ^= 0x40
        return tally

    wrong = dataclasses.replace(right, encode=encode)
    good = case_table.check_cases(wrong, MLX).holds
    assert not good[120]
    assert good[[119, 121]].all()


def test_exact_groups_are_counted_one_by_one():
    """Not a whole run of rows or none of it: half of these groups are zeros."""
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (4000, 16), np.uint8)
    packed[::2] = rng.choice(np.array([0x00, 0x08, 0x80, 0x88], np.uint8), (2000, 16))
    packed, exponents = packed.reshape(-1), rng.integers(110, 130, 4000).astype(np.uint8)
    mlx = get_quantizer("mlx")
    parts = {p: np.empty(4000 * n, np.uint8) for p, n in
             (("weight", 16), ("scales", 2), ("biases", 2))}  # fmt: skip
    mlx.encode(packed, exponents, parts)
    values, levels = np.empty(4000 * 32, np.float32), np.empty(4000 * 32, np.uint8)
    kernels.decode_fp4(packed, exponents, values)
    kernels.unpack(parts["weight"], 4, levels)
    scales, biases = (parts[p].view(np.float16).astype(np.float32) for p in ("scales", "biases"))
    decoded = levels.reshape(-1, 32) * scales[:, None] + biases[:, None]
    exact = (decoded == values.reshape(-1, 32)).all(axis=1).sum()
    cases = case_table.check_cases(mlx, MLX)
    assert case_table.count_exact_groups(packed, exponents, cases.exact_codes) == exact
    assert 2000 <= exact < 4000


def test_comparing_bytes_and_decoding_come_to_the_same_sums(good, source, monkeypatch):
    sums = []
    none = case_table.CheckedCases(np.zeros(256, bool), 0.0, np.zeros((256, 225), np.uint16))
    for check in (case_table.check_cases, lambda *_: none):
        monkeypatch.setattr(affine, "check_cases", check)
        monkeypatch.setattr(compare, "BLOCK_WEIGHTS", 1 << 11)
        bundle = scan(good, Findings())
        done = compare_all.read_numbers(bundle, open_source(source), 2, lambda n: None)
        sums.append([o for o in done.results if o.what == "expert"])
    for fast, slow in zip(*sums, strict=True):
        assert fast.name == slow.name
        for what in (
            "numbers",
            "groups",
            "exact",
            "lossless",
            "zeros",
            "zeros_lost",
            "recomputed",
            "faults",
        ):
            assert getattr(fast, what) == getattr(slow, what), what
        assert fast.energy == pytest.approx(slow.energy, rel=1e-6)
        assert fast.error == pytest.approx(slow.error, rel=1e-3)
        assert slow.worst <= fast.worst <= 1


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_rounding_to_a_dtype_is_numpys(dtype):
    rng = np.random.default_rng(5)
    values = (rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 5, 4000)).astype(np.float32)
    rounded = tensor_reader.as_float32(tensor_reader.round_to_dtype(values, dtype), dtype)
    kernel = [kernels._rounded(float(value), *kernels.ROUNDING[dtype]) for value in values]
    assert np.array_equal(np.array(kernel, np.float32), rounded)


# --- Templates ----------------------------------------------------------------------------------


def test_upstreams_own_template_renders_plain_turns_and_loses_the_rest():
    converter = pytest.importorskip("jang_tools.dsv4.convert_dsv4_jangtq")
    wrong = {
        name
        for _, name, _, _ in conversation.template_faults(converter.DSV4_CHAT_TEMPLATE_JINJA, "")
    }
    assert "a question" not in wrong
    assert {"tools in the system message", "a call, its result, an answer, a question"} <= wrong


def test_a_hostile_template_is_not_run():
    faults = conversation.template_faults("{{ ''.__class__.__mro__[1].__subclasses__() }}", "first")
    assert len(faults) == 30
    assert all("unsafe" in found or "SecurityError" in found for _, _, found, _ in faults)


def test_level_one_takes_headers_alone(good):
    """No file is read: what inspect gets from a hub is enough."""
    findings = Findings()
    opened = scan(good, findings)
    shutil.rmtree  # noqa: B018
    checks = check_all.check_headers(opened, None, findings)
    assert not findings.names
    assert all(check.number for check in checks)
