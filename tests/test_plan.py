"""The plan of a bundle: what check promises, what a dry run shows and what is written are one.

Catches: a size that is computed in a second place, a tensor that the plan names and convert does
not write, a treatment that shapes or dtypes contradict.
"""

import re

import pytest
from conftest import NANO, ROOT, must

from dsv4.errors import UserError
from dsv4.model.bundle_tensors import StorageFormat, plan_shards
from dsv4.model.labels import DEFAULT, EXPERT, MXFP4, parts_of
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.quantization.formats import get_quantizer
from dsv4.storage.atomic import format_bytes


@pytest.mark.parametrize("quantizer", ["lossless", "mlx", "mxfp4", "turboquant2"])
def test_check_and_the_dry_run_name_the_bytes_that_are_written(quantizer, tmp_path):
    bundle = tmp_path / "bundle"
    options = ("--source", NANO, "--bundle", bundle, "--quantizer", quantizer,
               "--shard-bytes", "700000")  # fmt: skip
    new = ROOT / ".toolchain" / "new" / "bin" / "python"  # the old stack refuses lossless
    checked = must("check", *options, "--python", new)
    promised = re.search(r"bundle size: (.*) finished", checked)[1]
    shown = re.search(r"disk: (.*) for good", must("convert", *options, "--dry-run"))[1]
    must("convert", *options)
    written = sum(path.stat().st_size for path in bundle.glob("*.safetensors"))
    assert promised == shown == format_bytes(written)
    source, made = open_source(NANO), open_bundle(bundle)
    form = get_quantizer(quantizer, choice="source").form
    shards = plan_shards(source.tensors, form, {"format": "mlx"})
    # Whether lossless keeps a BF16 tensor so is not in the headers; both dtypes are as large.
    short = {"BF16": "F16"} if form.as_source else {}
    slots = [s for shard in shards for s in shard.layout.slots]
    planned = {s.name: (short.get(s.dtype, s.dtype), s.shape) for s in slots}
    found = {t.name: (short.get(t.dtype, t.dtype), t.shape) for t in made.tensors.values()}
    assert planned == found


def test_the_parts_of_flash_s_experts_are_those_of_the_format():
    """2,048 × 4,096 weights: 5 bits each as affine 4, 6 as affine 5, 4.25 as FP4."""
    for label, bits in ((EXPERT, 5.0), ({**EXPERT, "bits": 5}, 6.0), (MXFP4, 4.25), (DEFAULT, 9.0)):
        sizes = {"U32": 4, "F16": 2, "U8": 1}
        parts = parts_of(label, 2048, 4096).values()
        nbytes = sum(sizes[dtype] * shape[0] * shape[1] for dtype, shape in parts)
        assert nbytes * 8 == bits * 2048 * 4096


def test_more_shards_than_a_folder_may_have_stop_the_plan(monkeypatch):
    monkeypatch.setattr("dsv4.storage.limits.FILES", 8)
    form = get_quantizer("mlx").form
    with pytest.raises(
        UserError, match=r"SHARD_BYTES: found 1 bytes, [0-9]+ shards, expected at most 4"
    ):
        plan_shards(open_source(NANO).tensors, form, {}, 1)


def test_an_unknown_name_stops_the_plan():
    tensors = open_source(NANO).tensors
    odd = {**tensors, "layers.0.attn.unheard_of.weight": next(iter(tensors.values()))}
    tensor = odd["layers.0.attn.unheard_of.weight"]
    odd["layers.0.attn.unheard_of.weight"] = type(tensor)(
        "layers.0.attn.unheard_of.weight", "BF16", (4, 32), tensor.path, 0, 256
    )
    with pytest.raises(UserError, match="a name that this recipe does not know"):
        plan_shards(odd, StorageFormat(EXPERT), {})
