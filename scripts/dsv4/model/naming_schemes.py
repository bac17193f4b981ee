"""The names that makers of DeepSeek-V4 bundles give to the source's tensors, and their shapes.

One table for each naming scheme, one line for each name: the source's on the left, the bundle's on
the right. What follows (`.weight`, `.scales` …) is the same on both sides. N is the number of a
layer, E of an expert, * stands for letters. If the right side lacks the E, experts are stacked
along a new first axis. If it has a G that the left side lacks, a matrix is split into blocks of
rows. A matrix with three axes where the source has two holds the same rows in groups (`attn.wo_a`).
The first line that matches a source name counts, so each name has one counterpart. The way back
uses the same lines from right to left. A new scheme is one more table.

The names were taken from the programs that write them: jang 2.5.50, mlx-vlm 0.7.10, and the
branches of mlx-lm of spring 2026 (mlx-lm#1192, omlx#2145).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dsv4.model.names import PROJECTION, treatment

MLX_LM, MLX_VLM, VMLX = "mlx_lm and vMLX 1.3.97", "mlx-vlm", "vMLX 1.6.81"
RUNTIMES = (MLX_LM, MLX_VLM, VMLX)
EXPERT = 0  # the number that stands for an open E when a name is looked up
# Names that differ in more than numbers. A bundle has two hundred; each takes a millisecond.
PATTERNS = 2_000
Line = tuple[str, str]


def pattern(side: str) -> re.Pattern[str]:
    """Return the pattern of one side of a line; `rest` is what follows the name."""
    text = re.escape(side).replace(r"\*", r"(?P<any>[a-z]+)")
    for token in "NEG":
        text = re.sub(rf"\b{token}\b", rf"(?P<{token}>[0-9]{{1,6}})", text)
    follows = r"(?P<rest>(?:\.[A-Za-z0-9_.]+)?)" if side else r"(?P<rest>.+)"
    return re.compile(text + follows)


def fill_pattern(side: str, match: re.Match[str], **numbers: object) -> str:
    """Return a side of a line, filled with the other side's match; open tokens stay."""
    given = {key: value for key, value in match.groupdict().items() if value is not None}
    given |= {key: f"{value}" for key, value in numbers.items()}
    text = side.replace("*", given.get("any", "*"))
    return re.sub(r"\b([NEG])\b", lambda m: given.get(m[1], m[1]), text) + given["rest"]


@dataclass(frozen=True)
class SourcePlace:
    """The source tensor that a bundle's tensor holds: its name, with E for a stack of experts.

    block: of the rows that it is split into, which; None if it is whole.
    """

    name: str
    stacked: bool = False
    block: int | None = None


