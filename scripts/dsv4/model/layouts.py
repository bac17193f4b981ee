"""What the makers of DeepSeek-V4 bundles call a source tensor, and what they did to its shape.

One table a layout, one line a name: the source's on the left, the bundle's on the right, and what
follows either (`.weight`, `.scales` …) is the same. N stands for the number of a layer, E of an
expert, * for letters. Where the right side lacks the E, experts are stacked along a new first axis;
where it has a G that the left side lacks, a matrix is split into that many blocks of rows. A matrix
with three axes where the source has two is the same rows in groups (`attn.wo_a`). The first line
that fits a source name counts, so that each name has one counterpart, and the way back is the same
line read from the right. A new layout is one more table.

The names of published bundles were taken from their writers: jang 2.5.50, mlx-vlm 0.7.10, and the
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
EXPERT = 0  # what an open E is read as, to look a name up
KINDS = 2_000  # of names, numbers aside; a bundle has two hundred, and each costs a millisecond
Line = tuple[str, str]


def pattern(side: str) -> re.Pattern[str]:
    """One side of a line; what follows the name in `rest`."""
    text = re.escape(side).replace(r"\*", r"(?P<any>[a-z]+)")
    for token in "NEG":
        text = re.sub(rf"\b{token}\b", rf"(?P<{token}>[0-9]{{1,6}})", text)
    follows = r"(?P<rest>(?:\.[A-Za-z0-9_.]+)?)" if side else r"(?P<rest>.+)"
    return re.compile(text + follows)


def fill_pattern(side: str, found: re.Match[str], **numbers: object) -> str:
    """A side of a line with what the other side matched; tokens that are still open stay."""
    given = {key: value for key, value in found.groupdict().items() if value is not None}
    given |= {key: f"{value}" for key, value in numbers.items()}
    text = side.replace("*", given.get("any", "*"))
    return re.sub(r"\b([NEG])\b", lambda m: given.get(m[1], m[1]), text) + given["rest"]


@dataclass(frozen=True)
class SourcePlace:
    """What a bundle's tensor is: the source's name, with E for a stack; its block of rows."""

    name: str
    stacked: bool = False
    block: int | None = None


@dataclass(frozen=True)
class NamingScheme:
    """name: as a report calls it; who writes it; lines: the table; runtimes: those of RUNTIMES that
    load it, as far as is known."""

    name: str
    who: str
    lines: tuple[Line, ...]
    runtimes: tuple[str, ...] = ()

    @cached_property
    def _sides(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        return [(pattern(source), pattern(bundle)) for source, bundle in self.lines]

    def runtime_name(self, name: str) -> str | None:
        """What the layout calls the source tensor `name`; an open G stays. None: it drops it.

        >>> called = LAYOUTS["mlx-vlm"].called
        >>> called("layers.3.ffn.experts.7.w2.weight")
        'language_model.model.layers.3.ffn.switch_mlp.down_proj.weight'
        >>> called("mtp.0.norm.weight")
        """
        for (_, bundle), (source, _) in zip(self.lines, self._sides, strict=True):
            if found := source.fullmatch(name):
                return fill_pattern(bundle, found)
        return None

    def locate(self, name: str) -> SourcePlace | None:
        """Which source tensor the bundle's tensor `name` holds; None for a name of another's.

        >>> LAYOUTS["mlx-lm, wo_a split"].locate("model.layers.3.attn.wo_a.7.weight")
        Place(name='layers.3.attn.wo_a.weight', stacked=False, block=7)
        """
        for (source, _), (_, bundle) in zip(self.lines, self._sides, strict=True):
            found = bundle.fullmatch(name)
            if found is None:
                continue
            open_name = fill_pattern(source, found)
            one = fill_pattern(source, found, E=found.groupdict().get("E") or EXPERT)
            back = (self.runtime_name(one) or "").replace(".G.", f".{found.groupdict().get('G')}.")
            if back == name:
                block = int(found["G"]) if "G" in found.groupdict() else None
                return SourcePlace(open_name, "E" in re.findall(r"\bE\b", open_name), block)
        return None


def stacked(place: str, block: str = "layers.N", names: dict[str, str] = PROJECTION) -> list[Line]:
    """Routed experts as one tensor a matrix."""
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
    """A layout under module paths; experts: how those of a layer are called, E where one by one."""
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

LAYOUTS = {
    layout.name: layout
    for layout in (
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
        NamingScheme("mlx-vlm", "mlx_vlm convert", module_scheme("language_model."), (MLX_VLM,)),
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
STORAGE = LAYOUTS["storage names"]


@dataclass(frozen=True)
class RecognizedScheme:
    """The layout that knows most of a bundle's names, the names that it lacks by the layout that
    has them, and those that nobody knows."""

    layout: NamingScheme
    known: int
    others: dict[str, list[str]]
    unknown: list[str]


def has_name(layout: NamingScheme, name: str) -> bool:
    """True when the layout has the name, and it is one that DeepSeek-V4 has."""
    place = layout.locate(name)
    return place is not None and is_known(place.name)


def is_known(name: str) -> bool:
    """True for a tensor of DeepSeek-V4, or a part that a bundle makes of one."""
    base, _, part = name.replace(".E.", f".{EXPERT}.").rpartition(".")
    weight = part in ("scale", "scales", "biases", "tq_packed", "tq_norms", "tq_bits")
    return treatment(f"{base}.weight" if weight else name.replace(".E.", ".0.")) is not None


@functools.lru_cache(maxsize=KINDS)
def schemes_with_name(kind: str) -> tuple[str, ...]:
    """The layouts that know a name; every kind of name is asked for many times in a process."""
    return tuple(layout.name for layout in LAYOUTS.values() if has_name(layout, kind))


def recognize_layout(names: Iterable[str]) -> RecognizedScheme:
    """The layout of a bundle by its tensors' names; of two that know as many, the first."""
    names = list(names)
    kind_of = {name: re.sub(r"(?<=\.)[0-9]{1,6}(?=\.|$)", "0", name) for name in names}
    kinds = dict.fromkeys(kind_of.values())
    having: dict[str, tuple[str, ...]] = dict.fromkeys(kinds, ())
    for kind in list(kinds)[:KINDS]:
        having[kind] = schemes_with_name(kind)
    counts = dict.fromkeys(LAYOUTS, 0)
    for kind in kind_of.values():
        for layout in having[kind]:
            counts[layout] += 1
    best = max(counts, key=lambda layout: counts[layout])
    others: dict[str, list[str]] = {}
    unknown = []
    for name, kind in kind_of.items():
        if not having[kind]:
            unknown.append(name)
        elif best not in having[kind]:
            others.setdefault(having[kind][0], []).append(name)
    return RecognizedScheme(LAYOUTS[best], counts[best], others, unknown)
