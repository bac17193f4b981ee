"""The table of the supported runtimes: versions, patches, and requirements on a bundle.

`make matrix` builds each row from scripts/stacks/NAME.txt and measures it (README.md there). `make
check` recognizes an installed toolchain by the rows; `make inspect` and the model card say which
runtimes load a bundle. A new version is a new requirements file and a new row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dsv4.model.naming_schemes import RUNTIMES
from dsv4.model.quantizer_table import quantizers_with
from dsv4.toolchain.python_env import LONG_PROMPTS, ROOT
from dsv4.verification.checks.runtime_requirements import (
    Requirement,
    false_turboquant_mark,
    fp8_matrices,
    missing_encoding,
    missing_template,
    quantized_head,
    rounded_controls,
    turboquant_experts,
    vision_tower,
    wrong_group_size,
    wrong_label_for,
    wrong_stop_ids_in,
)
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

FOLDER = ROOT / "scripts" / "stacks"
LOADER, MODEL = "load_jangtq.patch", "mlx_model.patch"
Versions = Mapping[str, str | None]  # package → version, None when it is not installed


@dataclass(frozen=True)
class Stack:
    """One row.

    name: in the matrix; runtime: the name for users; requirements: the pinned file; how: the
    --how of logits.py; served: queried through vMLX's server, else through chat.py; patches:
    applied to its jang_tools; needs: requirements on a bundle; env: variables that make it compute
    as transformers does; but: where its results differ from transformers' nevertheless.
    """

    name: str
    runtime: str
    requirements: str
    how: str
    served: bool
    patches: tuple[str, ...]
    needs: tuple[Requirement, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    but: str = ""

    @cached_property
    def packages(self) -> dict[str, str]:
        """The pinned versions of vmlx (without it: mlx-vlm), jang, mlx and mlx-lm."""
        text = (FOLDER / f"{self.requirements}.txt").read_text(encoding="utf-8")
        pins = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==([\w.]+)", text, re.MULTILINE))
        names = ("vmlx" if "vmlx" in pins else "mlx-vlm", "jang", "mlx", "mlx-lm")
        return {name: pins[name] for name in names if name in pins}


OLD = (
    wrong_label_for(RUNTIMES[0]), wrong_stop_ids_in("config.json"), missing_template, fp8_matrices,
)  # fmt: skip
NEW = (
    wrong_label_for(RUNTIMES[2]), rounded_controls, missing_encoding, wrong_group_size,
    false_turboquant_mark,
)  # fmt: skip
STOP_IDS = wrong_stop_ids_in("generation_config.json")
VLM = (wrong_label_for(RUNTIMES[1]), STOP_IDS, quantized_head, turboquant_experts)
LM = (wrong_label_for(RUNTIMES[0]), STOP_IDS, turboquant_experts, vision_tower)

OLD_MODEL = "its model has no attention sinks and mixes streams transposed; STACK=new is right"
BLOCKS = "while decoding, blocks of 4 tokens do not see the block before them"

# Of rows with the same versions the first one is recommended.
STACKS = (
    Stack("old", "vMLX 1.3.97, loader patched", "old", "loader", True, (LOADER, MODEL), OLD,
          but=OLD_MODEL),
    Stack("old, loader unpatched", "vMLX 1.3.97", "old", "loader", True, (MODEL,), (),
          but=OLD_MODEL),
    Stack("old, jang 2.5.8", "vMLX 1.3.97, loader patched", "old-2.5.8", "loader", True,
          (LOADER, MODEL), OLD, but=OLD_MODEL),
    Stack("old, jang 2.5.8, loader unpatched", "vMLX 1.3.97", "old-2.5.8", "loader", True,
          (MODEL,), (), but=OLD_MODEL),
    Stack("new", "vMLX 1.6.81", "new", "loader", True, (), NEW),
    Stack("lm", "mlx-lm 0.32.2 with jang 2.5.50's model", "lm", "mlx-lm", False, (), LM,
          LONG_PROMPTS),
    Stack("vlm", "mlx-vlm 0.7.10", "vlm", "mlx-vlm", False, (), VLM, but=BLOCKS),
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """Versions that are known to fail; quantizers, metal: only with these (empty, None: always).

    fatal: stages refuse to start with them.
    """

    packages: Versions
    reason: str
    quantizers: tuple[str, ...] = ()
    metal: bool | None = None
    fatal: bool = False

    def applies_to(self, versions: Versions, metal: bool, quantizer: str) -> bool:
        return (
            all(versions.get(name) == version for name, version in self.packages.items())
            and (not self.quantizers or quantizer in self.quantizers)
            and self.metal in (None, metal)
        )


FAILURES = (
    Failure({"vmlx": "1.3.97"}, "experts in MXFP4 are reported as broken there on Metal; set "
            "another QUANTIZER", ("mxfp4",), True),
    Failure({"vmlx": "1.3.97"}, "it takes every 8-bit matrix for affine and crashes on FP8's; set "
            "another QUANTIZER, or STACK=new", quantizers_with("keeps_source"), fatal=True),
    Failure({"vmlx": None}, "vMLX alone reads TurboQuant; set another QUANTIZER, or STACK=new",
            ("turboquant2",), fatal=True),
    Failure({}, "TurboQuant's kernels are Metal's alone; serve the bundle on a Mac",
            ("turboquant2",), False),
    Failure({"vmlx": "1.6.81", "mlx-lm": "0.32.2"}, "vmlx imports a name that this mlx-lm lacks; "
            "install mlx-lm 0.31.3"),
    Failure({"vmlx": None, "mlx-vlm": None, "jang": None}, "no mlx-lm has DeepSeek-V4 of its own; "
            "install jang"),
)  # fmt: skip


def recognize_stack(
    versions: Versions, pending: tuple[str, ...] = (), metal: bool = False, quantizer: str = "mlx"
) -> tuple[bool, str]:
    """Return (True when it works, one line for the user) for an installed toolchain.

    pending: names of the patches that its jang_tools still lacks.

    >>> recognize_stack({"vmlx": "1.6.81", "jang": "2.5.50", "mlx": "0.32.4", "mlx-lm": "0.31.3"})
    (True, 'vMLX 1.6.81: works')
    """
    failure = next((f for f in FAILURES if f.applies_to(versions, metal, quantizer)), None)
    shown = ", ".join(f"{name} {version}" for name, version in identity(versions).items())
    if failure is not None:
        return False, f"{shown or 'no runtime'}: known to fail because {failure.reason}"
    row = next((row for row in STACKS if row.packages == identity(versions, row)), None)
    if row is None:
        return False, f"{shown}: unknown version: run `make selftest`; {nearest_row(versions)}"
    after = " after patch_loader" if set(pending) & set(row.patches) else ""
    but = f", but {row.but}" if row.but else ""
    return True, f"{row.runtime.partition(',')[0]}: works{after}{but}"


def refusal_reason(versions: Versions, quantizer: str) -> str:
    """Return why stages refuse these versions for a quantizer's bundles; "" if they do not."""
    failures = (f for f in FAILURES if f.fatal and f.applies_to(versions, False, quantizer))
    return next((f.reason for f in failures), "")


