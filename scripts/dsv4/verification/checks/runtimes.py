"""Which runtime, in which versions, needs what: the one table of it.

A row is a stack that `make matrix` builds from scripts/stacks/NAME.txt and measures (README.md
there). From the same rows `make check` tells what an installed toolchain means for the
user, and `make inspect` and the model card tell which runtime will load a bundle. A new version is
a new requirements file and a new line here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dsv4.model.layouts import RUNTIMES
from dsv4.model.quantizer_table import quantizers_with
from dsv4.toolchain.python_env import LONG_PROMPTS, ROOT
from dsv4.verification.checks.runtime_requirements import (
    Need,
    as_stamped,
    chat_template,
    controls,
    encoding,
    expert_labels_for,
    jang_groups,
    no_fp8,
    no_turbo,
    plain_head,
    stop_ids,
)
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

FOLDER = ROOT / "scripts" / "stacks"
LOADER, MODEL = "load_jangtq.patch", "mlx_model.patch"
Versions = Mapping[str, str | None]  # package → version, None when it is not installed


@dataclass(frozen=True)
class Stack:
    """One row.

    name: the matrix' own; runtime: what a user calls it; requirements: the pinned file; how:
    logits.py's way into the runtime; served: by vMLX's server, else asked through chat.py;
    patches: applied to its jang_tools; needs: what a bundle must have for it; env: variables that
    make it compute what transformers does; but: where it computes otherwise all the same.
    """

    name: str
    runtime: str
    requirements: str
    how: str
    served: bool
    patches: tuple[str, ...]
    needs: tuple[Need, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    but: str = ""

    @cached_property
    def packages(self) -> dict[str, str]:
        """The versions that identify it: of vmlx, jang, mlx and mlx-lm; of mlx-vlm without vmlx."""
        text = (FOLDER / f"{self.requirements}.txt").read_text(encoding="utf-8")
        pins = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==([\w.]+)", text, re.MULTILINE))
        names = ("vmlx" if "vmlx" in pins else "mlx-vlm", "jang", "mlx", "mlx-lm")
        return {name: pins[name] for name in names if name in pins}


OLD = (expert_labels_for(RUNTIMES[0]), stop_ids("config.json"), chat_template, no_fp8)
NEW = (expert_labels_for(RUNTIMES[2]), controls, encoding, jang_groups, as_stamped)
VLM = (expert_labels_for(RUNTIMES[1]), stop_ids("generation_config.json"), plain_head, no_turbo)
LM = (expert_labels_for(RUNTIMES[0]), stop_ids("generation_config.json"), no_turbo)

OLD_MODEL = "its model has no attention sinks and mixes streams transposed; STACK=new has not"
BLOCKS = "while decoding, blocks of 4 tokens forget the block before them"

# Of rows with the same versions the first one tells how the stack is meant to be used.
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
    """Versions that are known not to work; `quantizers` and `metal` narrow it where they are set.

    fatal: no doubt about it, so that nothing is begun with them.
    """

    packages: Versions
    because: str
    quantizers: tuple[str, ...] = ()
    metal: bool | None = None
    fatal: bool = False

    def holds(self, versions: Versions, metal: bool, quantizer: str) -> bool:
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

# ---------------------------------------------------------------- what is installed, in one line


def recognize_stack(
    versions: Versions, pending: tuple[str, ...] = (), metal: bool = False, quantizer: str = "mlx"
) -> tuple[bool, str]:
    """(True when it works, one line for the user) of an installed toolchain.

    pending: names of the patches that its jang_tools still lacks.

    >>> recognize_stack({"vmlx": "1.6.81", "jang": "2.5.50", "mlx": "0.32.4", "mlx-lm": "0.31.3"})
    (True, 'vMLX 1.6.81: works')
    """
    failure = next((f for f in FAILURES if f.holds(versions, metal, quantizer)), None)
    shown = ", ".join(f"{name} {version}" for name, version in identity(versions).items())
    if failure is not None:
        return False, f"{shown or 'no runtime'}: known to fail because {failure.because}"
    row = next((row for row in STACKS if row.packages == identity(versions, row)), None)
    if row is None:
        return False, f"{shown}: unknown version: run `make selftest`; {nearest_row(versions)}"
    after = " after patch_loader" if set(pending) & set(row.patches) else ""
    but = f", but {row.but}" if row.but else ""
    return True, f"{row.runtime.partition(',')[0]}: works{after}{but}"


def refusal_reason(versions: Versions, quantizer: str) -> str:
    """Why these versions are not to be tried with that quantizer's bundles; "" when they may be."""
    failures = (f for f in FAILURES if f.fatal and f.holds(versions, False, quantizer))
    return next((f.because for f in failures), "")


def identity(versions: Versions, row: Stack | None = None) -> dict[str, str]:
    """Those of the versions that a row is known by; `row` leaves out what it does not pin.

    A toolchain with vmlx is never taken for one without, whatever else lies in it.
    """
    names = ["vmlx" if versions.get("vmlx") else "mlx-vlm", "jang", "mlx", "mlx-lm"]
    if row is not None:
        names = [name for name in names if name in ("vmlx", *row.packages)]
    return {name: version for name in names if (version := versions.get(name))}


def nearest_row(versions: Versions) -> str:
    """The row that agrees with most of the versions, and where it does not."""
    here = identity(versions)

    def likeness(row: Stack) -> tuple[bool, bool, int]:
        server = next(iter(row.packages))
        same = sum(here.get(name) == version for name, version in row.packages.items())
        return ("vmlx" in here) == (server == "vmlx"), server in here, same

    row = max(STACKS, key=likeness)
    other = [f"{name} {version}" for name, version in row.packages.items()
             if versions.get(name) != version]  # fmt: skip
    return f"nearest known: {row.runtime.partition(',')[0]} ({', '.join(other)})"


# --------------------------------------------------------------- which runtime will load a bundle

# Faults that a row's needs judge for each runtime; any other error stops them all.
BY_RUNTIME = (
    "label-", "scales-without-label", "eos-", "chat-template", "special-token", "encoding-",
    "controls-", "jang-config-", "generation-",
)  # fmt: skip


def runtime_verdicts(bundle: Scan | None, findings: Findings) -> dict[str, str]:
    """Runtime → "" when it will load the bundle, else why not."""
    fatal = [f.name for f in findings.errors if not f.name.startswith(BY_RUNTIME)]
    needs = {row.runtime: row.needs for row in STACKS if row.needs}
    if bundle is None or fatal:
        return dict.fromkeys(needs, ", ".join(fatal) or "no bundle")
    return {
        runtime: "; ".join(filter(None, (need(bundle) for need in needed)))
        for runtime, needed in needs.items()
    }
