"""The pages that the recipe writes, in a real browser; skipped where no Chromium is installed.

Catches: an error of the console, something wider than a telephone, text that a dark page swallows,
a picture without words, a request to anywhere.
"""

from __future__ import annotations

import json

import pytest
from browser import CHROMIUM, LEAST, WIDTH, seen
from conftest import script
from model_server import Model

from dsv4.evaluation.evaluation_page import page as evaluate_page
from dsv4.verification.report.verify_page import page as verify_page

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
SIDES = ("dark", "light")


def accept_page(tmp_path) -> str:
    """Of two servers that part, one with a fault, so that every part of the page is there."""
    with Model("html-in-answer") as server, Model("cross-talk") as other:
        script("accept", "--url", server.url, "--against", other.url, "--context", 1000,
               "--out", tmp_path / "accept")  # fmt: skip
    return (tmp_path / "accept.html").read_text()


def evaluation() -> dict:
    """What evaluate found of two bundles, one with a name that is longer than a telephone."""
    numbers = {"device": "cpu", "computed_in": "float16", "perplexity": 3.5, "kl_mean": 1e-3}
    numbers |= {"source_perplexity": 3.4, "kl_median": 1e-4, "kl_99": 0.02, "same_next_token": 0.98}
    numbers |= {"error_by_layer": [0.0, 0.01, 0.02, 0.05], "kl_by_token": [1e-5, 1e-3, 0.02]}
    return {
        "source": "/somewhere/source", "runtime": "jang", "time": "2026-11-25T12:00:00Z",
        "text": {"file": "evaluation.txt", "sha256": 64 * "a", "tokens": 2048},
        "versions": {"mlx": "0.32.4"},
        "passes": [{"folder": "source", "device": "cpu", "to_reading": 3.25}],
        "bundles": [{"name": name, **numbers} for name in ("mlx", 9 * "a-long-name-")],
    }  # fmt: skip


@pytest.fixture(scope="module")
def pages(native, source, tmp_path_factory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("pages")
    out = work / "verify.json"
    # Without its tokenizer, so that the page has findings too.
    script("verify", "--bundle", native, "--source", source, "--without-loader", "--json", out)
    return {
        "verify": verify_page(json.loads(out.read_text())),
        "accept": accept_page(work),
        "evaluate": evaluate_page(evaluation()),
    }


@pytest.mark.parametrize("side", SIDES)
def test_the_pages_are_readable_everywhere(side, pages, tmp_path):
    found, errors, urls = seen(pages, side == "dark", tmp_path / "work")
    assert (errors, urls) == ([], [])
    assert set(found) == set(pages)
    for name, one in found.items():
        assert one["texts"] > 50
        assert one["dark"] == (side == "dark") == (one["paper"] < 0.1)
        assert one["window"] == WIDTH
        assert one["width"] <= WIDTH, name
        assert one["faint"] == {}, f"less than {LEAST}"
        assert one["pictures"] >= 1
        assert one["unnamed"] == []


def test_each_fault_of_a_page_would_be_seen(tmp_path):
    head = "<!doctype html><style>:root { color-scheme: light dark }</style>"
    faulty = {
        "wide": "<div style='width:500px'>wide</div>",
        "faint": "<p style='color:#222'>only by day</p>",
        "unnamed": "<svg viewBox='0 0 1 1'></svg>",
        "asks": "<img alt=x src='http://127.0.0.1:9/x.png'>",
        "error": "<script>undefined_name()</script>",
    }
    given = {name: head + body for name, body in faulty.items()}
    found, errors, urls = seen(given, True, tmp_path / "work")
    assert {name for name, one in found.items() if one["width"] > WIDTH} == {"wide"}
    assert {name for name, one in found.items() if one["faint"]} == {"faint"}
    assert {name for name, one in found.items() if one["unnamed"]} == {"unnamed"}
    assert urls == ["http://127.0.0.1:9/x.png"]
    assert any("undefined_name" in error for error in errors)
