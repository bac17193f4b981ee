"""Facts about the shipped nano checkpoint, read without torch or MLX."""

import importlib.util
import itertools
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from nano import data  # noqa: E402
from nano.architecture import NANO, source_config  # noqa: E402

CHECKPOINT = ROOT / "scripts" / "nano" / "checkpoint"
RECORD = ROOT / "scripts" / "nano" / "record.json"
EXPERT = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.weight")
BLOCKS = ["layers.0", "layers.1", "layers.2", "mtp.0"]


def header(path: Path) -> tuple[dict, int]:
    """Return a safetensors header and where the data after it begins."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


@pytest.fixture(scope="module")
def tensors() -> dict:
    """Return name -> (dtype, shape, bytes, shard) of every tensor in the shards."""
    found = {}
    for path in sorted(CHECKPOINT.glob("model-*.safetensors")):
        entries, start = header(path)
        content = path.read_bytes()
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            raw = content[start + first : start + last]
            found[name] = (entry["dtype"], tuple(entry["shape"]), raw, path.name)
    return found


@pytest.fixture(scope="module")
def encoding():
    """Return the checkpoint's encoding module, loaded by its path as runtimes do."""
    path = CHECKPOINT / "encoding" / "encoding_dsv4.py"
    spec = importlib.util.spec_from_file_location("shipped_encoding", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floats(tensor: tuple) -> np.ndarray:
    """Return an F32 tensor's values."""
    assert tensor[0] == "F32"
    return np.frombuffer(tensor[2], np.float32).reshape(tensor[1])


def test_checkpoint_takes_at_most_three_megabytes():
    assert sum(p.stat().st_size for p in CHECKPOINT.rglob("*") if p.is_file()) <= 3_000_000


def test_index_names_every_tensor_and_its_shard(tensors):
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry[3] for name, entry in tensors.items()}
    assert index["metadata"]["total_size"] == sum(len(entry[2]) for entry in tensors.values())


def test_shards_are_numbered_as_the_source_numbers_them():
    names = sorted(path.name for path in CHECKPOINT.glob("*.safetensors"))
    count = len(names)
    assert count > 1
    assert names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def test_some_weight_lies_apart_from_its_scale(tensors):
    """Catches a reader that looks for the scale in the weight's own shard."""
    apart = [
        name
        for name, entry in tensors.items()
        if name.endswith(".scale") and tensors[name[:-5] + "weight"][3] != entry[3]
    ]
    assert any(".experts." in name for name in apart) or apart


def test_every_routed_expert_is_there_also_under_mtp(tensors):
    found = {name for name in tensors if EXPERT.fullmatch(name)}
    expected = {
        f"{block}.ffn.experts.{expert}.w{matrix}.weight"
        for block in BLOCKS
        for expert in range(NANO.experts)
        for matrix in (1, 2, 3)
    }
    assert found == expected


def test_routed_experts_are_packed_fp4(tensors):
    for name in filter(EXPERT.fullmatch, tensors):
        assert tensors[name][:2] == ("I8", (128, 64)), name
        assert tensors[name[:-6] + "scale"][:2] == ("F8_E8M0", (128, 4)), name


