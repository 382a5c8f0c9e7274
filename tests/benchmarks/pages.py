#!/usr/bin/env python3
"""Finished reports in a browser: is anything cut off, hard to read, broken or loaded from afar?

    python tests/benchmarks/pages.py outputs/*/report.html --out pictures --browser chromium

Chromium shows each page 360, 800 and 1400 px wide, light and dark. Looked at are the page as it
opens, the page after up to five of its links to `#cell-…`, and the page with every <details> open.
A line a page, then what is wrong; the exit code is 1 if something is. Limits: 4 MB, contrast 4.5.
`pip install html5lib` has the HTML checked too.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

try:
    import html5lib
except ImportError:
    html5lib = None

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
VIEWS = [(width, scheme) for width in (360, 800, 1400) for scheme in ("light", "dark")]
LARGEST, CONTRAST, TALLEST, PATIENCE = 4e6, 4.5, 16000, 180
COLUMNS = ("invalid HTML", "id more than once", "dead link", "picture without alt",
           "foreign address", "cut off")

# Runs in the page. Not looked at: SVG drawings, ::before and ::after, and what lies over a text.
PROBE = r"""least => {
const root = document.documentElement;
const all = selector => [...document.querySelectorAll(selector)];
const short = text => `"${text.replace(/\s+/g, ' ').trim().slice(0, 40)}"`;
const named = element =>
  `${[element.localName, ...element.classList].join('.')} ${short(element.textContent)}`;
const shown = element => element.checkVisibility({visibilityProperty: true});
const target = link => document.getElementById(decodeURIComponent(link.slice(1)));
const faults = {}, range = document.createRange();
let state = '', lowest = {ratio: 22, text: 'no text'};
const fault = (kind, what, details = '') => {
  faults[kind] ??= {};
  faults[kind][what] ??= details + state;
};

const inside = (element, within, box) => {
  for (let at = within; at && at !== document.body; at = at.parentElement) {
    const s = getComputedStyle(at);
    if (s.overflowX === 'visible' || s.display === 'inline') continue;
    if (box.left + at.scrollLeft < at.getBoundingClientRect().left - 1)
      fault('cut off', `${named(element)} cannot be scrolled to: it is left of ${named(at)}`);
    return;  // it scrolls, or is reported to cut off its content
  }
  const [left, right] = [Math.round(box.left), Math.round(box.right)];
  if (left < -1 || right > root.clientWidth + 1)
    fault('cut off', `${named(element)} sticks out: from ${left} to ${right} px`);
};

const base = root.appendChild(document.createElement('i'));
base.style.cssText = 'display: none; background-color: Canvas';
const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const painted = colours => {  // one over the other
  for (const colour of colours) {
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
  }
  return [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)];
};
const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => {
  const level = colour[i] / 255;
  return sum + part * (level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4);
}, 0);
const code = colour => '#' + colour.map(part => part.toString(16).padStart(2, '0')).join('');
const contrast = (element, text) => {
  const styles = [], canvas = getComputedStyle(base);
  for (let at = element; at; at = at.parentElement) styles.unshift(getComputedStyle(at));
  // Gradients of which one is `local` are the shadows of a table that scrolls: the colours below
  // them count. A text over any other gradient or picture is reported, not measured.
  const known = styles.reduce((known, s) => (known || s.backgroundColor.startsWith('rgb('))
    && (s.backgroundImage === 'none' || s.backgroundAttachment.includes('local')), true);
  if (!known || styles.some(s => s.opacity < 1))
    return fault('contrast', `not known, over a picture or see-through: ${text}`);
  const below = painted([canvas, ...styles].map(s => s.backgroundColor));
  const ink = painted([styles.at(-1).color]);
  const [low, high] = [light(below), light(ink)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05), colours = `${code(ink)} on ${code(below)}`;
  if (ratio < lowest.ratio) lowest = {ratio, text: `${colours}, ${text}`};
  if (ratio < least)
    fault('contrast', `${Math.floor(1000 * ratio) / 1000}: ${colours}`, `, first ${text}`);
};
const look = name => {
  state = name && ` (${name})`;
  if (root.scrollWidth > root.clientWidth)
    fault('cut off', `the page scrolls sideways: it is ${root.scrollWidth} px wide`);
  for (const element of all('body, body *:not(svg *)').filter(shown)) {
    const box = element.getBoundingClientRect(), s = getComputedStyle(element);
    if (box.width && box.height) inside(element, element.parentElement, box);
    for (const [axis, size] of [['X', 'Width'], ['Y', 'Height']]) {
      const whole = element['scroll' + size], seen = element['client' + size];
      if (/hidden|clip/.test(s['overflow' + axis]) && seen > 1 && whole > seen + 1)
        fault('cut off', `${named(element)} cuts off its content: ${whole} px in ${seen} px`);
    }
    for (const text of element.childNodes) {
      if (text.nodeType !== Node.TEXT_NODE || !text.data.trim()) continue;
      range.selectNodeContents(text);
      for (const line of range.getClientRects()) inside(element, element, line);
      contrast(element, short(text.data));
    }
  }
};

