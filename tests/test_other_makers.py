"""Weights of other makers' quantizers, against the source: no false alarm, and damage still seen.

The makers are this project's own quantizers with the record of their maker gone, and GPTQ, DWQ and
AWQ's clipping as lab/error_bounds.py has them.

Catches: a promise of mx.quantize asked of a quantizer that made none; a bound that lets a wrong
matrix or a gross fault of one group pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import bundles
import error_bounds
import numpy as np
import pytest
from bundles import Arrays
from conftest import made_once
from here import build_bundle, must
from test_readonly import size_for

from dsv4.model.load import open_bundle
from dsv4.model.names import parse_expert
from dsv4.model.source import open_source
from dsv4.storage.checkpoint import SIDECAR
from dsv4.storage.tensor_reader import TensorReader, round_to_dtype
from dsv4.verification.numbers.decode import source_rows
from dsv4.verification.numbers.tolerances import SIZE_BOUNDS

FORMS = ("mlx", "mxfp4", "lossless", "small", "affine2g64", "affine3g128", "affine4g32",
         "turboquant2", "mixture", "mixture-lossless")  # fmt: skip
FORM_OF = {2: "affine2g64", 4: "affine4g32"}


@pytest.fixture(scope="module")
def bundle_of(source, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function form → a right bundle of the source by this project."""

    def make(form: str) -> Path:
        def convert(folder: Path) -> None:
            plan, more = folder.with_suffix(".plan.json"), ()
            if form.startswith("mixture"):
                must("plan", "--source", source, "--plan", plan, "--size", size_for(source, plan))
                more = ("--plan", plan)
            build_bundle(source, folder, "--quantizer", form, *more)

        return made_once(tmp_path_factory, f"makers-{form}", convert)

    return make


def saved_again(bundle: Path, folder: Path, forget: bool = True) -> Path:
    """A copy without the shards' metadata and, with `forget`, without config.json's record."""
    sidecar = (bundle / SIDECAR).read_bytes() if (bundle / SIDECAR).exists() else None
    bundles.split(bundle, folder, marks=False)
    if sidecar:
        (folder / SIDECAR).write_bytes(sidecar)
    if forget:
        bundles.edit_json(folder / "config.json", lambda config: config.pop("requantize"))
    return folder


