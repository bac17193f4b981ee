"""The catalogue of verify's findings, each under a name that does not change.

Each says in one line why the fault matters, and gives the command that repairs it.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class FindingType:
    """Why it matters, what repairs it, and whether verify fails because of it."""

    why: str
    repair: str
    severity: str = ERROR


CONVERT = "delete the bundle, then make convert and the stages after it"
# Of a bundle that somebody else made, in place of what would make or delete one of ours.
MAKER = "not mendable here: tell its maker, or make a bundle of the source: make all"
REQUANTIZE = "make requantize"
REPAIR = "make repair"
FROM_SOURCE = "make repair SOURCE=…, the FP4/FP8 source"
EXPERTS = "make repair SOURCE=… for a routed expert; for another module, convert again"
ABOVE = "repair what else is named here, then make verify again"
RESTORE = "fetch this file again, or make the bundle again"

FAULTS = {
    # Files and what they say.
    "config-broken": FindingType(
        "Nothing can load a bundle without a readable config.json.", RESTORE
    ),
    "config-runs-code": FindingType(
        "A key names code that loaders import and run; nothing of it was run here.",
        "do not load this bundle; make repair removes the key",
    ),
    "encoding-differs": FindingType(
        "vMLX runs encoding/encoding_dsv4.py when it serves; this is not the source's.",
        FROM_SOURCE,
    ),
    "config-differs": FindingType(
        "The model is built by config.json; another model is built.", CONVERT
    ),
    "index-broken": FindingType("Runtimes find tensors by the index.", REPAIR),
    "tokenizer-missing": FindingType("Text cannot become tokens.", FROM_SOURCE),
    "tokenizer-config-broken": FindingType("Runtimes read the chat template from it.", FROM_SOURCE),
    "encoding-missing": FindingType(
        "vMLX 1.6.81 builds prompts with encoding/encoding_dsv4.py.", FROM_SOURCE
    ),
    "generation-config-broken": FindingType(
        "mlx_lm and mlx-vlm read the stop tokens there.", REPAIR
    ),
    "eos-few": FindingType(
        "It stops at the end of sentence alone, not at a <｜User｜> that the model may write.",
        REPAIR,
        WARNING,
    ),
    "label-for-plain": FindingType(
        "A label for a module whose tensor is not quantized: mlx_lm and mlx-vlm then refuse it.",
        REPAIR,
    ),
    "eos-wrong": FindingType(
        "A runtime that does not know the stop tokens answers until max_tokens.", REPAIR
    ),
    "chat-template-missing": FindingType(
        "vMLX 1.3.97 falls back to a template that never opens <think>.", REPAIR
    ),
    "chat-template-wrong": FindingType(
        "The model was trained on another layout of turns; answers go astray.",
        REPAIR,
    ),
    "chat-template-file-missing": FindingType(
        "mlx-vlm reads chat_template.jinja and nothing else; transformers and mlx_lm prefer it.",
        REPAIR,
    ),
    "chat-templates-differ": FindingType(
        "Some runtimes take chat_template.jinja, others tokenizer_config.json: they differ in what "
        "they say to the model.",
        REPAIR,
    ),
    "chat-template-incomplete": FindingType(
        "Tools, thinking or efforts do not reach the model as it learned them; an agent gets a "
        "model without tools, and no error.",
        REPAIR,
    ),
    "encoding-unknown": FindingType(
        "vMLX runs encoding/encoding_dsv4.py when it serves: code that is none of DeepSeek's known "
        "files.",
        "read that file before you serve, or make repair SOURCE=…",
        WARNING,
    ),
    "tokenizer-differs": FindingType(
        "Text becomes other tokens than those that the model learned.", FROM_SOURCE
    ),
    "tokenizer-config-differs": FindingType(
        "Runtimes take special tokens and what is added to a prompt from it.", FROM_SOURCE
    ),
    "special-tokens-differ": FindingType(
        "transformers takes special tokens from special_tokens_map.json.", FROM_SOURCE
    ),
    "special-token-wrong": FindingType(
        "Runtimes begin and end a prompt by these tokens; files contradict one another.",
        FROM_SOURCE,
    ),
    "generation-config-differs": FindingType(
        "Runtimes sample by generation_config.json; this is not the source's.", FROM_SOURCE
    ),
    "answer-limit": FindingType(
        "An answer to a request without max_tokens ends after so many tokens, thinking included.",
        REPAIR,
    ),
    "sampling-differs": FindingType(
        "vMLX 1.6.81 and mlx-vlm take this before generation_config.json, which says otherwise.",
        REPAIR,
    ),
    "token-out-of-range": FindingType(
        "A token's id lies beyond the embedding: reading it gives garbage, or stops the server.",
        FROM_SOURCE,
    ),
    "jang-config-group-size": FindingType(
        "vMLX 1.6.81 assumes groups of 64 unless jang_config.json says 32.", REPAIR
    ),
    "leftover-files": FindingType(
        "A run was killed here; its half-written files take space.",
        "make repair (it removes them)",
        WARNING,
    ),
    "file-unhashed": FindingType(
        "A file that no runtime reads is larger than any document; it was not read.",
        "move it out of the bundle",
        WARNING,
    ),
    # Index and shards.
    "shard-missing": FindingType(
        "Loaders take the shards that are there, without a word.", RESTORE
    ),
    "shard-broken": FindingType("The file is cut, or its header is not safetensors'.", RESTORE),
    "shard-stranger": FindingType(
        "MLX loads every model*.safetensors that it finds, over the right tensors.",
        "make repair (it moves a file there to .before-repair; a folder: move it out)",
    ),
    "index-unsafe-path": FindingType("An entry leads out of the folder.", "do not use this bundle"),
    "index-entry-dangling": FindingType("The index names a tensor that is not there.", REPAIR),
    "index-entry-missing": FindingType("The index does not name a tensor that is there.", REPAIR),
    "index-entry-wrong": FindingType("The index leads to another shard than the tensor's.", REPAIR),
    "tensor-twice": FindingType(
        "Which of two tensors of one name is loaded depends on the order of files.", CONVERT
    ),
    "marks-mixed": FindingType(
        "Shards were made of different sources or by different quantizers.", CONVERT
    ),
    # Tensors by their headers.
    "tensor-missing": FindingType("A parameter keeps its random or zero start value.", CONVERT),
    "layout-unknown": FindingType(
        "Most tensors have names of no known layout; what they hold was not judged.",
        "none: teach the names to scripts/dsv4/model/naming_schemes.py, or ask its maker",
    ),
    "layout-mixed": FindingType(
        "Tensors have the names of two layouts; each loader takes those that it knows.", CONVERT
    ),
    "tensor-extra": FindingType("No tensor of the source leads to it.", CONVERT),
    "expert-missing": FindingType("Experts are stacked: one that lacks stops the load.", CONVERT),
    "expert-extra": FindingType("More experts than config.json counts.", CONVERT),
    "triple-incomplete": FindingType(
        "A quantized module needs weight, scales and biases.", EXPERTS
    ),
    "triple-misfit": FindingType(
        "Dtypes or shapes of weight, scales and biases fit no bits × group.", EXPERTS
    ),
    "shape-wrong": FindingType("The tensor has not the shape of its source.", CONVERT),
    "dtype-wrong": FindingType("The tensor has not the dtype that runtimes expect.", CONVERT),
    "controls-rounded": FindingType(
        "Routing and residual mixing need F32 controls; vMLX 1.6.81 refuses the bundle.",
        FROM_SOURCE,
    ),
    # Known failures of whole bundles.
    "stock-experts": FindingType(
        "FP4 bytes with U8 scales and no biases under an affine label, as upstream's converter "
        "leaves them: decoded as affine they are noise, and the model says BOS forever.",
        FROM_SOURCE,
    ),
    "u8-scales-beside-biases": FindingType(
        "Old U8 exponents stand beside new biases: a requantization that stopped half-way.",
        FROM_SOURCE,
    ),
    "experts-zero": FindingType(
        "Experts full of zeros give no output; the answer is garbage without an error.",
        REQUANTIZE,
    ),
    "zeros-run": FindingType(
        "Zeros where no model has any: a hole that a download left, in this file or its source.",
        "make download VERIFY_HASHES=1, then convert again",
    ),
    "nan-or-inf": FindingType("One NaN reaches every logit.", REQUANTIZE),
    # Labels.
    "label-absent": FindingType("Without `quantization` 2 bits × 64 are assumed.", REPAIR),
    "label-two-dicts": FindingType(
        "quantization_config beside quantization: runtimes differ in which they read.", REPAIR
    ),
    "label-twice": FindingType(
        "quantization_config repeats quantization, as mlx_lm writes it: two copies that can part.",
        REPAIR,
        WARNING,
    ),
    "label-bits-wrong": FindingType(
        "The label's bits are not the tensors': 4-bit codes read as 8-bit are noise.", REPAIR
    ),
    "label-mode-wrong": FindingType("The label's mode is not the tensors'.", REPAIR),
    "label-group-wrong": FindingType("The label's group size is not the tensors'.", REPAIR),
    "label-missing": FindingType(
        "A runtime that finds no label for a module falls back to the top level.", REPAIR
    ),
    "scales-without-label": FindingType(
        "FP4 or FP8 codes with U8 scales, and no right mode under a name that a runtime looks up: "
        "vMLX 1.6.81 answers garbage without a word, others refuse.",
        REPAIR,
    ),
    "label-at-top-only": FindingType(
        "The top level alone says how a module is stored; every known runtime reads it there, and "
        "one without that would read noise.",
        REPAIR,
        WARNING,
    ),
    "label-stray": FindingType("A label for a module that no tensor belongs to.", REPAIR, WARNING),
    # The real loader on this bundle's headers.
    "turbo-stack-hidden": FindingType(
        "vMLX looks for TurboQuant's stacks of experts in the first shard alone; else they keep "
        "their start values, without a word.",
        REQUANTIZE,
    ),
    "turbo-config-wrong": FindingType(
        "vMLX decodes TurboQuant by these keys: another seed gives noise.", REPAIR
    ),
    "turbo-sidecar-wrong": FindingType(
        "vMLX in Swift takes TurboQuant's signs and levels there.", REPAIR
    ),
    "loader-unpatched": FindingType(
        "jang_tools 2.5.8 and 2.5.9 overwrite the module-path labels at load time.",
        "make patch_loader",
    ),
    "loader-unknown": FindingType(
        "The installed loader is neither the known one nor the patched one.",
        "reinstall jang, then make patch_loader",
    ),
    "loader-parameter-unfed": FindingType(
        "After loading, a parameter still has its start value; strict=False hides it.", ABOVE
    ),
    "loader-parameter-misfit": FindingType(
        "A parameter receives a tensor of another shape or kind than its module computes with.",
        ABOVE,
    ),
    "loader-tensor-unused": FindingType("A tensor of the bundle reaches no parameter.", CONVERT),
    "loader-fails": FindingType("The runtime's own loader stops on these headers.", ABOVE),
    "loader-not-checked": FindingType(
        "What the runtime makes of the labels was not replayed.",
        "name a Python with jang_tools and mlx_lm: --python; or say --without-loader",
    ),
    # Numbers, against the source.
    "expert-differs": FindingType(
        "A routed expert does not hold what its quantizer makes of the source.", REQUANTIZE
    ),
    "expert-beyond-bound": FindingType(
        "A weight lies farther from the source than its quantizer ever puts it.", REQUANTIZE
    ),
    "expert-level-wrong": FindingType(
        "A weight's level is not the one that comes nearest to the source.", REQUANTIZE
    ),
    "expert-imprecise": FindingType(
        "The error of a whole tensor is larger than its quantizer gives.", REQUANTIZE
    ),
    "zeros-lost": FindingType(
        "Zeros of the source are not zero any more (scale = (max - min)/15, as in "
        "mxfp4_to_affine.py).",
        REQUANTIZE,
    ),
    "rounded": FindingType(
        "The bundle says that it is lossless, and a number of the source was rounded.", REQUANTIZE
    ),
    "quantized-again": FindingType(
        "The mode could hold the source's own numbers; they were quantized once more, with loss.",
        "none needed; a bundle of the source's own codes is as large and exact",
        WARNING,
    ),
    "module-differs": FindingType("A module does not hold the source's weights.", CONVERT),
    "module-imprecise": FindingType(
        "The error of a whole tensor is larger than its mode and width give.", CONVERT
    ),
    "module-other-device": FindingType(
        "8-bit modules were quantized on another device than a CPU: right, but not byte for byte.",
        "none needed",
        WARNING,
    ),
    "expert-other-device": FindingType(
        "Experts were quantized on another device than a CPU: right, but not byte for byte.",
        "none needed",
        WARNING,
    ),
    "quantizer-unknown": FindingType(
        "The shards name a quantizer that this version does not have, or a table of it that it "
        "cannot make again; the experts are judged by the size of their errors.",
        "name the imatrix that it was made with, if any: make verify IMATRIX=FILE; or requantize",
        WARNING,
    ),
    "control-differs": FindingType(
        "A control tensor is not the source's, bit for bit.", REQUANTIZE
    ),
    "passthrough-differs": FindingType(
        "A norm, router weight or table is not the source's in F16, or its integers.", CONVERT
    ),
    "not-compared": FindingType(
        "A source tensor was not compared, because its counterpart is not whole.", ABOVE
    ),
    "source-broken": FindingType(
        "The source holds NaN or an exponent of 255.", "make download VERIFY_HASHES=1"
    ),
    "nothing-checked": FindingType("A check that looked at nothing proves nothing.", CONVERT),
}
