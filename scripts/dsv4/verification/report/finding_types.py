"""The catalogue of verify's findings: name → why the fault matters, and what repairs it.

The names never change: users and verify.json refer to them.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class FindingType:
    """Why a fault matters, what repairs it, and whether verify fails because of it."""

    why: str
    repair: str
    severity: str = ERROR


CONVERT = "delete the bundle, then make convert and the stages after it"
# Replaces CONVERT and the like for a bundle that this recipe did not make.
MAKER = "not repairable here: tell its maker, or make a bundle from the source: make all"
REQUANTIZE = "make requantize"
REPAIR = "make repair"
FROM_SOURCE = "make repair SOURCE=…, the FP4/FP8 source"
EXPERTS = "make repair SOURCE=… for a routed expert; for another module, convert again"
OTHER_FINDINGS = "repair the other findings, then make verify again"
RESTORE = "fetch this file again, or make the bundle again"

# Repair → name → why.
ERRORS = {
    RESTORE: {
        "config-broken": "No runtime can load a bundle without a readable config.json.",
        "shard-missing": "Loaders load the shards that are there and report no error.",
        "shard-broken": "The file is truncated, or its header is not a safetensors header.",
    },
    REPAIR: {
        "index-broken": "Runtimes find tensors by the index.",
        "index-entry-dangling": "The index names a tensor that does not exist.",
        "index-entry-missing": "The index does not name a tensor that exists.",
        "index-entry-wrong": "The index names another shard than the tensor's.",
        "generation-config-broken": "mlx_lm and mlx-vlm read the stop tokens from it.",
        "eos-wrong": "A runtime without the right stop tokens generates until max_tokens.",
        "chat-template-missing": "vMLX 1.3.97 falls back to a template that never opens <think>.",
        "chat-template-wrong": "The model was trained on another prompt format; answers are wrong.",
        "chat-template-file-missing": "mlx-vlm reads only chat_template.jinja; transformers and "
        "mlx_lm prefer it.",
        "chat-templates-differ": "Some runtimes read chat_template.jinja, others "
        "tokenizer_config.json: they give the model different prompts.",
        "chat-template-incomplete": "Tools, thinking or efforts do not reach the model as it was "
        "trained; an agent gets a model without tools, and no error.",
        "answer-limit": "An answer to a request without max_tokens ends after this many tokens, "
        "thinking included.",
        "effort-levels-wrong": "vMLX 1.6.81 answers HTTP 400 to a reasoning_effort that "
        "jang_config.json does not list.",
        "sampling-differs": "vMLX 1.6.81 and mlx-vlm prefer this to generation_config.json, which "
        "has another value.",
        "jang-config-group-size": "vMLX 1.6.81 assumes groups of 64 unless jang_config.json says "
        "32.",
        "label-absent": "Without `quantization` runtimes assume 2 bits in groups of 64.",
        "label-two-dicts": "quantization_config differs from quantization, and runtimes differ in "
        "which they read.",
        "label-bits-wrong": "The label's bits are not the tensors': 4-bit codes read as 8-bit are "
        "noise.",
        "label-mode-wrong": "The label's mode is not the tensors'.",
        "label-group-wrong": "The label's group size is not the tensors'.",
        "label-missing": "A runtime that finds no label for a module uses the top-level one.",
        "label-for-plain": "A label for a module whose tensor is not quantized: mlx_lm and mlx-vlm "
        "refuse to load it.",
        "scales-without-label": "FP4 or FP8 codes with U8 scales, without the right mode under a "
        "name that a runtime looks up: vMLX 1.6.81 answers garbage and reports no error, others "
        "refuse to load.",
        "tokenizer-outcome": "A runtime's tokenizer makes other tokens, text or prompts than the "
        "tokenizer.json that the model was trained with.",
        "runtime-family": "A runtime takes the bundle for another model's.",
        "runtime-parser": "A runtime reads answers by another format than DeepSeek's: thoughts or "
        "tool calls stay in the text, or text is lost.",
        "runtime-cache": "A runtime chooses another cache than for DeepSeek-V4.",
        "runtime-default": "A request that sets nothing is sampled, or ends, otherwise than "
        "generation_config.json says.",
        "runtime-refuses": "A runtime stops on these documents.",
        "turbo-config-wrong": "vMLX decodes TurboQuant by these keys: another seed gives noise.",
        "turbo-sidecar-wrong": "vMLX in Swift reads TurboQuant's signs and levels from it.",
    },
    FROM_SOURCE: {
        "encoding-missing": "vMLX 1.6.81 builds prompts with encoding/encoding_dsv4.py.",
        "encoding-differs": "vMLX runs encoding/encoding_dsv4.py when it serves; this is not the "
        "source's.",
        "tokenizer-missing": "Without a tokenizer, text cannot become tokens.",
        "tokenizer-differs": "Text becomes other tokens than the model was trained on.",
        "tokenizer-config-broken": "Runtimes read the chat template from it.",
        "tokenizer-config-differs": "Runtimes read special tokens, and whether to add them to a "
        "prompt, from it.",
        "special-tokens-differ": "transformers reads special tokens from special_tokens_map.json.",
        "special-token-wrong": "Runtimes begin and end a prompt with these tokens; files "
        "contradict one another.",
        "generation-config-differs": "Runtimes sample by generation_config.json; this is not the "
        "source's.",
        "token-out-of-range": "A token's id lies beyond the embedding: looking it up gives garbage "
        "or stops the server.",
        "controls-rounded": "Routing and residual mixing need F32 controls; vMLX 1.6.81 refuses "
        "the bundle.",
        "stock-experts": "FP4 bytes with U8 scales and no biases under an affine label, as "
        "upstream's converter writes them: decoded as affine they are noise, and the model "
        "repeats BOS.",
        "u8-scales-beside-biases": "Old U8 exponents stand beside new biases: a requantization "
        "was interrupted.",
    },
    CONVERT: {
        "config-differs": "The model is built by config.json; this one builds another model.",
        "marks-mixed": "Shards were made from different sources or by different quantizers.",
        "tensor-twice": "Which of two tensors of one name is loaded depends on the order of files.",
        "tensor-missing": "A parameter keeps its random or zero initial value.",
        "tensor-extra": "No tensor of the source corresponds to it.",
        "layout-mixed": "Tensors have names of two naming schemes; each loader takes those that it "
        "knows.",
        "expert-missing": "Experts are stacked: a missing one stops the load.",
        "expert-extra": "There are more experts than config.json counts.",
        "shape-wrong": "The tensor does not have the shape of its source.",
        "dtype-wrong": "The tensor does not have the dtype that runtimes expect.",
        "loader-tensor-unused": "A tensor of the bundle reaches no parameter.",
        "module-differs": "A module does not hold the source's weights.",
        "module-imprecise": "The error of a whole tensor is larger than its mode and width give.",
        "passthrough-differs": "A norm, router weight or table is not the source's in F16, or its "
        "integers.",
        "nothing-checked": "A check that found nothing to check proves nothing.",
    },
    EXPERTS: {
        "triple-incomplete": "A quantized module needs weight, scales and biases.",
        "triple-misfit": "Dtypes or shapes of weight, scales and biases fit no bits × group.",
    },
    REQUANTIZE: {
        "experts-zero": "Experts of zeros output zeros; the answer is garbage without an error.",
        "nan-or-inf": "One NaN reaches every logit.",
        "turbo-stack-hidden": "vMLX looks for TurboQuant's stacks of experts in the first shard "
        "only; without one there it reports no error, and experts keep their initial values.",
        "expert-differs": "A routed expert is not what its quantizer makes of the source.",
        "expert-beyond-bound": "A weight is farther from the source than its quantizer's error "
        "bound.",
        "expert-level-wrong": "A weight's level is not the one nearest to the source.",
        "expert-imprecise": "The error of a whole tensor is larger than its quantizer gives.",
        "zeros-lost": "Zeros of the source do not decode to zero (scale = (max - min)/15, as in "
        "mxfp4_to_affine.py).",
        "rounded": "The bundle is recorded as lossless, and a number of the source was rounded.",
        "control-differs": "A control tensor is not the source's, bit for bit.",
    },
    OTHER_FINDINGS: {
        "loader-parameter-unfed": "After loading, a parameter still has its initial value; "
        "strict=False hides it.",
        "loader-parameter-misfit": "A parameter receives a tensor of another shape or kind than "
        "its module computes with.",
        "loader-fails": "The runtime's own loader stops on these headers.",
        "not-compared": "A source tensor was not compared, because its counterpart is incomplete.",
    },
    "do not load this bundle; make repair removes the key": {
        "config-runs-code": "A key names code that loaders import and run; verify ran none of it.",
    },
    "make repair (it moves a file there to .before-repair; a folder: move it out)": {
        "shard-stranger": "MLX loads every model*.safetensors that it finds, over the right "
        "tensors.",
    },
    "none: use the tools of that model": {
        "another-model": "Only bundles of DeepSeek-V4 are checked; V4.1 (deepseek_v41) is another "
        "model.",
    },
    "do not use this bundle": {
        "index-unsafe-path": "An entry leads out of the folder.",
    },
    "none: add the names to scripts/dsv4/model/naming_schemes.py, or ask its maker": {
        "layout-unknown": "Most tensors have names of no known naming scheme; their content was "
        "not checked.",
    },
    "make download VERIFY_HASHES=1, then convert again": {
        "zeros-run": "Zeros where no model has any: a hole that a download left, in this file or "
        "its source.",
    },
    "take these tensors from the release that the source is a copy of, then convert again": {
        "source-implausible": "Values of the source that cannot be weights, as when a scale was "
        "dropped; the model outputs noise.",
    },
    "compare it with its source: make verify SOURCE=…": {
        "weights-implausible": "Values that cannot be weights: the bundle, or its source, was "
        "destroyed; the model outputs noise.",
    },
    "make download VERIFY_HASHES=1": {
        "source-broken": "The source holds NaN or an exponent of 255.",
    },
    "make patch_loader": {
        "loader-unpatched": "jang_tools 2.5.8 and 2.5.9 overwrite the module-path labels at load "
        "time.",
    },
    "reinstall jang, then make patch_loader": {
        "loader-unknown": "The installed loader is neither the known one nor the patched one.",
    },
    "name a Python with jang_tools and mlx_lm: --python; or say --without-loader": {
        "loader-not-checked": "The runtime's own loader was not run on these headers.",
    },
}
WARNINGS = {
    REPAIR: {
        "eos-few": "The model stops only at the end of sentence, not at a <｜User｜> that it may "
        "write.",
        "label-twice": "quantization_config repeats quantization, as mlx_lm writes it: one of the "
        "two copies may be edited without the other.",
        "label-at-top-only": "Only the top level says how a module is stored; every known runtime "
        "reads it there, and one that does not would read noise.",
        "label-stray": "A label for a module that has no tensor.",
    },
    "make repair (it removes them)": {
        "leftover-files": "An interrupted run left half-written files, which take space.",
    },
    "read that file before you serve, or make repair SOURCE=…": {
        "encoding-unknown": "vMLX runs encoding/encoding_dsv4.py when it serves: this code is none "
        "of DeepSeek's known files.",
    },
    "make patch RELEASE=first, or RELEASE=0731": {
        "encoding-release-unknown": "Nothing in encoding/encoding_dsv4.py tells its release; the "
        "chat template and the reasoning efforts are the first release's.",
    },
    "move it out of the bundle": {
        "file-unhashed": "A file that no runtime reads is larger than any document; it was not "
        "read.",
    },
    "none needed; a bundle of the source's own codes is as large and exact": {
        "quantized-again": "The mode can hold the source's own numbers; they were quantized again, "
        "with loss.",
    },
    "none needed": {
        "module-other-device": "8-bit modules were quantized on another device than a CPU: right, "
        "but not byte for byte.",
        "zeros-moved": "Zeros of the source do not decode to zero, as mx.quantize's would; the "
        "experts are another quantizer's.",
        "expert-other-device": "Experts were quantized on another device than a CPU: right, but "
        "not byte for byte.",
    },
    "name the imatrix that it was made with, if any: make verify IMATRIX=FILE; or requantize": {
        "quantizer-unknown": "The shards name a quantizer that this version does not have, or "
        "whose table it cannot reproduce, or they name none and follow no known formula; the "
        "weights were judged by the size of their errors.",
    },
}
FAULTS = {
    name: FindingType(why, repair, severity)
    for severity, repairs in ((ERROR, ERRORS), (WARNING, WARNINGS))
    for repair, reasons in repairs.items()
    for name, why in reasons.items()
}
