"""Test a served model and measure its speed.

Works with any server of OpenAI's chat completions, by default that of `make serve`. Cases: list of
models, additions, stop reasons, thinking, streams, five requests at once, needles in long prompts,
tools, turns, languages, JSON, the context limit, cancellation, loops. Each has a name and a time
limit. For the nano, cases that it cannot pass are skipped by name. Then measures time to the first
token and tokens per second by prompt length, with 1 and 4 requests at once, and the memory of a
server on this machine.

--against runs the same on a second server and shows where the answers differ; the verdict is about
the first one. API keys come from the environment only: OPENAI_API_KEY, and AGAINST_API_KEY for the
second. Writes OUT.html and OUT.json. Exit 0: all cases that ran are right; 1: one is wrong, or no
server answers. Takes minutes with DeepSeek-V4-Flash, most of them for the prompts of 16,000 tokens.

    .venv/bin/python scripts/accept.py [--url URL] [--against URL] --out build/accept
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv4.acceptance import case, speed
from dsv4.acceptance.acceptance_page import page
from dsv4.acceptance.cases import abilities, basics
from dsv4.acceptance.client import Endpoint, api_key, find_model
from dsv4.errors import UserError, run
from dsv4.settings import add_setting, parse_as, parse_context, parse_path, parse_url
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.text import print_escaped
from dsv4.toolchain.server import HOST
from dsv4.toolchain.server_memory import resident_bytes

FORMAT = 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "URL", help="of the server; default: that of `make serve`")
    add_setting(parser, "PORT", default=8010, help="on which `make serve` listens")
    add_setting(parser, "MODEL_NAME", default="", help="required where several models are served")
    add_setting(parser, "AGAINST", help="URL of a second server to compare with")
    add_setting(parser, "AGAINST_NAME", default="", help="the name of its model")
    add_setting(parser, "CONTEXT", default=abilities.SIZES[-1],
                help="tokens of the longest prompt (%(default)s)")  # fmt: skip
    parser.add_argument("--out", type=parse_path, required=True, help="OUT.html and OUT.json")
    args = parser.parse_args()
    args.url = parse_as("URL", args.url or f"http://{HOST}:{args.port}", parse_url)
    args.against = args.against and parse_as("AGAINST", args.against, parse_url)
    args.context = parse_as("CONTEXT", str(args.context), parse_context)
    return args


def print_case(result: case.CaseResult) -> None:
    why = f": {result.why}" if result.why else ""
    print_escaped(f"{result.verdict:8}{result.name} ({result.seconds:g} s){why}", flush=True)


def print_speed(measured: speed.Speed) -> None:
    text = measured.why or (
        f"first token {measured.first:g} s, {measured.rate or 'too few'} tokens/s"
    )
    print_escaped(f"speed   {measured.prompt:,} tokens × {measured.at_once}: {text}", flush=True)


def examine(endpoint: Endpoint, context: int) -> dict[str, Any]:
    """Run all cases and measurements on one server, and print each result at once.

    Without a usable answer to the first question everything else is skipped.
    """
    first, nano = case.identify_model(endpoint)
    print_case(first)
    results, speeds, answers = [first], [], first.verdict == "right"
    for planned in (*basics.CASES, *abilities.cases(context, endpoint.most)):
        if not answers:
            planned = replace(planned, skip="the first question had no answer")
        results.append(case.run_case(endpoint, planned, nano))
        print_case(results[-1])
    for measured in speed.measure(endpoint, context) if answers else ():
        speeds.append(measured)
        print_speed(measured)
    return {
        "url": endpoint.url, "model": endpoint.model, "nano": nano,
        "memory": resident_bytes(endpoint.url),
        "cases": [asdict(one) for one in results], "speed": [asdict(one) for one in speeds],
    }  # fmt: skip


def faults(side: dict[str, Any]) -> list[str]:
    """Return the names of wrong cases and failed measurements of one server."""
    wrong = [one["name"] for one in side["cases"] if one["verdict"] == "wrong"]
    wrong += [f"speed at {one['prompt']} × {one['at_once']}" for one in side["speed"] if one["why"]]
    return wrong


def with_ending(out: Path, ending: str) -> Path:
    """Return OUT with `.html` or `.json` appended; a dot in its name, as in v1.6, is kept."""
    return out.with_name(f"{out.name}{ending}")


def main() -> int:
    args = parse()
    endpoints = [find_model(args.url, args.model_name, api_key("OPENAI_API_KEY"))]
    if args.against:
        key = api_key("AGAINST_API_KEY")
        endpoints.append(find_model(args.against, args.against_name, key, "AGAINST_NAME"))
    sides = []
    for endpoint in endpoints:
        print_escaped(f"{endpoint.model} at {endpoint.url}")
        sides.append(examine(endpoint, args.context))
    wrong = faults(sides[0])
    result = {
        "format": FORMAT, "verdict": "wrong" if wrong else "right", "context": args.context,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "server": sides[0], "against": sides[1] if args.against else None,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(with_ending(args.out, ".json"), result)
    html = with_ending(args.out, ".html")
    write_bytes(html, page(result).encode())
    print_escaped(html)
    if wrong:
        raise UserError(args.url, f"wrong: {', '.join(wrong)}", "all right", "see the page")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