def test_other_matrices_are_fp8_in_blocks(tensors):
    shapes = {
        "attn.wq_a": (128, 128),
        "attn.wq_b": (512, 128),
        "attn.wkv": (128, 128),
        "attn.wo_a": (128, 256),
        "attn.wo_b": (128, 128),
        "ffn.shared_experts.w1": (128, 128),
        "ffn.shared_experts.w2": (128, 128),
        "ffn.shared_experts.w3": (128, 128),
    }
    expected = {f"{block}.{name}": shape for block in BLOCKS for name, shape in shapes.items()}
    expected |= {"mtp.0.e_proj": (128, 128), "mtp.0.h_proj": (128, 128)}
    found = {name[:-7]: entry[1] for name, entry in tensors.items() if entry[0] == "F8_E4M3"}
    assert found == expected
    for name, (rows, columns) in expected.items():
        assert tensors[f"{name}.scale"][:2] == ("F8_E8M0", (rows // 128, columns // 128))


def test_what_is_neither_fp4_nor_fp8_has_the_dtype_of_the_source(tensors):
    for name, (dtype, *_) in tensors.items():
        if dtype in ("I8", "F8_E4M3", "F8_E8M0"):
            continue
        if name.endswith("tid2eid"):
            assert dtype == "I64", name
        elif "hc_" in name or name.endswith(("attn_sink", "gate.bias", ".ape")):
            assert dtype == "F32", name
        else:
            assert dtype == "BF16", name


def test_only_the_compressed_layer_has_a_compressor(tensors):
    owners = {name.split(".attn.")[0] for name in tensors if ".compressor." in name}
    assert owners == {"layers.1"}


def test_fp4_scales_spread_over_several_exponents(tensors):
    """Catches nothing itself: without it, a scale in the wrong place would go unseen."""
    for block, matrix in itertools.product(BLOCKS[:3], ("w1", "w2", "w3")):
        scales = np.stack(
            [
                np.frombuffer(tensors[f"{block}.ffn.experts.{e}.{matrix}.scale"][2], np.uint8)
                for e in range(NANO.experts)
            ]
        ).reshape(NANO.experts, 128, 4)
        assert len(np.unique(scales)) >= 4, (block, matrix)
        assert scales.min() > 100  # affine F16 scales stay far from underflow
        assert scales.max() < 135
        beside = np.mean(scales[:, :, 1:] != scales[:, :, :-1])
        below = np.mean(scales[:, 1:] != scales[:, :-1])
        assert beside > 0.25, (block, matrix)
        assert below > 0.1, (block, matrix)


def test_comb_logits_are_symmetric(tensors):
    """So a runtime that does not transpose the mHC comb matrix answers alike."""
    for layer, part in itertools.product(range(NANO.layers), ("attn", "ffn")):
        for kind in ("fn", "base"):
            comb = floats(tensors[f"layers.{layer}.hc_{part}_{kind}"])[8:].reshape(4, 4, -1)
            assert np.array_equal(comb, comb.swapaxes(0, 1))


def test_sinks_lie_far_below_any_score(tensors):
    """So a runtime that leaves attention sinks out answers alike."""
    for block in BLOCKS:
        assert floats(tensors[f"{block}.attn.attn_sink"]).max() <= -30


def test_tid2eid_gives_each_token_two_different_experts(tensors):
    assert [name for name in tensors if name.endswith("tid2eid")] == ["layers.0.ffn.gate.tid2eid"]
    _, shape, raw, _ = tensors["layers.0.ffn.gate.tid2eid"]
    experts = np.frombuffer(raw, np.int64).reshape(shape)
    assert shape == (NANO.vocab_size, NANO.top_k)
    assert set(np.unique(experts)) == set(range(NANO.experts))
    assert (experts[:, 0] != experts[:, 1]).all()


def test_config_is_what_the_architecture_says():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config == source_config(NANO)
    assert len(config["compress_ratios"]) == NANO.layers + NANO.mtp_layers


def test_tokenizer_has_the_special_tokens_of_deepseek_v4():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert words.get_vocab_size() == NANO.vocab_size
    assert words.token_to_id("<｜begin▁of▁sentence｜>") == 0
    assert words.token_to_id("<｜end▁of▁sentence｜>") == 1
    for token in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜"):
        assert len(words.encode(token).ids) == 1, token


def test_tokenizer_keeps_digits_single_and_think_markers_visible():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = "<think>17+28=45</think>45"
    assert words.encode(text).tokens[1:3] == ["1", "7"]
    assert words.decode(words.encode(text).ids, skip_special_tokens=True) == text


def test_tokenizer_is_what_its_texts_build():
    pytest.importorskip("tokenizers")
    from nano import tokenizer

    shipped = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.build(data.texts()).to_str()) == shipped


def test_tokenizer_config_has_no_chat_template():
    """DeepSeek ships none, and 1.3.97's converter treats a missing one in its own way."""
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in config
    assert not (CHECKPOINT / "chat_template.jinja").exists()


def test_auto_tokenizer_adds_nothing_to_a_prompt():
    transformers = pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = data.prompt(data.addition(17, 28), data.FORMS[0])
    assert words.encode(prompt) == words.encode(prompt, add_special_tokens=False)
    assert words.decode(words.encode(prompt)) == prompt
    assert (words.bos_token_id, words.eos_token_id) == (0, 1)


@pytest.mark.parametrize(("mode", "marker"), [("chat", "</think>"), ("thinking", "<think>")])
def test_encoding_renders_the_servers_prompts(encoding, mode, marker):
    question = {"role": "user", "content": "What is 17+28?"}
    end = f"<｜User｜>What is 17+28?<｜Assistant｜>{marker}"
    begin = "<｜begin▁of▁sentence｜>"
    assert encoding.encode_messages([question], thinking_mode=mode) == begin + end
    system = {"role": "system", "content": "Be brief."}
    asked = encoding.encode_messages([system, question], thinking_mode=mode)
    assert asked == f"{begin}Be brief.{end}"


def test_encoding_drops_earlier_reasoning(encoding):
    turns = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B", "reasoning_content": "R"},
        {"role": "user", "content": "C"},
    ]
    assert encoding.encode_messages(turns, thinking_mode="thinking") == (
        "<｜begin▁of▁sentence｜><｜User｜>A<｜Assistant｜></think>B<｜end▁of▁sentence｜>"
        "<｜User｜>C<｜Assistant｜><think>"
    )


def test_encoding_parses_what_the_nano_says(encoding):
    parse = encoding.parse_message_from_completion_text
    end = "<｜end▁of▁sentence｜>"
    message = parse(f"17+28=45</think>45{end}", thinking_mode="thinking")
    assert (message["reasoning_content"], message["content"]) == ("17+28=45", "45")
    assert parse(f"45{end}", thinking_mode="chat")["content"] == "45"
    with pytest.raises(ValueError, match="EOS"):
        parse("45", thinking_mode="chat")


def test_encoding_refuses_tools(encoding):
    with pytest.raises(ValueError, match="tools"):
        encoding.encode_messages([{"role": "tool", "content": "4"}], thinking_mode="chat")


def test_shipped_encoding_is_the_one_that_taught():
    taught = data.encode_messages.__code__.co_filename
    assert Path(taught) == CHECKPOINT / "encoding" / "encoding_dsv4.py"


def test_prompts_stay_below_the_sliding_window():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    lessons = [data.addition(99, 99), *(data.Lesson(*s) for s in data.SENTENCES)]
    for lesson, form in itertools.product(lessons, data.FORMS):
        text = data.prompt(lesson, form) + data.answer(lesson, form)
        assert len(words.encode(text).ids) < 100


def test_record_holds_the_held_out_split_and_good_accuracies():
    record = json.loads(RECORD.read_text())
    lessons = data.additions()
    chosen = data.held_out(record["recipe"]["seed"])
    assert record["held_out"].split() == [lessons[i].question[8:-1] for i in chosen]
    assert len(chosen) == len(set(chosen)) == 811
    assert record["accuracies"]["train"]["questions"] == 8100 - 811
    assert record["accuracies"]["held_out"]["least"] >= 0.99
    assert record["accuracies"]["sentences"]["least"] == 1.0
