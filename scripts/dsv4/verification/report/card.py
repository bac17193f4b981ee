"""The model card of a published bundle: facts only, each from a file that is published with it.

What is not known is said to be not known; nothing is promised that was not measured.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.storage import limits
from dsv4.storage.atomic import format_bytes
from dsv4.text import escape_line
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import Scan

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

SERVE = {
    "vMLX 1.6": "python -m vmlx_engine.cli serve ./{name} --host 127.0.0.1 --port 8010",
    "vMLX 1.3": (
        "# its loader needs this recipe's patch first: make patch_loader\n"
        "python -m vmlx_engine.cli serve ./{name} --host 127.0.0.1 --port 8010"
    ),
    "mlx-vlm": "python -m mlx_vlm.server --model ./{name} --port 8010",
}


@dataclass(frozen=True)
class Facts:
    """What the card is made of.

    to: user/name; report: verify.json; origin: as `provenance` gives it, or None; licence: as the
    source's own card names it, or None.
    """

    to: str
    bundle: Scan
    report: dict[str, Any]
    origin: dict[str, Any] | None
    licence: str | None

    @property
    def name(self) -> str:
        """The bundle's name without its user."""
        return self.to.rpartition("/")[2]


def licence_of(source: Path | None) -> str | None:
    """The licence that the source's model card declares, or None."""
    path = source / "README.md" if source else None
    if path is None or not path.is_file():
        return None
    text = limits.read_bounded(path).decode("utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    pattern = r"^license:[ \t]*([A-Za-z0-9_.-]{1,64})[ \t]*$"
    found = re.search(pattern, head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def card(facts: Facts) -> str:
    """README.md of the published bundle."""
    sections = (
        front_matter,
        origin_section,
        error_section,
        size_section,
        runtime_section,
        serving_section,
        limits_section,
        version_section,
        licence_section,
    )
    return "\n\n".join(section(facts) for section in sections) + "\n"


def escape_cell(text: str) -> str:
    """Foreign text for Markdown: plain, no HTML, no mark of Markdown but code's."""
    return re.sub(r"([\\|\[\]*_#!])", r"\\\1", html.escape(escape_line(text), quote=False))


def escape_yaml(text: str) -> str:
    """Foreign text as a value of the front matter: one that means itself, else in quotes."""
    text = escape_line(text)
    return text if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text) else json.dumps(text)


def escape_code(text: str) -> str:
    """Foreign text as code, which it cannot end."""
    return f"`{html.escape(escape_line(text).replace('`', chr(39)), quote=False)}`"


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table; every cell is made plain, and cannot end its cell or its row."""
    lines = [head, ("---",) * len(head), *(tuple(map(escape_cell, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def front_matter(facts: Facts) -> str:
    """The hub's metadata, the name, and what this is."""
    lines = ["---", *([f"license: {escape_yaml(facts.licence)}"] if facts.licence else [])]
    if facts.origin:
        lines += [
            f"base_model: {escape_yaml(facts.origin['repo'])}",
            "base_model_relation: quantized",
        ]
    lines += ["library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx",
              "- deepseek_v4", "---", "", f"# {facts.name}", ""]  # fmt: skip
    how = sorted({escape_cell(e["stored_as"]) for e in facts.report["errors"].get("others") or []})
    experts = bits_of_experts(facts)
    lines.append(
        f"DeepSeek-V4 as an MLX bundle: routed experts in {experts:.2f} bits a weight, scales and "
        f"biases included; everything else as {', '.join(how)}."
    )
    return "\n".join(lines)


def bits_of_experts(facts: Facts) -> float:
    """Bits a routed-expert weight, with its share of scales and biases."""
    weights = sum(one["weights"] for one in facts.report["errors"]["experts"])
    return facts.report["sizes"]["by_kind"].get("routed experts", 0) * 8 / max(1, weights)


def origin_section(facts: Facts) -> str:
    """Where the source came from, and its hashes."""
    if facts.origin is None:
        text = "Its repository and commit were not recorded: it was not downloaded by this recipe."
        return f"## Source\n\n{text}"
    repo, commit = escape_line(facts.origin["repo"]), escape_line(facts.origin["commit"])
    rows = [(name, *next(iter(hashes.items()))) for name, hashes in facts.origin["files"].items()]
    return (
        f"## Source\n\n[{repo}](https://huggingface.co/{repo}/tree/{commit}) at commit `{commit}`, "
        f"{len(rows)} files:\n\n<details><summary>their hashes</summary>\n\n"
        f"{markdown_table(('file', 'kind', 'hash'), rows)}\n\n</details>"
    )


def error_section(facts: Facts) -> str:
    """The quantizer, and its measured error by layer."""
    report = facts.report
    mark = report["quantizer"]
    quantizer = mark.get("requantize_quantizer") or "not recorded"
    cells = {(c["block"], c["layer"], c["projection"]): c for c in report["errors"]["experts"]}
    layers = sorted({key[:2] for key in cells})
    rows = [
        (f"{block}.{layer}", *(percent(cells.get((block, layer, p))) for p in PROJECTIONS))
        for block, layer in layers
    ]
    worst = max(one["worst_tensor_rms"] for one in cells.values())
    others = report["errors"].get("others") or []
    modules = [o["relative_rms"] for o in others if o["what"] == "module"]
    day = escape_cell(report["time"][:10])
    return (
        f"## How exact it is\n\nQuantizer of the routed experts: {escape_code(quantizer)}. Every "
        f"number of the bundle was read and compared with the source on {day}; "
        "the whole result is verify.json beside this card, with the SHA-256 of every file.\n\n"
        "Relative RMS error of the routed experts against the FP4 source:\n\n"
        f"{markdown_table(('block and layer', *PROJECTIONS), rows)}\n\n"
        f"Worst single expert matrix: {worst:.2%}. Worst 8-bit module against FP8 or BF16: "
        f"{max(modules, default=0):.2%}. Control tensors and passthrough equal the source."
    )  # fmt: skip


def percent(found: dict[str, Any] | None) -> str:
    return f"{found['relative_rms']:.2%}" if found else "–"


def size_section(facts: Facts) -> str:
    """Bytes by kind, in GB and GiB."""
    found = facts.report["sizes"]
    rows = [(kind, format_bytes(size)) for kind, size in found["by_kind"].items()]
    rows.append((f"all {found['shards']} shards", format_bytes(found["shard_bytes"])))
    if found.get("source_shard_bytes"):
        rows.append(("the source's shards", format_bytes(found["source_shard_bytes"])))
    return f"## Sizes\n\n{markdown_table(('what', 'size'), rows)}"


def runtime_section(facts: Facts) -> str:
    """The runtimes, by this bundle's headers."""
    judged = runtime_verdicts(facts.bundle, Findings())
    rows = [(name, "no: " + fault if fault else "yes") for name, fault in judged.items()]
    return (
        "## Which runtimes load it\n\nBy this bundle's headers and labels, and by what each "
        f"runtime was found to need:\n\n{markdown_table(('runtime', 'loads'), rows)}"
    )


def serving_section(facts: Facts) -> str:
    """A command for each runtime that loads it."""
    judged = runtime_verdicts(facts.bundle, Findings())
    parts = []
    for tool, command in SERVE.items():
        if any(name.startswith(tool) and not fault for name, fault in judged.items()):
            parts.append(f"{tool}:\n\n```sh\n{command.format(name=facts.name)}\n```")
    return "## How to serve it\n\n" + ("\n\n".join(parts) or "None of these runtimes loads it.")


def limits_section(facts: Facts) -> str:
    """What nobody should take from the above."""
    report = facts.report
    where = report["versions"].get("system", "an unknown system")
    lines = [f"The numbers were compared on {escape_cell(where)}."]
    if not report["versions"].get("metal"):
        lines.append("Nothing of it was run on Metal.")
    lines.append("The runtimes' rows are judged by headers; this bundle was not served for them.")
    lines.append("No benchmark of its answers was made.")
    if not report["loader_asked"]:
        lines.append("The toolchain's own loaders were not asked.")
    warned = [(escape_cell(f["name"]), escape_cell(f["why"])) for f in report["findings"]]
    lines += [f"Warning by verify: {name}: {why}" for name, why in warned]
    return "## What was not tested\n\n" + "\n".join(f"- {line}" for line in lines)


def version_section(facts: Facts) -> str:
    """What was installed where the bundle was verified."""
    known = facts.report["versions"]
    rows = [(name, f"{value}") for name, value in known.items()]
    table = markdown_table(("what", "version"), rows)
    return f"## Versions\n\nInstalled where it was verified:\n\n{table}"


def licence_section(facts: Facts) -> str:
    """The model's licence."""
    if facts.licence is None:
        text = "The source's model card was not at hand; the licence of the source applies."
    else:
        text = f"The model's: {escape_code(facts.licence)}, as the source's model card declares it."
    return f"## Licence\n\n{text}"
