"""A good bundle passes; each of these corruptions is caught, by the name that its fault has.

Catches: a check that looks away. Every mutation changes one thing in a copy of a good bundle over
four shards, or in the same bundle without the marks of this project's requantizer, as if another
tool had made it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bundles
import numpy as np
import pytest
from bundles import Arrays, edit, edit_json, flip, places, write_numbers

from dsv4.model.load import open_bundle
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.tensor_reader import as_float32

E0, E1 = "layers.1.ffn.experts.0", "layers.1.ffn.experts.1"
GATE = "model.layers.0.mlp.switch_mlp.gate_proj"


@dataclass(frozen=True)
class Mutation:
    """What is done to a bundle's folder, the fault that must be named, and what it must say."""

    change: Callable[[Path], object]
    fault: str
    says: str = ""
    elsewhere: bool = False


MUTATIONS: dict[str, Mutation] = {}


def mutation(fault: str, says: str = "", elsewhere: bool = False):
    """Register a function of the bundle's folder as a mutation; its name is the mutation's."""

    def register(change: Callable[[Path], object]) -> Callable[[Path], object]:
        MUTATIONS[change.__name__] = Mutation(change, fault, says, elsewhere)
        return change

    return register


def on_arrays(fault: str, says: str = ""):
    """Register a function of all tensors as a mutation."""

    def register(change: Callable[[Arrays], object]) -> Callable[[Arrays], object]:
        MUTATIONS[change.__name__] = Mutation(lambda folder: edit(folder, change), fault, says)
        return change

    return register


def on_json(file: str, fault: str, says: str = ""):
    """Register a function of one parsed JSON file as a mutation."""

    def register(change: Callable[[dict], object]) -> Callable[[dict], object]:
        MUTATIONS[change.__name__] = Mutation(
            lambda folder: edit_json(folder / file, change), fault, says
        )
        return change

    return register


# --- One bit, in each kind of tensor ------------------------------------------------------------

# (128, 256): 128 bytes of codes and 8 groups a row, so byte 1030 is in row 8, columns 12 and 13.
BITS = {
    "expert_weight": (f"{E0}.w1.weight", 1030, 0, "expert-differs", "row 8, group 0"),
    "expert_weight_high_nibble": (f"{E0}.w3.weight", 1150, 7, "expert-differs", "row 8, group 7"),
    "expert_scale_last_place": (f"{E1}.w1.scales", 18, 0, "expert-differs", "row 1, group 1"),
    "expert_scale_sign": (f"{E1}.w1.scales", 19, 7, "expert-differs", "row 1, group 1"),
    "expert_bias_last_place": (f"{E1}.w2.biases", 0, 0, "expert-differs", "row 0, group 0"),
    "mtp_expert_weight": ("mtp.0.ffn.experts.7.w2.weight", 5, 4, "expert-differs", "mtp.0"),
    "mtp_expert_scale": ("mtp.0.ffn.experts.7.w2.scales", 0, 0, "expert-differs", "row 0"),
    "attention_weight": ("layers.0.attn.wq_a.weight", 700, 0, "module-differs", "row 2, group 5"),
    "attention_scale": ("layers.2.attn.wo_b.scales", 0, 0, "module-differs", "row 0, group 0"),
    "attention_bias": ("layers.2.attn.wkv.biases", 2, 0, "module-differs", "row 0, group 1"),
    "embedding": ("embed.weight", 256 * 3 + 33, 0, "module-differs", "row 3, group 1"),
    "head": ("head.weight", 0, 1, "module-differs", "head.weight"),
    "shared_expert": ("layers.3.ffn.shared_experts.w2.weight", 9, 0, "module-differs", "row 0"),
    "compressor": ("layers.1.attn.compressor.wkv.weight", 0, 0, "module-differs", "compressor"),
    "indexer": ("layers.1.attn.indexer.wq_b.weight", 1, 2, "module-differs", "indexer"),
    "mtp_projection": ("mtp.0.e_proj.weight", 77, 3, "module-differs", "mtp.0.e_proj"),
    "norm": ("layers.0.attn_norm.weight", 6, 0, "passthrough-differs", "element [3]"),
    "router": ("layers.3.ffn.gate.weight", 2, 0, "passthrough-differs", "element [0, 1]"),
    "compressor_position": ("layers.1.attn.compressor.ape", 0, 0, "passthrough-differs", "ape"),
    "hash_table": ("layers.0.ffn.gate.tid2eid", 8, 0, "passthrough-differs", "element [0, 1]"),
    "residual_mixing": ("layers.2.hc_ffn_fn", 0, 0, "control-differs", "hc_ffn_fn"),
    "attention_sink": ("layers.2.attn.attn_sink", 4, 0, "control-differs", "element [1]"),
    "routing_bias": ("layers.2.ffn.gate.bias", 3, 7, "control-differs", "element [0]"),
    "head_scale": ("hc_head_scale", 1, 1, "control-differs", "hc_head_scale"),
    "mtp_control": ("mtp.0.hc_attn_base", 0, 0, "control-differs", "mtp.0"),
}
for _name, (_tensor, _byte, _bit, _fault, _says) in BITS.items():
    MUTATIONS[f"a_bit_of_{_name}"] = Mutation(
        lambda folder, t=_tensor, byte=_byte, bit=_bit: flip(folder, t, byte, bit), _fault, _says
    )
