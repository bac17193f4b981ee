"""What only reads changes nothing, and no stage gives a finished bundle's experts another form.

A bundle of every form goes through all stages with no settings, and keeps every byte of its shards;
only a setting that is named changes them, and a line says so first. Another maker's bundle is left
alone. Catches: `make verify` that requantizes, a lossless bundle that becomes 4-bit affine because
QUANTIZER was left out, a mixture without its plan, a bundle weighed by an imatrix made anew
without it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import bundles
import numpy as np
import pytest
from conftest import made_once
from here import here, must, refusal
from test_imatrix import write
from test_settings import Copy, handed

from dsv4.conversion.recorded_format import read_recorded_format
from dsv4.model.source import open_source

FORMS = ("mlx", "mxfp4", "lossless", "small", "affine2g64", "turboquant2", "mixture",
         "mixture-lossless", "affine4g32")  # fmt: skip
STAGES = ("check", "patch_loader", "download", "plan", "convert", "requantize", "finalize", "patch",
          "verify")  # fmt: skip
READERS = {
    "verify": ("verify",),
    "report": ("report",),
    "evaluate": ("evaluate",),
    "imatrix": ("imatrix",),
    "serve": ("serve",),
    "smoke": ("smoke",),
    "accept": ("accept",),
    "inspect": ("inspect_bundle",),
    "publish": ("report", "publish"),
}


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def shards(folder: Path) -> dict[str, tuple[str, int]]:
    return {name: of for name, of in state(folder).items() if name.endswith(".safetensors")}


def size_for(source: Path, plan: Path) -> int:
    """A little more than the smallest mixture takes, so that its layers differ."""
    least = refusal("plan", "--source", source, "--plan", plan, "--size", "1MB")
    return int(float(least.partition("found ")[2].split(" MB")[0]) * 1.06e6)


def importances(source: Path) -> dict[str, np.ndarray]:
    """Of every column of every expert of the main layers, at random."""
    config, rng = open_source(source).config, np.random.default_rng(5)
    experts = config["n_routed_experts"]
    columns = {"gate": config["hidden_size"], "up": config["hidden_size"],
               "down": config["moe_intermediate_size"]}  # fmt: skip
    return {
        f"blk.{layer}.ffn_{name}_exps.weight": rng.uniform(0.5, 2, size=experts * number)
        for layer in range(config["num_hidden_layers"])
        for name, number in columns.items()
    }


@pytest.fixture(scope="session")
def work(source, tmp_path_factory) -> Path:
    """A bundle by each name of FORMS, the plan of the mixtures, and the imatrix of `affine4g32`."""

    def make(folder: Path) -> None:
        folder.mkdir()
        plan, imatrix = folder / "plan.json", folder / "i.dat"
        must("plan", "--source", source, "--plan", plan, "--size", size_for(source, plan))
        write(imatrix, importances(source))
        for name in FORMS:
            more = ("--plan", plan) if name.startswith("mixture") else ()
            more = ("--imatrix", imatrix) if name == "affine4g32" else more
            bundle = folder / name
            must("convert", "--source", source, "--bundle", bundle, "--quantizer", name, *more,
                 "--shard-bytes", 400_000)  # fmt: skip
            must("finalize", "--source", source, "--bundle", bundle)
            must("patch", "--bundle", bundle, "--source", source)

    return made_once(tmp_path_factory, "forms", make)


@pytest.fixture(scope="session")
def others(source, work, tmp_path_factory) -> Path:
    """Bundles without our record: upstream's, a right one, and one of another layout."""

    def make(folder: Path) -> None:
        must("make_stock", "--source", source, "--bundle", folder / "stock")
        bundles.split(work / "mlx", folder / "right", marks=False)
        bundles.edit_json(folder / "right" / "config.json", lambda c: c.pop("requantize"))
        bundles.relaid(folder / "right", folder / "mlx-vlm", "mlx-vlm")

    return made_once(tmp_path_factory, "others", make)


