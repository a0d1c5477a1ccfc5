"""The pages of `coda explain --html`, laid out by a browser: nothing overlaps or sticks out."""

import html
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from coda.border import load_block
from coda.lowering.page_flow import Flow
from tests.integrations.test_explain_model import llama
from tests.test_cli import run

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here to lay out pages")
LAYER = {"M": 8192, "D": 4096, "F": 14336, "H": 32, "G": 8, "d": 128}
WIDTHS = (1440, 390)

# What a reader would trip over, in one laid-out document; run in the page, for each width.
LOOK = """
function look(doc) {
  const found = [], wide = doc.documentElement.clientWidth;
  const shown = e => e.checkVisibility();
  if (doc.documentElement.scrollWidth > wide) found.push('wider than the window');
  const boxes = [...doc.querySelectorAll('.box')].filter(shown);
  for (const b of boxes) {
    const r = b.getBoundingClientRect();
    if (r.width < 200 || r.height < 40 || r.left < 0 || r.right > wide)
      found.push('box ' + b.innerText);
  }
  const walker = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.data.trim() || !shown(node.parentElement)) continue;
    const range = doc.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) texts.push([r, node.data.trim()]);
  }
  texts.sort((a, b) => a[0].top - b[0].top);
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
    const [a, b] = [texts[i][0], texts[j][0]];
    if (b.top > a.bottom) break;
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 1 && y > 4) found.push(texts[i][1] + ' over ' + texts[j][1]);
  }
  for (const [r, text] of texts) if (r.right > wide + 1 && !text.includes('\\n'))
    found.push('outside: ' + text);
  const lanes = [...doc.querySelectorAll('.lane.in, .lane.out')].filter(shown);
  const edges = boxes.map(b => b.getBoundingClientRect());
  for (const lane of lanes) {
    const r = lane.getBoundingClientRect(), y = lane.matches('.out') ? r.top : r.bottom;
    if (!edges.some(b => Math.abs(b.left - r.right) < 5 && y > b.top && y < b.bottom))
      found.push('loose end: ' + lane.title);
  }
  return {found: [...new Set(found)], boxes: boxes.map(b => b.querySelector('h4').innerText),
          lanes: lanes.length, texts: texts.length};
}
"""


def laid_out(pages, folder):
    """What `look` finds in each page at each width, and a screenshot of all of them."""
    frames = "".join(
        f'<iframe width={width} height=2400 srcdoc="{html.escape(text)}"></iframe>'
        for text in pages.values()
        for width in WIDTHS
    )
    script = (
        "addEventListener('load', () => document.body.append(Object.assign("
        "document.createElement('pre'), {id: 'seen', textContent: JSON.stringify("
        "[...document.querySelectorAll('iframe')].map(f => look(f.contentDocument)))})))"
    )
    file = folder / "all.html"
    file.write_text(f"<body>{frames}<script>{LOOK}{script}</script>", encoding="utf-8")
    out = browse("--dump-dom", file)
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', out, re.S)[1]))
    keys = [(name, width) for name in pages for width in WIDTHS]
    return dict(zip(keys, seen, strict=True))