const ids = all('[id]').map(element => element.id);
for (const id of ids.filter((id, i) => ids.indexOf(id) < i)) fault('id more than once', id);
const links = all('a[href^="#"]:not([href="#"], [href="#top"])').map(link => link.hash);
for (const link of links) if (!target(link)) fault('dead link', link);
for (const picture of all('img:not([alt])')) fault('picture without alt', picture.src.slice(0, 60));
if (!all('meta[name=viewport]').length) fault('cut off', 'on phones: no <meta name=viewport>');
for (const name of ['src', 'srcset', 'href', 'poster', 'data'])
  for (const element of all(`:not(a, area)[${name}]`))
    if (!/^(data:|#)/.test(element.getAttribute(name)))
      fault('foreign address', element.getAttribute(name));
for (const one of all('style, [style]'))
  for (const [, address] of (one.getAttribute('style') ?? one.textContent).matchAll(
      /(?:url\(|@import)\s*["']?(?!data:|#)([^\s"')]+)/g))
    fault('foreign address', address);

look('');
const cells = links.filter(link => link.startsWith('#cell-'));
const sample = new Set([0, 0.25, 0.5, 0.75, 1].map(
  part => cells[Math.round(part * (cells.length - 1))]).filter(Boolean));
for (const link of sample) {
  location.hash = link;
  look(`after ${link}`);
  if (!target(link)?.getBoundingClientRect().height) fault('link shows nothing', link);
}
for (const details of all('details')) details.open = true;
look('with all details open');
if (lowest.ratio > 21) fault('contrast', 'the page has no text that can be measured');
return {faults, lowest, targets: sample.size, is: [innerWidth, devicePixelRatio,
        matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light']};
}"""


class Browser:
    """Chromium without a window, told what to do through two pipes."""

    def __init__(self, program, place):
        inward, self.into = os.pipe()
        self.outof, outward = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{inward} 4>&{outward}', "bash", program, *FLAGS,
             f"--user-data-dir={place}"], pass_fds=(inward, outward), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(inward)
        os.close(outward)
        self.heard, self.session = b"", {}
        self.version = self.call("Browser.getVersion")["product"]
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target,
                                               flatten=True)["sessionId"]}
        self.call("Page.enable")

    def close(self):
        self.process.kill()
        self.process.wait()

    def hear(self):
        """The next message."""
        while b"\0" not in self.heard:
            ready, _, _ = select.select([self.outof], [], [], PATIENCE)
            more = os.read(self.outof, 1 << 20) if ready else b""
            if not more:
                sys.exit(f"the browser {'ended' if ready else f'said nothing for {PATIENCE} s'}")
            self.heard += more
        message, _, self.heard = self.heard.partition(b"\0")
        return json.loads(message)

    def call(self, method, event=None, **parameters):
        """Its result; with `event`, once that has happened too."""
        question = {"id": 1, "method": method, "params": parameters, **self.session}
        os.write(self.into, json.dumps(question).encode() + b"\0")
        result = None
        while result is None or event:
            message = self.hear()
            if "id" in message:
                result = message.get("result", {})
                if "error" in message or {"exceptionDetails", "errorText"} & result.keys():
                    sys.exit(f"{method}: {message}")
            elif message["method"] == event:
                event = None
        return result


def show(browser, page, width, scheme, stem):
    """What the browser finds in a page; pictures of it are kept, more than one if it is long."""
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Page.navigate", "Page.loadEventFired", url=page.resolve().as_uri())
    height = browser.call("Page.getLayoutMetrics")["cssContentSize"]["height"]
    for top in range(0, height, TALLEST):
        clip = {"x": 0, "y": top, "width": width, "height": min(TALLEST, height - top), "scale": 1}
        data = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        part = f"-part{top // TALLEST + 1}" if height > TALLEST else ""
        Path(f"{stem}-{width}-{scheme}{part}.png").write_bytes(base64.b64decode(data))
    found = browser.call("Runtime.evaluate", expression=f"({PROBE})({CONTRAST})",
                         returnByValue=True)["result"]["value"]
    if found["is"] != [width, 1, scheme]:
        sys.exit(f"{page}: {found['is']} is shown, not {[width, 1, scheme]}: nothing measured")
    return found


def read(page):
    """What is wrong in a page's source, as (kind, what)."""
    data = page.read_bytes()
    if len(data) >= LARGEST:
        yield "too large", f"{len(data) / 1e6:.2f} MB"
    if html5lib:
        parser = html5lib.HTMLParser()
        parser.parse(data.decode("utf-8", "replace"))
        for (line, column), kind, about in parser.errors:  # at each of them, `strict` would stop
            yield COLUMNS[0], f"line {line}, column {column}: {html5lib.constants.E[kind] % about}"


def examine(browser, page, stem):
    """(its line of the table, what is wrong with it: {kind: {what: views}})."""
    wrong, found = defaultdict(lambda: defaultdict(list)), {}
    for kind, what in read(page):
        wrong[kind][what] = []
    for width, scheme in VIEWS:
        view = f"{width} {scheme}"
        found[view] = show(browser, page, width, scheme, stem)
        for kind, faults in found[view]["faults"].items():
            for what, details in faults.items():
                wrong[kind][what + details].append(view)
    lowest, where = min((found[view]["lowest"]["ratio"], view) for view in found)
    targets = sum(one["targets"] for one in found.values())
    works = targets - sum(map(len, wrong.get("link shows nothing", {}).values()))
    counts = [len(wrong.get(kind, ())) for kind in COLUMNS]
    line = [stem.name, f"{page.stat().st_size / 1e6:.2f}",
            *(counts if html5lib else ["not checked", *counts[1:]]),
            f"{int(100 * lowest) / 100:.2f} ({where}, {found[where]['lowest']['text']})",
            f"{works} of {targets}" if targets else "none", "NO" if wrong else "yes"]
    return line, wrong


def explain(name, wrong, most):
    """Print what is wrong with a page."""
    for kind, some in wrong.items():
        for what, views in list(some.items())[:most]:
            where = "all views" if len(views) == len(VIEWS) else ", ".join(views)
            print(f"{name}: {kind}: {what}" + (f" [{where}]" if views else ""))
        if len(some) > most:
            print(f"{name}: {kind}: and {len(some) - most} more")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: a new one)")
    parser.add_argument("--browser", help=f"default: the first of {', '.join(BROWSERS)}")
    parser.add_argument("--most", type=int, default=12, help="how many of each fault to print")
    args = parser.parse_args()
    wanted = [args.browser] if args.browser else BROWSERS
    program = next(filter(None, map(shutil.which, wanted)), None)
    if not program:
        sys.exit(f"no browser, looked for {', '.join(wanted)}: apt-get install chromium")
    out = args.out or Path(tempfile.mkdtemp(prefix="pages-"))
    out.mkdir(parents=True, exist_ok=True)
    print("| page | MB | invalid | ids twice | dead links | no alt | foreign | cut off "
          "| lowest contrast | targets | passes |\n|" + "---|" * 11, flush=True)
    bad = []
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
          contextlib.closing(Browser(program, place)) as browser):
        for page in args.pages:
            name = page.resolve().parent.name if page.stem == "report" else page.stem
            line, wrong = examine(browser, page, out / name)
            print(f"| {' | '.join(str(part).replace('|', '¦') for part in line)} |", flush=True)
            bad += [(name, wrong)] if wrong else []
    print()
    for name, wrong in bad:
        explain(name, wrong, args.most)
    print(f"{len(args.pages) - len(bad)} of {len(args.pages)} pages pass in {len(VIEWS)} views "
          f"each; pictures in {out}; {browser.version}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