@pytest.fixture
def nothing_set(monkeypatch) -> None:
    """The settings as make hands them over when none was given."""
    for name in ("QUANTIZER", "IMATRIX", "PLAN", "FIT", "SIZE", "CONTEXT", "ANY_SHAPE", "REPO",
                 "SHARD_BYTES", "REFERENCE", "LOW_DISK"):  # fmt: skip
        monkeypatch.setenv(f"RECIPE_{name}", "")
    monkeypatch.setenv("RECIPE_CONVERTER", "native")


def all_stages(source: Path, bundle: Path) -> str:
    """The stages that `make all` runs on a bundle, but for the toolchain's; what they say of it."""
    folders = ("--source", source, "--bundle", bundle)
    must("plan", *folders)
    must("convert", *folders)
    status, out, err = here("requantize", *folders, "--ours")
    assert status == 0, err
    must("finalize", *folders)
    must("patch", *folders)
    return out + err


@pytest.mark.parametrize("name", FORMS)
def test_no_stage_changes_the_form_of_a_finished_bundle(name, source, work, tmp_path, nothing_set):
    bundle = shutil.copytree(work / name, tmp_path / "bundle")
    before = shards(bundle)
    assert re.search(
        r"already requantized: \d+ shards, nothing to do\n$", all_stages(source, bundle)
    )
    assert shards(bundle) == before
    contents = {file: digest for file, (digest, _) in state(work / name).items()}
    assert {file: digest for file, (digest, _) in state(bundle).items()} == contents


@pytest.mark.parametrize("name", ["mixture", "lossless"])
def test_check_knows_the_size_of_the_bundle_that_is_there(name, source, work, nothing_set):
    before = state(work / name)
    _, out, _ = here("check", "--source", source, "--bundle", work / name, "--ours")
    (said,) = re.findall(r"bundle size: (.+) finished, (.+) there", out)
    assert said[0] == said[1]
    assert state(work / name) == before


def test_a_form_that_is_asked_for_is_said_before_it_is_made(source, work, tmp_path):
    bundle = shutil.copytree(work / "mxfp4", tmp_path / "bundle")
    folders = ("--source", source, "--bundle", bundle)
    _, _, err = here("requantize", *folders, "--quantizer", "mlx")
    assert err.splitlines()[0] == (
        f"requantize: {bundle} holds experts as mxfp4; QUANTIZER=mlx asks for affine 4 bits: "
        "120 tensors are rewritten"
    )
    assert read_recorded_format(bundle).identity[0] == "mlx"
    status, _, err = here("requantize", *folders, "--plan", work / "plan.json", "--dry-run")
    assert (status, f"PLAN={work / 'plan.json'} asks for" in err) == (0, True)


def test_a_name_that_the_record_says_too_needs_neither_plan_nor_imatrix(source, work):
    for name in ("mixture", "mixture-lossless", "affine4g32"):
        folders = ("--source", source, "--bundle", work / name)
        before = state(work / name)
        assert "already requantized" in must("requantize", *folders, "--quantizer", name)
        must("convert", *folders, "--quantizer", name)
        assert state(work / name) == before


def test_a_new_plan_stays_with_the_form_of_all_but_the_experts(source, work, tmp_path):
    """PLAN alone asks for another mixture, and not for 8 bits instead of the source's numbers."""
    folders = ("--source", source, "--bundle", work / "mixture-lossless")
    assert "already requantized" in must("requantize", *folders, "--plan", work / "plan.json")
    plan = tmp_path / "plan.json"
    must("plan", *folders, "--plan", plan, "--fit", "96GB")
    assert '"quantizer": "mixture-lossless"' in plan.read_text()


def test_a_plan_stays_when_context_shape_or_imatrix_is_left_out(source, work, tmp_path):
    plan, wish = tmp_path / "plan.json", ("--fit", "96GB")
    command = ("plan", "--source", source, "--plan", plan, *wish)
    must(*command, "--context", 5000, "--any-shape", "--imatrix", work / "i.dat")
    before = state(tmp_path)
    assert "there already" in must(*command)
    assert state(tmp_path) == before
    must(*command, "--context", 6000, "--imatrix", work / "i.dat")
    assert state(tmp_path) != before


