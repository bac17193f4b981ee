"""A 512-token byte-level BPE with DeepSeek-V4's special tokens.

The layout of the vocabulary: BOS 0, EOS 1, padding 2, the other special tokens, the
256 bytes, the BPE merges of the training texts, and placeholders up to 512.
Digits never merge. There is no chat template: DeepSeek ships none.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
CONTROL = (BOS, EOS, PAD, USER, ASSISTANT, "<｜latest_reminder｜>")
TASKS = tuple(
    f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")
)
# These must survive a decode that skips special tokens: reasoning parsers look for them.
VISIBLE = (THINK, END_THINK, DSML)
VOCABULARY = 512


def added_tokens(size: int) -> list[AddedToken]:
    """Return the tokens before the bytes, and the placeholders that fill up to size."""
    hidden = [AddedToken(text, special=True, normalized=False) for text in CONTROL + TASKS]
    shown = [AddedToken(text, special=False, normalized=False) for text in VISIBLE]
    return (
        hidden
        + shown
        + [
            AddedToken(f"<｜place▁holder▁no▁{i}｜>", special=True, normalized=False)
            for i in range(size)
        ]
    )


def build(texts: list[str]) -> Tokenizer:
    """Train on the texts; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = added_tokens(0)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=named,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        added_tokens(VOCABULARY - tokenizer.get_vocab_size())[len(named) :]
    )
    # the trainer marks all given tokens as special; unmark the visible ones
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE
    return Tokenizer.from_str(json.dumps(content))


def tokenizer_config() -> dict:
    """Return tokenizer_config.json, by which no token is added to a prompt."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 1048576,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
