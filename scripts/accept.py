"""Is the model that is being served right, and how fast is it?

Asks any server of OpenAI's chat completions, that of `make serve` by default: additions, stop
reasons, thinking, streams, five requests at once, needles in long prompts, tools, turns, languages,
JSON, the context's limit, cancellation, loops. Each is a case with a name and a time limit of its
own. The nano, which says of itself that it is that, is not asked what it cannot know: those cases
are skipped by name. Then time to the first token and tokens a second by length of prompt, alone and
with 4 at once, and the server's memory where it runs on this machine.

--against asks a second server the same and shows where they part; its verdict is its own. Keys
come from the environment only: OPENAI_API_KEY, and AGAINST_API_KEY for the second. Writes a page
and the same as JSON. Exit 0: all that was run is right; 1: something is wrong, or no server
answers. With DeepSeek-V4-Flash it takes minutes, the prompts of 16,000 tokens most of them.

    .venv/bin/python scripts/accept.py [--url URL] [--against URL] --out build/accept
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from datetime import UTC, datetime
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
    add_setting(parser, "URL", help="of the server, instead of that of `make serve`")
    add_setting(parser, "PORT", default=8010, help="where that of `make serve` listens")
    add_setting(parser, "MODEL_NAME", default="", help="needed where several models are served")
    add_setting(parser, "AGAINST", help="URL of a second server, to be asked the same")
    add_setting(parser, "AGAINST_NAME", default="", help="the name of its model")
    add_setting(parser, "CONTEXT", default=abilities.SIZES[-1],
                help="tokens of the longest prompt (%(default)s)")  # fmt: skip
    parser.add_argument("--out", type=parse_path, required=True, help="OUT.html and OUT.json")
    args = parser.parse_args()
    args.url = parse_as("URL", args.url or f"http://{HOST}:{args.port}", parse_url)
    args.against = args.against and parse_as("AGAINST", args.against, parse_url)
    args.context = parse_as("CONTEXT", str(args.context), parse_context)
    return args


def told(outcome: case.CaseResult) -> case.CaseResult:
    """Say an outcome."""
    why = f": {outcome.why}" if outcome.why else ""
    print_escaped(f"{outcome.verdict:8}{outcome.name} ({outcome.seconds:g} s){why}", flush=True)
    return outcome


def examine(endpoint: Endpoint, context: int) -> dict[str, Any]:
    """Ask one server everything; say each outcome as it comes.

    One that gives no usable answer to the first question is asked nothing else.
    """
    first, nano = case.identify_model(endpoint)
    outcomes, answers = [told(first)], first.verdict == "right"
    for one in (*basics.CASES, *abilities.cases(context, endpoint.most)):
        one = one if answers else replace(one, skip="the first question had no answer")
        outcomes.append(told(case.run_case(endpoint, one, nano)))
    speeds = []
    for one in speed.measure(endpoint, context) if answers else ():
        speeds.append(one)
        measured = one.why or f"first token {one.first:g} s, {one.rate or 'too few'} tokens/s"
        print_escaped(f"speed   {one.prompt:,} tokens × {one.at_once}: {measured}", flush=True)
    return {
        "url": endpoint.url, "model": endpoint.model, "nano": nano,
        "memory": resident_bytes(endpoint.url),
        "cases": [asdict(one) for one in outcomes], "speed": [asdict(one) for one in speeds],
    }  # fmt: skip


def faults(side: dict[str, Any]) -> list[str]:
    """The names of what is wrong with one server."""
    wrong = [one["name"] for one in side["cases"] if one["verdict"] == "wrong"]
    wrong += [f"speed at {one['prompt']} × {one['at_once']}" for one in side["speed"] if one["why"]]
    return wrong


def main() -> int:
    args = parse()
    ends = [find_model(args.url, args.model_name, api_key("OPENAI_API_KEY"))]
    if args.against:
        key = api_key("AGAINST_API_KEY")
        ends.append(find_model(args.against, args.against_name, key, "AGAINST_NAME"))
    sides = []
    for end in ends:
        print_escaped(f"{end.model} at {end.url}")
        sides.append(examine(end, args.context))
    wrong = faults(sides[0])
    result = {
        "format": FORMAT, "verdict": "wrong" if wrong else "right", "context": args.context,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "server": sides[0], "against": sides[1] if args.against else None,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out.with_suffix(".json"), result)
    write_bytes(args.out.with_suffix(".html"), page(result).encode())
    print_escaped(args.out.with_suffix(".html"))
    if wrong:
        raise UserError(args.url, f"wrong: {', '.join(wrong)}", "all right", "see the page")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