def with_f16_control(bundle: Path) -> Path:
    """Something that requantize mends, in a shard that holds experts too."""

    def change(arrays: bundles.Arrays) -> None:
        name = "layers.0.attn.attn_sink"
        arrays[name] = ("F16", arrays[name][1].astype(np.float16))

    bundles.edit(bundle, change)
    return bundle


def test_what_needs_an_imatrix_or_a_plan_stops_without_it(source, work, tmp_path):
    """An expert that is to be made is never made without the columns that its mark tells."""
    bundle = with_f16_control(shutil.copytree(work / "affine4g32", tmp_path / "affine4g32"))
    folders, before = ("--source", source, "--bundle", bundle), state(bundle)
    assert "name it: IMATRIX=FILE" in refusal("requantize", *folders)
    assert "name it: IMATRIX=FILE" in refusal("requantize", *folders, "--quantizer", "affine4g32")
    assert state(bundle) == before
    must("requantize", *folders, "--imatrix", work / "i.dat")
    assert bundles.load(bundle).keys() == bundles.load(work / "affine4g32").keys()
    expected = read_recorded_format(work / "affine4g32")
    assert read_recorded_format(bundle).identity == expected.identity
    mixture = with_f16_control(shutil.copytree(work / "mixture", tmp_path / "mixture"))
    must("requantize", "--source", source, "--bundle", mixture)  # its labels are the plan
    found, expected = bundles.load(mixture), bundles.load(work / "mixture")
    for name, (dtype, array) in expected.items():
        assert (found[name][0], found[name][1].tobytes()) == (dtype, array.tobytes()), name
    bundles.edit_json(mixture / "config.json", lambda c: c["requantize"].update(table="3-other"))
    for shard in mixture.glob("*.safetensors"):
        table = read_recorded_format(work / "mixture").identity[1].encode()
        shard.write_bytes(shard.read_bytes().replace(table, b"9" * len(table)))
    with_f16_control(mixture)
    assert "name the plan: PLAN=FILE" in refusal(
        "requantize", "--source", source, "--bundle", mixture
    )


def test_half_of_two_forms_is_gone_on_with_by_its_name_alone(source, work, tmp_path):
    """A killed change of form leaves shards of both: no default is right."""
    bundle = shutil.copytree(work / "affine4g32", tmp_path / "bundle")
    folders = ("--source", source, "--bundle", bundle)
    must("requantize", *folders, "--quantizer", "mlx", "--part", "1/2")
    line = refusal("requantize", *folders)
    assert "experts made by 'affine4g32' and 'mlx'" in line
    assert "QUANTIZER=NAME" in line
    must("requantize", *folders, "--quantizer", "mlx")
    assert read_recorded_format(bundle).identity == read_recorded_format(work / "mlx").identity


@pytest.mark.parametrize("name", ["stock", "right", "mlx-vlm"])
def test_stages_leave_another_makers_bundle_alone(name, source, others, nothing_set):
    bundle = others / name
    folders, before = ("--source", source, "--bundle", bundle), state(bundle)
    for command in ("check", "requantize"):
        for more in ((), ("--quantizer", "mxfp4")):
            line = refusal(command, *folders, "--ours", *more)
            assert "found another maker's bundle, expected one that this recipe made" in line
            assert "make repair mends it with a backup" in line
    assert state(bundle) == before


def test_requantize_by_its_name_mends_what_upstreams_converter_left(source, others, work, tmp_path):
    folders = ("--source", source, "--bundle")
    for more in ((), ("--ours", "--converter", "jang")):
        assert "to write" in must("requantize", *folders, others / "stock", "--dry-run", *more)
        status, _, err = here("requantize", *folders, others / "right", "--dry-run", *more)
        assert (status, "QUANTIZER=NAME" in err) == (1, True)
    must("requantize", *folders, others / "right", "--dry-run", "--quantizer", "mlx")
    bundle = shutil.copytree(others / "stock", tmp_path / "bundle")
    must("requantize", *folders, bundle)
    name, table = read_recorded_format(work / "mlx").identity  # upstream's MTP is as the experts
    assert read_recorded_format(bundle).identity == (name, table.removesuffix("-mtp-source"))


