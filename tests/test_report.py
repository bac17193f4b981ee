"""scripts/report.py: one page that needs nothing else, and says what verify.json says."""

from __future__ import annotations

import html
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import must, refusal, script

from dsv4.verification.report.verify_page import axis_ticks, page


@pytest.fixture(scope="module")
def result(good, source, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("report") / "verify.json"
    must("verify", "--bundle", good, "--source", source, "--without-loader", "--json", out)
    return json.loads(out.read_text())


def test_the_page_needs_nothing_from_elsewhere(result):
    shown = page(result)
    assert not re.search(r"(?:src|href|url|@import|<script|<link)\s*[=(]", shown)
    assert "http" not in shown


def test_the_page_is_well_formed(result):
    unclosed: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in ("table", "details", "div", "svg", "g", "title"):
                unclosed.append(tag)

        def handle_endtag(self, tag):
            if tag in ("table", "details", "div", "svg", "g", "title"):
                assert unclosed.pop() == tag

    Reader().feed(page(result))
    assert unclosed == []


def test_the_drawing_has_a_bar_for_each_layer_and_projection(result):
    svg = re.search(r"<svg.*?</svg>", page(result), re.DOTALL).group()
    titles = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert len(titles) == (4 + 1) * 3
    for cell in result["errors"]["experts"]:
        said = f"{cell['block']} {cell['layer']} {cell['projection']}: {cell['relative_rms']:.3%}"
        assert any(title.startswith(said) for title in titles)


def test_the_page_names_verdict_source_versions_and_hashes(result):
    result["source"] |= {"repo": "deepseek-ai/DeepSeek-V4-Flash", "commit": "0123abcd"}
    shown = html.unescape(page(result))
    assert "Passed: every number checked against the FP4/FP8 source" in shown
    assert "the runtimes' loaders were not run" in shown
    for text in ("0123abcd", "verify_python", *result["hashes"].values()):
        assert text in shown


def test_a_failed_bundle_shows_fault_reason_and_repair(stock, source, tmp_path):
    out = tmp_path / "verify.json"
    options = ("--without-loader", "--level", "1", "--json", out)
    assert script("verify", "--bundle", stock, "--source", source, *options).returncode == 1
    shown = page(json.loads(out.read_text()))
    assert "class='verdict failed'" in shown
    assert "<b>stock-experts</b> (error, 120×)" in shown
    assert "make repair SOURCE=…" in shown
    assert "Not measured: level 2 with the source measures it." in shown


def test_what_a_bundle_says_of_itself_is_escaped(result):
    result = {**result, "bundle": "/tmp/<script>alert(1)</script>"}
    assert "<script>" not in page(result)


def test_the_command_writes_the_page(result, tmp_path):
    given, out = tmp_path / "verify.json", tmp_path / "page" / "verify.html"
    given.write_text(json.dumps(result))
    assert must("report", "--json", given, "--out", out).strip() == str(out)
    assert out.read_text().startswith("<!doctype html>")


def test_another_format_is_refused(result, tmp_path):
    given = tmp_path / "verify.json"
    given.write_text(json.dumps({**result, "format": 99}))
    assert "format 99" in refusal("report", "--json", given, "--out", tmp_path / "page.html")
    assert "make verify" in refusal("report", "--json", tmp_path / "no.json", "--out", given)


@pytest.mark.parametrize("most", [0.087, 0.0003, 0, 1, 0.1])
def test_ticks_reach_the_largest_value(most):
    marks = axis_ticks(most)
    assert marks[0] == 0
    assert most <= marks[-1] <= 2 * most or most == 0
    assert 2 <= len(marks) <= 8