@dataclass(frozen=True)
class NamingScheme:
    """A naming scheme.

    name: in reports. who: the program that writes it. lines: the table. runtimes: those of RUNTIMES
    that are known to load it.
    """

    name: str
    who: str
    lines: tuple[Line, ...]
    runtimes: tuple[str, ...] = ()

    @cached_property
    def _sides(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        return [(pattern(source), pattern(bundle)) for source, bundle in self.lines]

    def runtime_name(self, name: str) -> str | None:
        """Return the bundle's name of a source tensor, with an open G; None if it is left out.

        >>> runtime_name = SCHEMES["mlx-vlm"].runtime_name
        >>> runtime_name("layers.3.ffn.experts.7.w2.weight")
        'language_model.model.layers.3.ffn.switch_mlp.down_proj.weight'
        >>> runtime_name("mtp.0.norm.weight")
        """
        for (_, bundle), (source, _) in zip(self.lines, self._sides, strict=True):
            if match := source.fullmatch(name):
                return fill_pattern(bundle, match)
        return None

    def locate(self, name: str) -> SourcePlace | None:
        """Return the place of a bundle's tensor in the source; None for a name of another scheme.

        >>> SCHEMES["mlx-lm, wo_a split"].locate("model.layers.3.attn.wo_a.7.weight")
        SourcePlace(name='layers.3.attn.wo_a.weight', stacked=False, block=7)
        """
        for (source, _), (_, bundle) in zip(self.lines, self._sides, strict=True):
            match = bundle.fullmatch(name)
            if match is None:
                continue
            open_name, numbers = fill_pattern(source, match), match.groupdict()
            one = fill_pattern(source, match, E=numbers.get("E") or EXPERT)
            back = (self.runtime_name(one) or "").replace(".G.", f".{numbers.get('G')}.")
            if back == name:
                block = int(numbers["G"]) if "G" in numbers else None
                return SourcePlace(open_name, "E" in re.findall(r"\bE\b", open_name), block)
        return None


def stacked(place: str, block: str = "layers.N", names: dict[str, str] = PROJECTION) -> list[Line]:
    """Return the lines of routed experts that are one tensor for each matrix of a layer."""
    return [(f"{block}.ffn.experts.E.{w}", f"{place}.{name}") for w, name in names.items()]


W = {w: w for w in PROJECTION}


def module_scheme(
    prefix: str,
    attn: str = "attn",
    ffn: str = "ffn",
    norms: tuple[str, str] = ("attn_norm", "ffn_norm"),
    hc: tuple[str, str] = ("attn_hc.*", "ffn_hc.*"),
    top: tuple[str, str, str] = ("model.embed_tokens", "lm_head", "model.hc_head.*"),
    experts: str = "switch_mlp",
    bias: str = "e_score_correction_bias",
    projections: dict[str, str] = PROJECTION,
    extra: tuple[Line, ...] = (),
) -> tuple[Line, ...]:
    """Return the lines of a scheme of module paths.

    experts: the name of a layer's experts, with E if each has its own tensors.
    """
    layer = f"{prefix}model.layers.N"
    routed = [(f"layers.N.ffn.experts.E.{w}", f"{layer}.{ffn}.{experts}.{name}")
              for w, name in projections.items()]  # fmt: skip
    shared = [(f"layers.N.ffn.shared_experts.{w}", f"{layer}.{ffn}.shared_experts.{name}")
              for w, name in PROJECTION.items()]  # fmt: skip
    return (
        *extra,
        *routed,
        *shared,
        ("embed", f"{prefix}{top[0]}"),
        ("head", f"{prefix}{top[1]}"),
        ("hc_head_*", f"{prefix}{top[2]}"),
        ("norm", f"{prefix}model.norm"),
        ("layers.N.hc_attn_*", f"{layer}.{hc[0]}"),
        ("layers.N.hc_ffn_*", f"{layer}.{hc[1]}"),
        ("layers.N.attn_norm", f"{layer}.{norms[0]}"),
        ("layers.N.ffn_norm", f"{layer}.{norms[1]}"),
        ("layers.N.ffn.gate.bias", f"{layer}.{ffn}.gate.{bias}"),
        ("layers.N.ffn", f"{layer}.{ffn}"),
        ("layers.N.attn", f"{layer}.{attn}"),
    )


SAME: Line = ("", "")
IMAGES = tuple((name, name) for name in ("vision", "aligner", "image_*"))
HC = ("hc_attn.*", "hc_ffn.*")
LLAMA = ("input_layernorm", "post_attention_layernorm")
JANG = {
    "attn": "self_attn", "ffn": "mlp", "norms": LLAMA, "hc": ("hc_attn_*", "hc_ffn_*"),
    "top": ("model.embed", "lm_head", "model.hc_head_*"), "bias": "bias",
}  # fmt: skip
SPLIT = ("layers.N.attn.wo_a", "model.layers.N.attn.wo_a.G")
# Of oMLX: MTP's layers, with a `block` between or without.
STAGES = tuple(
    (f"mtp.N.ffn.experts.E.{w}", f"mtp.N.{block}ffn.switch_mlp.{name}")
    for block in ("block.", "")
    for w, name in PROJECTION.items()
)

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        NamingScheme("storage names", "jang_tools and this recipe", (SAME,), RUNTIMES),
        NamingScheme(
            "jang, prestacked", "jang_tools' convert_dsv4_jangtq",
            (*stacked("layers.N.mlp.switch_mlp"), SAME), (MLX_LM, VMLX),
        ),
        NamingScheme(
            "mlx-serve", "ddalcu's mlx-serve",
            (*stacked("layers.N.ffn.experts", names=W),
             *stacked("mtp.N.ffn.experts", "mtp.N", W), SAME),
        ),
        NamingScheme(
            "mlx-vlm", "mlx_vlm convert",
            (*module_scheme("language_model."), *IMAGES), (MLX_VLM,),
        ),
        NamingScheme("mlx-lm, attn_hc", "a branch of mlx-lm", module_scheme(""), (MLX_VLM,)),
        NamingScheme("mlx-lm, hc_attn", "a branch of mlx-lm (omlx#2145)", module_scheme("", hc=HC)),
        NamingScheme(
            "mlx-lm, wo_a split", "a branch of mlx-lm (mlx-lm#1192)",
            module_scheme("", hc=HC, experts="experts", projections=W, extra=(SPLIT,),
                    top=("model.embed", "model.head", "model.hc_head.*")),
        ),
        NamingScheme(
            "oMLX", "oMLX's oQ",
            (*module_scheme("", hc=HC, extra=(*STAGES[3:],)), ("mtp", "mtp")),
        ),
        NamingScheme(
            "oMLX, blocks", "oMLX's oQ",
            (*module_scheme("", hc=HC, extra=(*STAGES[:3],)), ("mtp", "mtp")),
        ),
        NamingScheme(
            "Thump604, hc_attn", "Thump604",
            module_scheme("", "self_attn", "mlp", LLAMA, HC),
        ),
        NamingScheme(
            "Thump604, attn_hc", "Thump604",
            module_scheme("", "self_attn", "mlp", LLAMA),
        ),
        NamingScheme(
            "mlx_lm, jang's model", "mlx_lm convert with jang's model",
            module_scheme("", **JANG),
        ),
        NamingScheme(
            "jang, native", "jang_tools' convert_dsv4_native",
            module_scheme("", **JANG, experts="experts.E"),
        ),
    )
}  # fmt: skip
STORAGE = SCHEMES["storage names"]