def damaged(bundle: Path) -> Path:
    next(iter(sorted(bundle.glob("*.safetensors")))).write_bytes(b"cut")
    (bundle / "generation_config.json").write_text("{ cut")
    return bundle


def test_commands_that_read_change_nothing(source, work, others, tmp_path, monkeypatch):
    """With the source, and without: then verify says what it did not compare."""
    broken = damaged(shutil.copytree(work / "mlx", tmp_path / "broken"))
    every = [work / name for name in FORMS] + [p for p in others.iterdir() if p.is_dir()] + [broken]
    fast = ("--without-loader", "--jobs", 1, "--json", tmp_path / "verify.json")
    before = {bundle: state(bundle) for bundle in every}
    for bundle in every:
        wrong = bundle.name in ("stock", "broken")
        level = ("--level", 1 + (bundle.name in ("mlx", "mixture", "right")))
        said = here("verify", "--bundle", bundle, "--source", source, *level, *fast)
        assert said[0] == wrong, said
    monkeypatch.setenv("RECIPE_SOURCE", str(tmp_path / "nowhere"))
    for bundle in every:
        wrong = bundle.name in ("stock", "broken")
        level = ("--level", 1 + (bundle.name == "lossless"))
        status, out, err = here("verify", "--bundle", bundle, *level, *fast)
        assert (status, "SOURCE: nothing lies at" in err) == (wrong, True), (out, err)
        assert "not compared, without a source: tensors, tokenizer, encoding" in out
        assert ("encoding, every value" in out) == (level[1] == 2)
    must("report", "--json", tmp_path / "verify.json", "--out", tmp_path / "page.html")
    assert {bundle: state(bundle) for bundle in every} == before


# ---------------------------------------------------------------------------------- the Makefile


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


def run_by(copy: Copy, *arguments: str) -> list[tuple[str, str]]:
    """(script, its options) that `make …` would run, in order."""
    done = copy.make(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    return re.findall(r"\.venv/bin/python scripts/(\w+)\.py(.*)", done.stdout)


@pytest.mark.parametrize("target", READERS)
def test_a_target_that_reads_runs_no_stage(copy, target):
    for more in ((), ("QUANTIZER=mxfp4", "CONVERTER=jang"), ("FIT=96GB",), ("LOW_DISK=1",)):
        ran = [name for name, _ in run_by(copy, target, "REPO=a/b", "TO=a/b", "DRY_RUN=1", *more)]
        assert tuple(ran) == READERS[target]


def test_only_all_has_verify_as_its_last_stage(copy):
    ran = run_by(copy, "all")
    assert tuple(name for name, _ in ran) == STAGES
    careful = [name for name, options in ran if options.strip() == "--ours"]
    assert careful == ["check", "requantize"]
    ran = run_by(copy, "requantize")
    assert tuple(name for name, _ in ran) == STAGES[: STAGES.index("requantize") + 1]
    assert not any("--ours" in options for _, options in ran)
    assert copy.make("verify").returncode == 0
    assert not list((copy.folder / "build").glob("*/*.stamp"))


def test_make_names_no_quantizer_unless_it_was_told_one(copy):
    given = handed(copy.given("verify")[1])
    assert (given["QUANTIZER"], given["PLAN"]) == ("", "")
    given = handed(copy.given("verify", "FIT=96GB", "BUNDLE=/b")[1])
    assert (given["QUANTIZER"], given["PLAN"]) == ("", "/b.plan.json")
    assert handed(copy.given("verify", QUANTIZER="lossless")[1])["QUANTIZER"] == "lossless"