def browse(action, file):
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    options += ("--window-size=1900,2600", f"--user-data-dir={file.parent}/browser")
    done = subprocess.run(
        [BROWSER, *options, action, file.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout


def screenshot(name, text, folder, width):
    """A page as a reader sees it first; kept in $CODA_SCREENSHOTS if that names a folder."""
    folder = Path(os.environ.get("CODA_SCREENSHOTS") or folder)
    page, image = folder / f"{name}.html", folder / f"{name}-{width}.png"
    page.write_text(text, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    call = [BROWSER, *options, f"--window-size={width},2600", f"--screenshot={image}"]
    subprocess.run([*call, page.as_uri()], capture_output=True, timeout=120, check=True)
    assert struct.unpack(">II", image.read_bytes()[16:24]) == (width, 2600)
    assert image.stat().st_size > 50_000  # a blank page has 15 kB


@pytest.fixture(scope="module")
def layer():
    return load_block(f"{ROOT}/examples/llama_layer.py:layer")


def kernels(seen):
    return [b for b in seen["boxes"] if b not in ("arguments", "results")]


@needs_browser
def test_a_block_and_a_training_step_are_laid_out_well(layer, tmp_path):
    block, both = layer.explain("sm_90a", **LAYER), layer.explain_training("sm_90a", **LAYER)
    pages = {"block": block.html(), "training": both.html()}
    seen = laid_out(pages, tmp_path)
    assert {k: one["found"] for k, one in seen.items() if one["found"]} == {}
    names = [k.name for k in block.program.kernels]
    steps = [k.name for e in (both.forward, both.backward) for k in e.program.kernels]
    for width in WIDTHS:
        assert kernels(seen["block", width]) == names
        assert kernels(seen["training", width]) == steps
    assert seen["block", 1440]["lanes"] > len(names)
    assert seen["block", 390]["lanes"] == 0  # the boxes say the same in words
    assert seen["training", 1440]["texts"] > 300
    screenshot("block", pages["block"], tmp_path, 1440)


def explained(capsys, model, tmp_path, *more):
    file = tmp_path / "page.html"
    code, out, _ = run(capsys, "explain", model, *more, "--html", str(file))
    assert (code, out) == (0, "")
    return file.read_text(encoding="utf-8")


@needs_browser
@pytest.mark.slow
def test_a_model_of_32_layers_is_laid_out_well(capsys, layer, tmp_path):
    text = explained(capsys, llama(tmp_path, 32), tmp_path, "--dims", "S=128", "--backward")
    assert "× 31" in text
    pages = {"model": text, "open": text.replace("<details", "<details open")}
    seen = laid_out(pages, tmp_path)
    assert {k: one["found"] for k, one in seen.items() if one["found"]} == {}
    assert len(kernels(seen["model", 1440])) < len(kernels(seen["open", 1440])) < 60
    both = layer.explain_training("sm_90a", **LAYER).html()
    for width in (1440, 500):  # a window is not narrower
        screenshot("model", text, tmp_path, width)
        screenshot("training", both, tmp_path, width)


@needs_browser
def test_the_look_sees_what_is_wrong(tmp_path):
    good = '<div class=box style="width:300px;height:50px"><h4>gemm0</h4></div>'
    wrong = {
        "wider": '<div style="width:2000px">x</div>',
        "over": "<p>one<p style='margin-top:-34px'>two",
        "box": good.replace("300", "100"),
        "loose": '<div class="lane in" title=t1 style="width:9px;height:9px"></div>',
    }
    seen = laid_out({"good": good, **{k: good + v for k, v in wrong.items()}}, tmp_path)
    words = {"wider": "wider", "over": "one over two", "box": "box gemm0", "loose": "loose end: t1"}
    assert seen["good", 1440]["found"] == []
    for name, word in words.items():
        assert any(word in one for one in seen[name, 1440]["found"]), name


def test_each_edge_has_its_bytes_and_both_ends(layer):
    flow = Flow(layer.lower("sm_90a", LAYER))
    lanes = {lane.tensor: lane for lane in flow.lanes()}
    names = [k.name for k in flow.program.kernels]
    stored = {n: b for moved in flow.moved for n, b in moved.writes}
    for name, nbytes in stored.items():
        lane = lanes[name]
        assert (lane.nbytes, names[lane.start - 1]) == (nbytes, names[flow.writers[name] - 1])
    read = {n for moved in flow.moved for n, _ in moved.reads} & stored.keys()
    assert read == {n for n in stored if any(r <= len(names) for r in lanes[n].ends)}
    assert lanes["x"].start == 0
    assert "w_gate" not in lanes
    columns = {}
    for lane, column in flow.placed():
        for row in range(lane.start, lane.ends[-1]):
            assert columns.setdefault((column, row), lane) is lane


def test_what_the_page_says(layer, tmp_path):
    found = layer.explain("sm_90a", **LAYER)
    text = found.html()
    known = found.json()
    words = html.unescape(re.sub(r"<[^>]*>", " ", text))
    for kernel in known["kernels"]:
        assert kernel["name"] in words
        assert f"{kernel['modelled_us']:,.1f} µs" in words
    for one in known["passes"]:
        assert one["why"] in words
    assert "measured" not in words
    timed = re.sub(r"<[^>]*>", " ", found.html({"gemm0": 1e-3}))
    assert re.search(r"1,000\.0 µs\s+measured \(\d+\.\d µs modelled\)", timed)
    assert "http" not in text  # no network
    assert "<script" not in text


def test_a_page_that_cannot_be_written(capsys, tmp_path):
    target = f"{ROOT}/examples/llama_mlp.py:mlp"
    dims = ("--dims", "M=16,D=32,F=64")
    text = explained(capsys, target, tmp_path, *dims)
    assert text.startswith("<!doctype html>")
    code, _, err = run(capsys, "explain", target, *dims, "--html", str(tmp_path / "no/page.html"))
    assert code == 2
    assert "the page cannot be written" in err
