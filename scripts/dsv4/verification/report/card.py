"""Write the model card of a published bundle, from verify.json and the bundle's headers.

Every statement comes from a file that is published with the card. What is unknown or was not
measured is named as such.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.model import mtp
from dsv4.model.source_format import release_name
from dsv4.storage import limits
from dsv4.text import escape_line
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.report.findings import Findings
from dsv4.verification.report.verify_page import PROJECTIONS, size_rows
from dsv4.verification.scan import Scan

SERVE = {
    "vMLX 1.6": "python -m vmlx_engine.cli serve ./{name} --host 127.0.0.1 --port 8010",
    "vMLX 1.3": (
        "# its loader needs this recipe's patch first: make patch_loader\n"
        "python -m vmlx_engine.cli serve ./{name} --host 127.0.0.1 --port 8010"
    ),
    "mlx-vlm": "python -m mlx_vlm.server --model ./{name} --port 8010",
}
# Recorded choice → the sentence about MTP or DSpark in the first paragraph.
MTP = {
    mtp.SOURCE: "MTP or DSpark, if the release has it, has the source's own numbers; no server "
    "loads it.",
    mtp.DROPPED: "MTP and DSpark were left out (DROP_MTP=1).",
    mtp.AS_EXPERTS: "",
}


@dataclass(frozen=True)
class Facts:
    """Contents of the card.

    to: user/name on the hub; report: verify.json; origin: as read by `provenance`, or None;
    licence: as the source's model card names it, or None.
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
    """Return the licence that the source's model card declares, or None."""
    path = source / "README.md" if source else None
    if path is None or not path.is_file():
        return None
    text = limits.read_bounded(path).decode("utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    pattern = r"^license:[ \t]*([A-Za-z0-9_.-]{1,64})[ \t]*$"
    found = re.search(pattern, head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def card(facts: Facts) -> str:
    """Return the text of the bundle's README.md."""
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
    """Escape untrusted text for Markdown: one line, no HTML, no Markdown syntax but code."""
    return re.sub(r"([\\|\[\]*_#!])", r"\\\1", html.escape(escape_line(text), quote=False))


def escape_yaml(text: str) -> str:
    """Escape untrusted text as a YAML scalar of the front matter, in quotes if need be."""
    text = escape_line(text)
    return text if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text) else json.dumps(text)


def escape_code(text: str) -> str:
    """Escape untrusted text as inline code, which it cannot close."""
    return f"`{html.escape(escape_line(text).replace('`', chr(39)), quote=False)}`"


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; every cell of `rows` is escaped."""
    lines = [head, ("---",) * len(head), *(tuple(map(escape_cell, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def front_matter(facts: Facts) -> str:
    """Return the hub's metadata, the title, and one sentence about the bundle."""
    lines = ["---", *([f"license: {escape_yaml(facts.licence)}"] if facts.licence else [])]
    if facts.origin:
        lines += [
            f"base_model: {escape_yaml(facts.origin['repo'])}",
            "base_model_relation: quantized",
        ]
    lines += ["library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx",
              "- deepseek_v4", "---", "", f"# {facts.name}", ""]  # fmt: skip
    errors = facts.report["errors"]
    formats = sorted({escape_cell(other["stored_as"]) for other in errors.get("others") or []})
    weights = sum(cell["weights"] for cell in errors["experts"])
    bits = facts.report["sizes"]["by_kind"].get("routed experts", 0) * 8 / max(1, weights)
    release = release_name(facts.bundle.config, facts.bundle.tensors)
    recorded = mtp.choice_of(facts.report["quantizer"].get("requantize_table"))
    lines.append(
        f"{release} as an MLX bundle: routed experts in {bits:.2f} bits a weight, scales and "
        f"biases included; everything else as {', '.join(formats)}. {MTP[recorded]}".rstrip()
    )
    return "\n".join(lines)


def origin_section(facts: Facts) -> str:
    """Return the source's repository and commit, and the hashes of its files."""
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
    """Return the quantizer, and its measured error by layer."""
    report = facts.report
    quantizer = report["quantizer"].get("requantize_quantizer") or "not recorded"
    cells = {(c["block"], c["layer"], c["projection"]): c for c in report["errors"]["experts"]}
    layers = sorted({key[:2] for key in cells})
    rows = [
        (f"{block}.{layer}", *(format_rms(cells.get((block, layer, p))) for p in PROJECTIONS))
        for block, layer in layers
    ]
    worst = max(cell["worst_tensor_rms"] for cell in cells.values())
    others = report["errors"].get("others") or []
    modules = [o["relative_rms"] for o in others if o["what"] == "module"]
    date = escape_cell(report["time"][:10])
    return (
        f"## Quantization error\n\nQuantizer of the routed experts: {escape_code(quantizer)}. "
        f"Every number of the bundle was read and compared with the source on {date}; "
        "the complete result is verify.json beside this card, with the SHA-256 of every file.\n\n"
        "Relative RMS error of the routed experts against the FP4 source:\n\n"
        f"{markdown_table(('block and layer', *PROJECTIONS), rows)}\n\n"
        f"Worst single expert matrix: {worst:.2%}. Worst 8-bit module against FP8 or BF16: "
        f"{max(modules, default=0):.2%}. Control tensors and passthrough equal the source."
    )  # fmt: skip


def format_rms(cell: dict[str, Any] | None) -> str:
    return f"{cell['relative_rms']:.2%}" if cell else "–"


def size_section(facts: Facts) -> str:
    """Return bytes by kind, in GB and GiB."""
    return f"## Sizes\n\n{markdown_table(('what', 'size'), size_rows(facts.report))}"


def runtime_section(facts: Facts) -> str:
    """Return which runtimes load the bundle, by its headers."""
    verdicts = runtime_verdicts(facts.bundle, Findings())
    rows = [(name, "no: " + fault if fault else "yes") for name, fault in verdicts.items()]
    return (
        "## Which runtimes load it\n\nBy this bundle's headers and labels, and by the "
        f"requirements of each runtime:\n\n{markdown_table(('runtime', 'loads'), rows)}"
    )


def serving_section(facts: Facts) -> str:
    """Return a command for each runtime that loads it."""
    verdicts = runtime_verdicts(facts.bundle, Findings())
    commands = []
    for tool, command in SERVE.items():
        if any(name.startswith(tool) and not fault for name, fault in verdicts.items()):
            commands.append(f"{tool}:\n\n```sh\n{command.format(name=facts.name)}\n```")
    return "## How to serve it\n\n" + ("\n\n".join(commands) or "No runtime loads it.")


def limits_section(facts: Facts) -> str:
    """Return what was not tested, and verify's warnings."""
    report = facts.report
    where = report["versions"].get("system", "an unknown system")
    lines = [f"The numbers were compared on {escape_cell(where)}."]
    if not report["versions"].get("metal"):
        lines.append("Nothing was run on Metal.")
    lines.append("The table of runtimes is by headers; this bundle was not served with them.")
    lines.append("Its answers were not benchmarked.")
    if not report["loader_asked"]:
        lines.append("The toolchain's own loaders were not run.")
    for finding in report["findings"]:
        lines.append(f"Warning by verify: {escape_cell(finding['name'])}: "
                     f"{escape_cell(finding['why'])}")  # fmt: skip
    return "## What was not tested\n\n" + "\n".join(f"- {line}" for line in lines)


def version_section(facts: Facts) -> str:
    """Return the versions that were installed where the bundle was verified."""
    rows = [(name, f"{value}") for name, value in facts.report["versions"].items()]
    table = markdown_table(("what", "version"), rows)
    return f"## Versions\n\nInstalled where it was verified:\n\n{table}"


def licence_section(facts: Facts) -> str:
    """Return the licence of the model."""
    if facts.licence is None:
        text = "The source's model card was not available; the licence of the source applies."
    else:
        text = f"The model's: {escape_code(facts.licence)}, as the source's model card declares it."
    return f"## Licence\n\n{text}"