@pytest.mark.parametrize(
    "forget", [True, pytest.param(False, marks=pytest.mark.full)], ids=["forgotten", "recorded"]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_that_another_tool_saved_again_passes(bundle_of, source, tmp_path, form, forget):
    folder = saved_again(bundle_of(form), tmp_path / "b", forget)
    assert {f.name: f.places for f in bundles.judge(folder, source).errors} == {}


# --- GPTQ, DWQ and AWQ ----------------------------------------------------------------------------


def experts(source: Path) -> dict[str, np.ndarray]:
    """The routed experts of the main layers, decoded."""
    opened, reader, found = open_source(source), TensorReader(), {}
    for name, tensor in opened.tensors.items():
        if parse_expert(name) and name.startswith("layers.") and name.endswith(".weight"):
            out, columns = tensor.shape[0], 2 * tensor.shape[1]
            scale = opened.tensors[name.removesuffix("weight") + "scale"]
            task = SimpleNamespace(
                origin=tensor, scale=scale, what="expert", columns=columns, label=None
            )
            values = source_rows(task, reader, 0, out)[2]
            found[name.removesuffix(".weight")] = values.reshape(out, columns)
    reader.close()
    return found


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """Pack levels (rows, columns), the lowest bit first: uint32 (rows, columns · bits / 32)."""
    every = levels.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(every.reshape(len(levels), -1), axis=1, bitorder="little").view(np.uint32)


QUANTIZERS = {
    "GPTQ": lambda w, bits, group, x: error_bounds.by_gptq(
        w, bits, group, error_bounds.inverse_root(x)
    ),
    "DWQ": error_bounds.by_training,
    "AWQ": error_bounds.by_clipping,
    "symmetric": lambda w, bits, group, x: error_bounds.by_symmetry(w, bits, group),
}


def requantized(bundle: Path, source: Path, folder: Path, maker: str) -> Path:
    """A copy of an affine bundle with its experts by another quantizer, in BF16 as mlx_lm's."""
    saved_again(bundle, folder)
    whole, rng = experts(source), np.random.default_rng(3)
    widths = sorted({w.shape[1] for w in whole.values()})
    inputs = {n: error_bounds.random_inputs(rng, n, 1.5, 0.5) for n in widths}

    def change(arrays: Arrays) -> None:
        for base, w in whole.items():
            groups = arrays[f"{base}.scales"][1].shape[1]
            bits = 32 * arrays[f"{base}.weight"][1].shape[1] // w.shape[1]
            levels, *parts = QUANTIZERS[maker](w, bits, w.shape[1] // groups, inputs[w.shape[1]])
            arrays[f"{base}.weight"] = "U32", pack(levels, bits)
            for part, values in zip(("scales", "biases"), parts, strict=True):
                rounded = round_to_dtype(np.ascontiguousarray(values, np.float32), "BF16")
                arrays[f"{base}.{part}"] = "BF16", rounded.view(np.uint16).reshape(values.shape)

    bundles.edit(folder, change)
    return folder


@pytest.fixture(scope="module")
def foreign(bundle_of, source, tmp_path_factory) -> Callable[[str, int], Path]:
    """(maker, bits) → a bundle with experts by another quantizer."""

    def make(maker: str, bits: int) -> Path:
        return made_once(
            tmp_path_factory, f"foreign-{maker}-{bits}",
            lambda folder: requantized(bundle_of(FORM_OF[bits]), source, folder, maker),
        )  # fmt: skip

    return make


@pytest.mark.parametrize("bits", FORM_OF)
@pytest.mark.parametrize("maker", QUANTIZERS)
def test_weights_of_another_quantizer_pass(foreign, source, maker, bits):
    findings = bundles.judge(foreign(maker, bits), source)
    assert {f.name: f.places for f in findings.errors} == {}
    assert "experts, affine" in bundles.places(findings, "quantizer-unknown")


# --- Damage ---------------------------------------------------------------------------------------

BASE = "layers.1.ffn.experts.2.w3"


def swap(arrays: Arrays, bits: int) -> None:
    for part in ("weight", "scales", "biases"):
        other = BASE.replace("experts.2", "experts.1")
        arrays[f"{BASE}.{part}"], arrays[f"{other}.{part}"] = (
            arrays[f"{other}.{part}"], arrays[f"{BASE}.{part}"],
        )  # fmt: skip


def floats(arrays: Arrays, part: str) -> np.ndarray:
    """BASE's scales or biases, of BF16."""
    return (arrays[f"{BASE}.{part}"][1].astype(np.uint32) << 16).view(np.float32)


def put(arrays: Arrays, part: str, values: np.ndarray) -> None:
    rounded = round_to_dtype(values, "BF16").view(np.uint16)
    arrays[f"{BASE}.{part}"] = "BF16", rounded.reshape(values.shape)


def scale(part: str, factor: float) -> Callable[[Arrays, int], None]:
    return lambda arrays, _: put(arrays, part, floats(arrays, part) * np.float32(factor))


def move_a_group(arrays: Arrays, bits: int) -> None:
    """The bias of one group by twice as many steps as the bound has."""
    biases, steps = floats(arrays, "biases"), floats(arrays, "scales")
    biases[3, 1] += 2 * SIZE_BOUNDS[bits].group * np.abs(steps).max()
    put(arrays, "biases", biases)


def shuffle(arrays: Arrays, bits: int) -> None:
    """Codes of the rows in another order."""
    dtype, words = arrays[f"{BASE}.weight"]
    arrays[f"{BASE}.weight"] = dtype, words[::-1].copy()


DAMAGE = {
    "experts swapped": swap,
    "rows turned": shuffle,
    "scales doubled": scale("scales", 2),
    "biases negated": scale("biases", -1),
    "no scales": scale("scales", 0),
    "a group moved": move_a_group,
}


@pytest.mark.parametrize("bits", FORM_OF)
@pytest.mark.parametrize("maker", ["GPTQ", pytest.param("DWQ", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_weights_of_another_quantizer_is_seen(
    foreign, source, tmp_path, kind, maker, bits
):
    folder = bundles.split(foreign(maker, bits), tmp_path / "b")
    bundles.edit(folder, lambda arrays: DAMAGE[kind](arrays, bits))
    names = {finding.name for finding in bundles.judge(folder, source).errors}
    assert names & {"expert-imprecise", "expert-beyond-bound"}


@pytest.mark.parametrize("factor", [1.045, 1.002])
def test_one_wrong_bias_of_a_bundle_by_mlxs_formula_is_seen(bundle_of, source, tmp_path, factor):
    folder = saved_again(bundle_of("mlx"), tmp_path / "b")

    def change(arrays: Arrays) -> None:
        arrays[f"{BASE}.biases"][1][3, 1] *= np.float16(factor)

    bundles.edit(folder, change)
    assert "expert-differs" in {finding.name for finding in bundles.judge(folder, source).errors}


@pytest.mark.parametrize("dtype", ["BOOL", "F8_E4M3", "F8_E8M0", "I8"])
def test_bits_of_turboquant_in_another_dtype_are_named(bundle_of, source, tmp_path, dtype):
    folder = bundles.split(bundle_of("turboquant2"), tmp_path / "b")
    stack = next(n for n in open_bundle(folder).tensors if "switch_mlp" in n and "tq_bits" in n)

    def relabel(arrays: Arrays) -> None:
        arrays[stack] = dtype, arrays[stack][1]

    bundles.edit(folder, relabel)
    assert "tq_bits" in bundles.places(bundles.judge(folder, source, level=1), "dtype-wrong")


# --- Without a source -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_right_bundle_has_values_of_weights(bundle_of, form):
    assert "weights-implausible" not in bundles.judge(bundle_of(form), None)


def constant(arrays: Arrays) -> str:
    for name in [n for n in arrays if n.startswith(f"{BASE}.")]:
        dtype, array = arrays[name]
        arrays[name] = dtype, np.full_like(array, array.flat[0] if "weight" not in name else 0)
    return BASE


def without_scales(arrays: Arrays) -> str:
    """A matrix that had scales of about 2^-7, without them."""
    base = "layers.2.attn.wq_b"
    for part in ("scales", "biases"):
        dtype, array = arrays[f"{base}.{part}"]
        grown = array * np.float16(256) if array.dtype == np.float16 else array + 8
        arrays[f"{base}.{part}"] = dtype, grown
    return base


@pytest.mark.parametrize("change", [constant, without_scales])
@pytest.mark.parametrize("form", ["mlx", "affine2g64"])
def test_values_that_cannot_be_weights_are_found_without_a_source(
    bundle_of, tmp_path, form, change
):
    folder, names = bundles.split(bundle_of(form), tmp_path / "b"), []
    bundles.edit(folder, lambda arrays: names.append(change(arrays)))
    findings = bundles.judge(folder, None)
    assert names[0] in bundles.places(findings, "weights-implausible")
