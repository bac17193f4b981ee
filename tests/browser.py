"""Pages opened in a real browser: Chromium without a window, from the system's packages.

The pages stand in frames of 400 pixels in one page, whose script looks into them once they are
loaded and writes down what it sees; all their details are open then. What Chromium asks the network
for, it keeps a log of.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
)  # fmt: skip
LEAST = 4.5  # contrast of text (WCAG 2.2, 1.4.3, level AA)
WIDTH = 400  # pixels

LOOK = """
const channels = c => c.match(/[\\d.]+/g).map(Number)
const light = c => channels(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
function behind(element, canvas) {
  for (let e = element; e; e = e.parentElement) {
    const c = channels(e.ownerDocument.defaultView.getComputedStyle(e).backgroundColor)
    if (c.length < 4 || c[3] > 0) return `rgb(${c.slice(0, 3)})`
  }
  return canvas
}
function look(frame) {
  const doc = frame.contentDocument, view = frame.contentWindow, faint = {}
  doc.querySelectorAll('details').forEach(one => { one.open = true })
  const probe = doc.body.appendChild(doc.createElement('i'))
  probe.style.background = 'Canvas'
  const canvas = view.getComputedStyle(probe).backgroundColor
  probe.remove()
  const walker = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT)
  let texts = 0
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement
    if (!text || !element.getClientRects().length) continue
    texts++
    const style = view.getComputedStyle(element)
    const ink = light(element.closest('svg') ? style.fill : style.color)
    const paper = light(behind(element, canvas))
    const contrast = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)
    if (contrast < LEAST) faint[text.slice(0, 60)] = contrast
  }
  const named = one => one.getAttribute('role') == 'img' ? one.getAttribute('aria-label')
    : one.getAttribute('alt')
  const unnamed = [...doc.querySelectorAll('img, svg, canvas')].filter(one => !named(one))
  return {texts, faint, dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
          paper: light(canvas), window: view.innerWidth, width: doc.documentElement.scrollWidth,
          pictures: doc.querySelectorAll('img, svg, canvas').length,
          unnamed: unnamed.map(one => one.outerHTML.slice(0, 100))}
}
addEventListener('load', () => {
  const seen = {}
  document.querySelectorAll('iframe').forEach(frame => { seen[frame.title] = look(frame) })
  document.getElementById('seen').textContent = JSON.stringify(seen)
})
"""


def seen(
    pages: dict[str, str], dark: bool, work: Path
) -> tuple[dict[str, dict], list[str], list[str]]:
    """What each page looks like, all errors of the console, and every address that a page asked."""
    work.mkdir()
    log, scheme = work / "net.json", f"preferredColorScheme={int(not dark)}"
    (work / "pages.html").write_text(framed(pages), encoding="utf-8")
    own = (f"--user-data-dir={work / 'profile'}", f"--log-net-log={log}",
           f"--blink-settings={scheme}")  # fmt: skip
    command = [CHROMIUM, *OPTIONS, *own, "--dump-dom", f"file://{work / 'pages.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    errors = re.findall(r"CONSOLE.*", done.stderr)
    return json.loads(html.unescape(found[1])), errors, asked(json.loads(log.read_text()))


def framed(pages: dict[str, str]) -> str:
    """One page with a frame for each of them, and what looks into the frames."""
    style = f"width:{WIDTH}px;border:0"
    frames = "".join(
        f'<iframe title="{name}" srcdoc="{html.escape(page)}" style="{style}"></iframe>'
        for name, page in pages.items()
    )
    head = "<!doctype html><meta charset=utf-8><style>:root { color-scheme: light dark }</style>"
    look = LOOK.replace("LEAST", str(LEAST))
    return f"{head}{frames}<pre id=seen></pre><script>{look}</script>"


def asked(log: dict) -> list[str]:
    """The addresses that pages asked for; Chromium's own requests come from no page."""
    events = [one.get("params", {}) for one in log["events"]]
    own = ("not an origin", None)
    return sorted(
        {one["url"] for one in events if "url" in one and one.get("initiator") not in own}
    )