for _name in ("expert_weight", "expert_scale_last_place", "expert_bias_last_place", "embedding"):
    _tensor, _byte, _bit, _fault, _says = BITS[_name]
    MUTATIONS[f"elsewhere_a_bit_of_{_name}"] = Mutation(
        lambda folder, t=_tensor, byte=_byte, bit=_bit: flip(folder, t, byte, bit),
        _fault, _says, elsewhere=True,
    )  # fmt: skip


# --- Right numbers in the wrong place -----------------------------------------------------------


def swap(arrays: Arrays, one: str, other: str) -> None:
    arrays[one], arrays[other] = arrays[other], arrays[one]


@on_arrays("expert-differs", E0)
def swapped_experts(arrays: Arrays) -> None:
    for matrix in ("w1", "w2", "w3"):
        for part in ("weight", "scales", "biases"):
            swap(arrays, f"{E0}.{matrix}.{part}", f"{E1}.{matrix}.{part}")


@on_arrays("expert-differs", f"{E0}.w1")
def swapped_gate_and_up(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        swap(arrays, f"{E0}.w1.{part}", f"{E0}.w3.{part}")


@on_arrays("expert-differs")
def swapped_codes_under_their_old_scales(arrays: Arrays) -> None:
    swap(arrays, f"{E0}.w1.weight", f"{E1}.w1.weight")


@on_arrays("expert-differs")
def stale_biases(arrays: Arrays) -> None:
    arrays[f"{E0}.w2.biases"] = arrays[f"{E1}.w2.biases"]


@on_arrays("expert-differs")
def scales_shifted_by_a_row(arrays: Arrays) -> None:
    dtype, array = arrays[f"{E0}.w1.scales"]
    arrays[f"{E0}.w1.scales"] = dtype, np.roll(array, 1, axis=0)


@on_arrays("expert-differs")
def scales_shifted_by_a_group(arrays: Arrays) -> None:
    dtype, array = arrays[f"{E0}.w1.scales"]
    arrays[f"{E0}.w1.scales"] = dtype, np.roll(array, 1, axis=1)


@on_arrays("expert-differs")
def nibbles_in_the_other_order(arrays: Arrays) -> None:
    dtype, array = arrays[f"{E0}.w1.weight"]
    arrays[f"{E0}.w1.weight"] = dtype, (array & 0x0F0F0F0F) << 4 | (array >> 4) & 0x0F0F0F0F


@on_arrays("expert-differs")
def rows_of_an_expert_reversed(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        dtype, array = arrays[f"{E0}.w2.{part}"]
        arrays[f"{E0}.w2.{part}"] = dtype, array[::-1]


@on_arrays("module-differs")
def swapped_layers(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        swap(arrays, f"layers.0.attn.wkv.{part}", f"layers.1.attn.wkv.{part}")


@on_arrays("module-differs")
def rows_of_the_embedding_swapped(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        array = arrays[f"embed.{part}"][1]
        array[[7, 8]] = array[[8, 7]]


@on_arrays("passthrough-differs")
def swapped_norms(arrays: Arrays) -> None:
    swap(arrays, "layers.0.attn_norm.weight", "layers.0.ffn_norm.weight")


# --- Numbers that are no weights ----------------------------------------------------------------


@mutation("nan-or-inf", "row 0, group 0")
def nan_in_an_expert_scale(folder: Path) -> None:
    write_numbers(folder, f"{E0}.w1.scales", 0, [float("nan")])


@mutation("nan-or-inf")
def infinity_in_an_expert_bias(folder: Path) -> None:
    write_numbers(folder, f"{E0}.w1.biases", 9, [float("inf")])


@mutation("nan-or-inf")
def nan_in_a_module_scale(folder: Path) -> None:
    write_numbers(folder, "layers.0.attn.wq_b.scales", 3, [float("nan")])


@mutation("nan-or-inf", "element [5]")
def nan_in_a_norm(folder: Path) -> None:
    write_numbers(folder, "norm.weight", 5, [float("nan")])


@mutation("nan-or-inf")
def infinity_in_a_control(folder: Path) -> None:
    write_numbers(folder, "layers.1.hc_attn_base", 0, [float("-inf")])


@on_arrays("expert-differs", f"{E0}.w1")
def zero_filled_expert(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        arrays[f"{E0}.w1.{part}"][1][...] = 0


@on_arrays("control-differs")
def controls_rounded_but_called_f32(arrays: Arrays) -> None:
    array = arrays["layers.0.hc_attn_fn"][1]
    array[...] = array.astype(np.float16)


@on_arrays("controls-rounded", "hc_head_fn")
def controls_in_f16(arrays: Arrays) -> None:
    arrays["hc_head_fn"] = "F16", arrays["hc_head_fn"][1].astype(np.float16)


@on_arrays("dtype-wrong", "tid2eid")
def narrow_hash_table(arrays: Arrays) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    arrays[name] = "I32", arrays[name][1].astype(np.int32)


# --- Tensors that are not there, or too many ----------------------------------------------------


@on_arrays("triple-incomplete", f"{E0}.w1")
def dropped_expert_biases(arrays: Arrays) -> None:
    del arrays[f"{E0}.w1.biases"]


@on_arrays("triple-incomplete", "embed")
def dropped_module_scales(arrays: Arrays) -> None:
    del arrays["embed.scales"]


@on_arrays("expert-missing", f"{E1}.w2")
def dropped_expert_matrix(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        del arrays[f"{E1}.w2.{part}"]


@on_arrays("expert-missing", "mtp.0")
def dropped_mtp_layer(arrays: Arrays) -> None:
    for name in [name for name in arrays if name.startswith("mtp.")]:
        del arrays[name]


@on_arrays("tensor-missing", "layers.2.attn.kv_norm.weight")
def dropped_norm(arrays: Arrays) -> None:
    del arrays["layers.2.attn.kv_norm.weight"]


@on_arrays("tensor-missing", "layers.2.attn.attn_sink")
def dropped_control(arrays: Arrays) -> None:
    del arrays["layers.2.attn.attn_sink"]


@on_arrays("tensor-extra", "layers.0.attn.q_norm.bias")
def extra_tensor(arrays: Arrays) -> None:
    arrays["layers.0.attn.q_norm.bias"] = arrays["layers.0.attn.q_norm.weight"]


@on_arrays("expert-extra", "layers.1.ffn.experts.8.w1")
def expert_beyond_the_count(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        arrays[f"layers.1.ffn.experts.8.w1.{part}"] = arrays[f"{E0}.w1.{part}"]


@on_arrays("tensor-missing", "norm.weight")
def renamed_tensor(arrays: Arrays) -> None:
    arrays["model.norm.weight"] = arrays.pop("norm.weight")


@on_arrays("shape-wrong", f"{E0}.w1.weight")
def transposed_expert(arrays: Arrays) -> None:
    for part in ("weight", "scales", "biases"):
        arrays[f"{E0}.w1.{part}"] = arrays[f"{E0}.w2.{part}"]


@on_arrays("shape-wrong", "layers.0.attn_norm.weight")
def norm_of_another_width(arrays: Arrays) -> None:
    arrays["layers.0.attn_norm.weight"] = "F16", np.ones(128, np.float16)


@on_arrays("triple-misfit", f"{E0}.w1")
def groups_of_64(arrays: Arrays) -> None:
    for part in ("scales", "biases"):
        dtype, array = arrays[f"{E0}.w1.{part}"]
        arrays[f"{E0}.w1.{part}"] = dtype, array[:, ::2]
    arrays[f"{E0}.w1.weight"] = "U32", arrays[f"{E0}.w1.weight"][1][:, 1:]


@on_arrays("u8-scales-beside-biases", f"{E0}.w1")
def old_scales_beside_new_biases(arrays: Arrays) -> None:
    shape = arrays[f"{E0}.w1.scales"][1].shape
    arrays[f"{E0}.w1.scales"] = "U8", np.full(shape, 120, np.uint8)


@on_arrays("stock-experts", f"{E0}.w1")
def one_stock_expert(arrays: Arrays) -> None:
    shape = arrays[f"{E0}.w1.scales"][1].shape
    arrays[f"{E0}.w1.scales"] = "U8", np.full(shape, 120, np.uint8)
    del arrays[f"{E0}.w1.biases"]


# --- Shards -------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@mutation("shard-missing", "model-00002-of-00004")
def missing_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


@mutation("shard-broken", "model-00003-of-00004")
def truncated_shard(folder: Path) -> None:
    path = shards(folder)[2]
    path.write_bytes(path.read_bytes()[:-100])


@mutation("shard-broken")
def lengthened_shard(folder: Path) -> None:
    with shards(folder)[0].open("ab") as file:
        file.write(bytes(8))


@mutation("shard-broken")
def empty_shard(folder: Path) -> None:
    shards(folder)[3].write_bytes(b"")


@mutation("shard-broken", "twice")
def key_twice_in_a_header(folder: Path) -> None:
    path = shards(folder)[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    names = list(json.loads(data[8 : 8 + length]))
    one = next(n for n in names if ".experts.1.w1.weight" in n)
    other = one.replace("experts.1.w1", "experts.1.w3")
    header = data[8 : 8 + length].replace(f'"{one}"'.encode(), f'"{other}"'.encode())
    path.write_bytes(data[:8] + header + data[8 + length :])


@mutation("shard-stranger", "model-extra.safetensors")
def stray_shard(folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder / "model-extra.safetensors")


@mutation("tensor-twice")
def shard_copied_over_another(folder: Path) -> None:
    shutil.copy(shards(folder)[0], shards(folder)[1])


@mutation("marks-mixed", "another")
def shard_of_another_source(folder: Path) -> None:
    path = next(p for p in shards(folder) if b"ffn.experts" in p.read_bytes()[:5000])
    data = path.read_bytes()
    mark = open_bundle(folder).shards[path.name].metadata["requantize_source"].encode()
    path.write_bytes(data.replace(mark, b"another".ljust(len(mark), b"0"), 1))


@mutation("leftover-files")
def half_written_shard(folder: Path) -> None:
    (folder / ".model-00001-of-00004.safetensors.partial").write_bytes(b"half")


# --- Index --------------------------------------------------------------------------------------


@on_json(INDEX, "index-entry-missing", "norm.weight")
def index_without_an_entry(index: dict) -> None:
    del index["weight_map"]["norm.weight"]


@on_json(INDEX, "index-entry-dangling", "no.such.tensor")
def index_with_an_entry_too_many(index: dict) -> None:
    index["weight_map"]["no.such.tensor"] = index["weight_map"]["norm.weight"]


@on_json(INDEX, "index-entry-wrong", "embed.weight")
def index_that_leads_to_another_shard(index: dict) -> None:
    index["weight_map"]["embed.weight"] = "model-00004-of-00004.safetensors"


@on_json(INDEX, "index-unsafe-path")
def index_that_leads_out_of_the_folder(index: dict) -> None:
    index["weight_map"]["norm.weight"] = "../norm.safetensors"


@on_json(INDEX, "index-broken")
def index_without_a_map(index: dict) -> None:
    del index["weight_map"]


@mutation("index-broken")
def index_cut_short(folder: Path) -> None:
    path = folder / INDEX
    path.write_text(path.read_text()[:-50])


# --- Labels and config --------------------------------------------------------------------------


@on_json("config.json", "label-bits-wrong", "bits 8")
def eight_bit_label_over_four_bits(config: dict) -> None:
    config["quantization"][GATE]["bits"] = 8


@on_json("config.json", "label-mode-wrong", "mxfp4")
def mxfp4_label_over_affine(config: dict) -> None:
    config["quantization"][GATE]["mode"] = "mxfp4"


@on_json("config.json", "label-group-wrong", "64")
def label_of_another_group_size(config: dict) -> None:
    config["quantization"][GATE]["group_size"] = 64


@on_json("config.json", "label-missing", "mlx_lm")
def label_dropped_for_mlx_lm(config: dict) -> None:
    del config["quantization"][GATE]


@on_json("config.json", "label-missing", "mlx-vlm")
def label_dropped_for_mlx_vlm(config: dict) -> None:
    del config["quantization"]["language_model.model.layers.1.ffn.switch_mlp.up_proj"]


@on_json("config.json", "label-missing", "vMLX 1.6.81")
def label_dropped_for_one_expert(config: dict) -> None:
    del config["quantization"]["mtp.0.ffn.experts.3.w3"]


@on_json("config.json", "label-missing", "8-bit")
def labels_under_storage_names_only(config: dict) -> None:
    labels = config["quantization"]
    for key in [key for key in labels if "switch_mlp" in key]:
        del labels[key]


@on_json("config.json", "label-stray", "layers.99")
def label_of_no_module(config: dict) -> None:
    config["quantization"]["layers.99.ffn.experts.0.w1"] = {"bits": 4}


@on_json("config.json", "label-bits-wrong")
def top_level_of_four_bits(config: dict) -> None:
    config["quantization"]["bits"] = 4


@on_json("config.json", "label-two-dicts")
def two_quantization_dicts(config: dict) -> None:
    config["quantization_config"] = config["quantization"] | {"bits": 4}


@on_json("config.json", "label-twice")
def the_labels_once_more(config: dict) -> None:
    config["quantization_config"] = config["quantization"]


@on_json("config.json", "label-absent")
def no_labels(config: dict) -> None:
    del config["quantization"]


@on_json("config.json", "another-model", "llama")
def another_model_type(config: dict) -> None:
    config["model_type"] = "llama"


@on_json("config.json", "expert-missing", "layers.4")
def more_layers_than_there_are(config: dict) -> None:
    config["num_hidden_layers"] += 1


@on_json("config.json", "expert-extra")
def fewer_experts_than_there_are(config: dict) -> None:
    config["n_routed_experts"] -= 1


@on_json("config.json", "config-differs", "swiglu_limit")
def another_swiglu_limit(config: dict) -> None:
    config["swiglu_limit"] = 7.0


@on_json("config.json", "config-broken", "hidden_size")
def config_without_a_count(config: dict) -> None:
    del config["hidden_size"]


@mutation("config-broken")
def config_cut_short(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:200])


# --- What steers a conversation -----------------------------------------------------------------


@on_json("config.json", "eos-wrong", "config.json")
def single_eos(config: dict) -> None:
    config["eos_token_id"] = 1


@on_json("generation_config.json", "eos-wrong", "generation_config.json")
def eos_without_the_user_token(config: dict) -> None:
    config["eos_token_id"] = config["eos_token_id"][:1]


@on_json("generation_config.json", "eos-wrong")
def eos_of_another_tokenizer(config: dict) -> None:
    config["eos_token_id"] = [2, 7]


@on_json("tokenizer_config.json", "chat-template-missing")
def no_chat_template(config: dict) -> None:
    del config["chat_template"]


@on_json("tokenizer_config.json", "chat-template-incomplete", "<think>")
def template_that_never_thinks(config: dict) -> None:
    config["chat_template"] = config["chat_template"].replace("'<think>'", "''")


@on_json("tokenizer_config.json", "chat-template-wrong", "TemplateSyntaxError")
def template_cut_short(config: dict) -> None:
    config["chat_template"] = config["chat_template"][:-10]


@on_json("tokenizer_config.json", "chat-template-wrong", "<|im_start|>")
def template_of_another_model(config: dict) -> None:
    config["chat_template"] = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


@on_json("jang_config.json", "jang-config-group-size", "64")
def jang_config_with_groups_of_64(config: dict) -> None:
    config["quantization"]["group_size"] = 64


@on_json(
    "jang_config.json", "answer-limit", "jang_config.json: chat.sampling_defaults.max_new_tokens"
)
def answers_of_300_tokens(config: dict) -> None:
    """As upstream's converter writes it, and this recipe did until November 2026."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 300}
    config["chat"]["sampling_defaults"] = sampling


@on_json("generation_config.json", "answer-limit", "generation_config.json: max_new_tokens")
def answers_of_300_tokens_by_the_generation_config(config: dict) -> None:
    config["max_new_tokens"] = 300


@on_json("generation_config.json", "answer-limit", "generation_config.json: max_length")
def answers_end_at_a_length(config: dict) -> None:
    config["max_length"] = 300


@on_json("config.json", "answer-limit", "config.json: jang_config.chat.sampling_defaults")
def answers_of_300_tokens_by_a_jang_config_within_config(config: dict) -> None:
    config["jang_config"] = {"chat": {"sampling_defaults": {"max_new_tokens": 300}}}


@on_json("jang_config.json", "sampling-differs", "chat.sampling_defaults.temperature")
def another_temperature_than_the_generation_config(config: dict) -> None:
    config["chat"]["sampling_defaults"] = {"temperature": 0.6}


@on_json("jang_config.json", "sampling-differs", "sampling_defaults.repetition_penalty_chat")
def a_penalty_for_repetition_in_chat(config: dict) -> None:
    """As jang 2.5.50 writes it."""
    config["chat"]["sampling_defaults"] = {"repetition_penalty_chat": 1.05}


@on_json("jang_config.json", "sampling-differs", "chat.sampling_modes.thinking.top_p")
def another_top_p_while_thinking(config: dict) -> None:
    config["chat"]["sampling_modes"] = {"thinking": {"top_p": 0.8}}


@on_json("config.json", "sampling-differs", "config.json: temperature")
def a_temperature_in_config(config: dict) -> None:
    config["temperature"] = 0.6


@on_json("generation_config.json", "generation-config-differs", "min_p")
def a_default_that_the_source_has_not(config: dict) -> None:
    config["min_p"] = 0.2


@on_json("tokenizer.json", "tokenizer-missing")
def tokenizer_without_the_user_token(tokenizer: dict) -> None:
    keep = [entry for entry in tokenizer["added_tokens"] if "User" not in entry["content"]]
    tokenizer["added_tokens"] = keep
    tokenizer["model"]["vocab"] = {
        token: number
        for token, number in tokenizer["model"]["vocab"].items()
        if "User" not in token
    }


@mutation("encoding-missing")
def no_encoding(folder: Path) -> None:
    shutil.rmtree(folder / "encoding")


@mutation("generation-config-broken")
def no_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


@mutation("tokenizer-missing")
def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


# --- What other tools do ------------------------------------------------------------------------


@mutation("zeros-moved", elsewhere=True)
def the_simple_formula(folder: Path) -> None:
    """scale = (max - min)/15, bias = min, as mxfp4_to_affine.py has it, for every expert."""

    def change(arrays: Arrays) -> None:
        for name in [n for n in arrays if ".experts." in n and n.endswith(".weight")]:
            requantize(arrays, name.removesuffix(".weight"), simple)

    edit(folder, change)


def simple(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    least, greatest = values.min(axis=1), values.max(axis=1)
    return ((greatest - least) / 15).astype(np.float16), least.astype(np.float16)


def requantize(arrays: Arrays, base: str, formula: Callable) -> None:
    """Quantize an expert's decoded weights again, by another formula."""
    words = arrays[f"{base}.weight"][1]
    scales, biases = (arrays[f"{base}.{part}"][1] for part in ("scales", "biases"))
    levels = np.stack([words.view(np.uint8) & 15, words.view(np.uint8) >> 4], -1)
    levels = levels.reshape(scales.size, 32).astype(np.float32)
    values = levels * scales.astype(np.float32).reshape(-1, 1)
    values += biases.astype(np.float32).reshape(-1, 1)
    scale, bias = formula(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = (values - bias[:, None].astype(np.float32)) / scale[:, None].astype(np.float32)
    codes = np.clip(np.nan_to_num(np.rint(steps)), 0, 15).astype(np.uint8)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.uint32).reshape(words.shape)
    arrays[f"{base}.weight"] = "U32", packed
    arrays[f"{base}.scales"] = "F16", scale.reshape(scales.shape)
    arrays[f"{base}.biases"] = "F16", bias.reshape(biases.shape)


WARNINGS = {
    "half_written_shard",
    "label_of_no_module",
    "the_labels_once_more",
    "the_simple_formula",
}  # named, but a bundle works with them


@pytest.fixture(scope="module")
def torn(good, tmp_path_factory) -> Path:
    """The good bundle over four shards."""
    return bundles.split(good, tmp_path_factory.mktemp("torn") / "bundle")


@pytest.fixture(scope="module")
def elsewhere(good, tmp_path_factory) -> Path:
    """The good bundle without the requantizer's marks."""
    return bundles.split(good, tmp_path_factory.mktemp("elsewhere") / "bundle", marks=False)


def test_there_are_enough_mutations():
    assert len(MUTATIONS) >= 40


def test_the_good_bundle_passes(source, torn, elsewhere):
    for folder in (torn, elsewhere):
        assert bundles.judge(folder, source).names == set()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_named(name, source, torn, elsewhere, tmp_path):
    one = MUTATIONS[name]
    folder = shutil.copytree(elsewhere if one.elsewhere else torn, tmp_path / "bundle")
    one.change(folder)
    findings = bundles.judge(folder, source)
    assert one.fault in findings.names
    assert one.says in places(findings, one.fault)
    assert bool(findings.errors) == (name not in WARNINGS)


def test_defaults_that_change_nothing_and_the_sources_own_are_no_fault(source, good_copy, tmp_path):
    own = shutil.copytree(source, tmp_path / "source")
    told = {"temperature": 0.3, "top_p": 0.9, "do_sample": True}
    edit_json(own / "generation_config.json", lambda c: c.update(told, max_new_tokens=9000))
    same = {"min_p": 0, "repetition_penalty_chat": 1.0, "top_k": None, "temperature": 0.3}
    edit_json(good_copy / "jang_config.json", lambda c: c["chat"].update(sampling_defaults=same))
    edit_json(good_copy / "generation_config.json", lambda c: c.update(told, max_new_tokens=9000))
    assert not bundles.judge(good_copy, own, level=1).names
    assert bundles.judge(good_copy, None, level=1).names == {"answer-limit"}  # nobody else says it


def test_decoding_is_the_inverse_of_the_shards_bytes():
    assert as_float32(np.array([0x80, 0x3F], np.uint8), "BF16")[0] == 1