def identity(versions: Versions, row: Stack | None = None) -> dict[str, str]:
    """Return the versions by which rows are recognized; with `row`, only packages that it pins.

    vmlx always counts: a toolchain with vmlx is not one without.
    """
    names = ["vmlx" if versions.get("vmlx") else "mlx-vlm", "jang", "mlx", "mlx-lm"]
    if row is not None:
        names = [name for name in names if name in ("vmlx", *row.packages)]
    return {name: version for name in names if (version := versions.get(name))}


def nearest_row(versions: Versions) -> str:
    """Return the row that agrees with most of the versions, and the versions that differ."""
    here = identity(versions)

    def similarity(row: Stack) -> tuple[bool, bool, int]:
        server = next(iter(row.packages))
        same = sum(here.get(name) == version for name, version in row.packages.items())
        return ("vmlx" in here) == (server == "vmlx"), server in here, same

    row = max(STACKS, key=similarity)
    other = [f"{name} {version}" for name, version in row.packages.items()
             if versions.get(name) != version]  # fmt: skip
    return f"nearest known: {row.runtime.partition(',')[0]} ({', '.join(other)})"


# Faults that the rows' requirements decide runtime by runtime; any other error stops all runtimes.
BY_RUNTIME = (
    "label-", "scales-without-label", "eos-", "chat-template", "special-token", "encoding-",
    "controls-", "jang-config-", "generation-",
)  # fmt: skip


def runtime_verdicts(bundle: Scan | None, findings: Findings) -> dict[str, str]:
    """Return runtime → "" when it will load the bundle, else why not."""
    fatal = [f.name for f in findings.errors if not f.name.startswith(BY_RUNTIME)]
    needs = {row.runtime: row.needs for row in STACKS if row.needs}
    if bundle is None or fatal:
        return dict.fromkeys(needs, ", ".join(fatal) or "no bundle")
    return {
        runtime: "; ".join(filter(None, (requirement(bundle) for requirement in requirements)))
        for runtime, requirements in needs.items()
    }