@dataclass(frozen=True)
class RecognizedScheme:
    """The scheme that has most of a bundle's names.

    known: how many. others: the names that it lacks, by the scheme that has them. unknown: those of
    no scheme.
    """

    scheme: NamingScheme
    known: int
    others: dict[str, list[str]]
    unknown: list[str]


def has_name(scheme: NamingScheme, name: str) -> bool:
    """Return True when the scheme has the name, for a tensor of DeepSeek-V4."""
    place = scheme.locate(name)
    return place is not None and is_known(place.name)


def is_known(name: str) -> bool:
    """Return True for a tensor of DeepSeek-V4, or a part that a bundle makes of one."""
    name = name.replace(".E.", f".{EXPERT}.")
    base, _, part = name.rpartition(".")
    made = part in ("scale", "scales", "biases", "tq_packed", "tq_norms", "tq_bits")
    return treatment(f"{base}.weight" if made else name) is not None


@functools.lru_cache(maxsize=PATTERNS)
def schemes_with_name(name: str) -> tuple[str, ...]:
    """Return the schemes that have a name. Cached: a process asks many times."""
    return tuple(scheme.name for scheme in SCHEMES.values() if has_name(scheme, name))


def recognize_scheme(names: Iterable[str]) -> RecognizedScheme:
    """Recognize the scheme of a bundle by its tensors' names; of equals the first."""
    patterns = {name: re.sub(r"(?<=\.)[0-9]{1,6}(?=\.|$)", "0", name) for name in names}
    having: dict[str, tuple[str, ...]] = dict.fromkeys(patterns.values(), ())
    for one in list(having)[:PATTERNS]:
        having[one] = schemes_with_name(one)
    counts = dict.fromkeys(SCHEMES, 0)
    for one in patterns.values():
        for scheme in having[one]:
            counts[scheme] += 1
    best = max(counts, key=lambda scheme: counts[scheme])
    others: dict[str, list[str]] = {}
    unknown = []
    for name, one in patterns.items():
        if not having[one]:
            unknown.append(name)
        elif best not in having[one]:
            others.setdefault(having[one][0], []).append(name)
    return RecognizedScheme(SCHEMES[best], counts[best], others, unknown)
