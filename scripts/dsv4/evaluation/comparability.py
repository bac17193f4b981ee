"""Check that bundle and source have one architecture and one tokenizer; tokenize the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model.json_schemas import FORMS
from dsv4.model.special_tokens import BOS, token_ids
from dsv4.storage import limits
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.text import short_repr

HERE = Path(__file__).resolve().parent
CALIBRATION, EVALUATION = HERE / "calibration.txt", HERE / "evaluation.txt"
# Fields of config.json that the runtimes' models read. Other fields may differ.
SHAPING = (
    "num_hidden_layers", "hidden_size", "vocab_size", "n_routed_experts", "num_experts_per_tok",
    "n_shared_experts", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups", "compress_ratios",
    "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "num_hash_layers",
    "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor", "swiglu_limit",
    "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta", "rope_scaling",
    "compress_rope_theta", "max_position_embeddings",
)  # fmt: skip
COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "hc_mult")


def check_pair(bundle: Checkpoint, source: Checkpoint) -> None:
    """Raise UserError when the bundle has another architecture or tokenizer than the source."""
    if not isinstance(bundle.config.get("quantization"), dict):
        raise UserError(f"{bundle.folder / 'config.json'}", "no quantization", "a bundle's labels",
                   "check SOURCE and BUNDLE")  # fmt: skip
    turbo = next((name for name in bundle.tensors if name.endswith(".tq_packed")), None)
    if turbo:
        raise UserError(
            f"{bundle.folder}: {turbo}",
            "experts in TurboQuant, which needs vMLX's kernels",
            "a mode of MLX's own",
            "compare another QUANTIZER",
        )
    for key in SHAPING:
        found, expected = bundle.config.get(key), source.config.get(key)
        if found != expected:
            raise UserError(
                f"{bundle.folder / 'config.json'}: {key}", short_repr(found),
                f"{short_repr(expected)} as in the source", "compare a bundle with its own source",
            )  # fmt: skip
    if tokenizer_of(bundle.folder) != tokenizer_of(source.folder):
        raise UserError(f"{bundle.folder / 'tokenizer.json'}", "another tokenizer", "the source's",
                   "make repair, or compare it with its own source")  # fmt: skip


def check_counts(checkpoint: Checkpoint) -> None:
    """Raise UserError when a field of COUNTS is not a positive integer below 2**24."""
    for key in COUNTS:
        value: Any = checkpoint.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
            raise UserError(f"{checkpoint.folder / 'config.json'}: {key}", short_repr(value),
                       "a whole number", "restore config.json")  # fmt: skip


def tokenizer_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "tokenizer.json", FORMS["tokenizer.json"])


def tokens_of(source: Checkpoint, text: Path, most: int | None) -> list[int]:
    """Return BOS and the text's tokens, at most `most` in all.

    Raises UserError when the text has fewer than two tokens, and for a tokenizer that cannot be
    read or has tokens beyond vocab_size.
    """
    if not text.is_file():
        raise UserError(f"{text}", "no such file", "a text", "check TEXT")
    try:
        content = limits.read_bounded(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{text}", "no UTF-8", "a text", "check TEXT") from error
    encoded = encode_text(source.folder / "tokenizer.json", content)
    ids = [*token_ids(source.folder, (BOS,)), *encoded]
    if len(ids) < 3:
        raise UserError(f"{text}", f"{len(ids) - 1} tokens", "two or more", "check TEXT")
    if max(ids) >= source.config["vocab_size"]:
        raise UserError(f"{source.folder / 'tokenizer.json'}", f"token {max(ids)}",
                   f"less than vocab_size, {source.config['vocab_size']}",
                   "fetch the source again")  # fmt: skip
    return ids[:most]


def encode_text(tokenizer: Path, text: str) -> list[int]:
    """Return the text's token ids; the form of tokenizer.json is validated first."""
    from tokenizers import Tokenizer

    read_json(tokenizer, FORMS["tokenizer.json"])
    try:
        return Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises nothing more special
        raise UserError(
            f"{tokenizer}", f"{error}", "a tokenizer", "fetch the source again"
        ) from error
