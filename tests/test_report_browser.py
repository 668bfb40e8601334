"""The report in headless Chromium: every picture is there, it reads by light and by dark and on a phone."""

import shutil
from itertools import pairwise

import pytest
from made_run import make

from mtcl_torchrec.report import compare_html, write_report
from mtcl_torchrec.report.studio import DARK, LIGHT

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: the report is not looked at"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian's package chromium)")

# Of each text on the page: its colour and that of what it stands on, as the browser computes them; of cells in a heat
# map, that is the rectangle that is painted before it.
CONTRASTS = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = e => { const layers = [];
    for (; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]); };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  const say = (text, front, back) => { const [a, b] = [light(over(front, back)), light(back)].sort((x, y) => y - x);
    found.push([text.trim().slice(0, 60), (a + .05) / (b + .05)]); };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) { const e = walk.currentNode.parentElement, text = walk.currentNode.textContent;
    if (!text.trim() || e.closest('svg') || !e.checkVisibility()) continue;
    say(text, parse(getComputedStyle(e).color), behind(e)); }
  for (const svg of document.querySelectorAll('svg')) { const back = behind(svg.parentElement);
    const painted = [...svg.querySelectorAll('path')].map(p => [p.getBoundingClientRect(), getComputedStyle(p)])
      .filter(([r, s]) => !s.fill.startsWith('none') && r.width > 20 && r.height > 8);
    for (const text of svg.querySelectorAll('text')) { const r = text.getBoundingClientRect();
      const [x, y] = [r.x + r.width / 2, r.y + r.height / 2];
      let under = back;
      for (const [p, s] of painted) if (p.left < x && x < p.right && p.top < y && y < p.bottom) {
        const c = parse(s.fill); c[3] *= Number(s.fillOpacity) * Number(s.opacity); under = over(c, under); }
      say(text.textContent, parse(getComputedStyle(text).fill), under); } }
  return found; }"""
PICTURES = """() => [...document.querySelectorAll('.picture svg')].map(svg => {
  const r = svg.getBoundingClientRect(), inner = svg.getBBox(), view = svg.viewBox.baseVal;
  return {name: svg.parentElement.id, label: svg.parentElement.getAttribute('aria-label'), width: r.width,
    height: r.height, texts: svg.querySelectorAll('text').length,
    shapes: svg.querySelectorAll('path').length + svg.querySelectorAll('use').length,
    spills: Math.max(-inner.x, -inner.y, inner.x + inner.width - view.width, inner.y + inner.height - view.height)};
  })"""
RIGHTMOST = """() => Math.max(...[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll, pre, .picture')).map(e => e.getBoundingClientRect().right))"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    run = make(folder / "run")
    return {"report": write_report(run, folder / "report.html"),
            "compare": compare_html([run, run], None, folder / "compare.html")}  # fmt: skip


@pytest.fixture
def opened(browser, pages):
    """Opens a page with a screen and a scheme of colours; what it complains of or asks for is an error at the end."""
    heard, contexts = [], []

    def visit(name, width, scheme):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        uri = pages[name].as_uri()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url) if request.url.split("#")[0] != uri else None)
        context.route("**/*", lambda route: route.continue_() if route.request.url == uri else route.abort())
        page.goto(uri)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("name", ["report", "compare"])
def test_pictures_are_there_at_every_width(opened, name):
    for width in (1280, 390):
        page = opened(name, width, "light")
        found = page.evaluate(PICTURES)
        assert len(found) == page.locator("figure").count() >= 3
        for picture in found:
            assert picture["width"] > 200, picture
            assert picture["height"] > 60, picture
            assert picture["texts"] >= 3, picture
            assert picture["shapes"] >= 3, picture
            assert picture["spills"] <= 1, picture
            assert len(picture["label"]) > 15, picture
        assert page.evaluate("document.documentElement.scrollWidth") == width  # the page does not scroll sideways
        assert page.evaluate(RIGHTMOST) <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_stands_on(opened, scheme):
    colours = LIGHT if scheme == "light" else DARK
    for name in ("report", "compare"):
        page = opened(name, 1280, scheme)
        surface = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert surface == f"rgb({', '.join(str(int(colours['surface'][i : i + 2], 16)) for i in (1, 3, 5))})"
        found = page.evaluate(CONTRASTS)
        assert len(found) > 200
        assert [of for of in found if of[1] < 4.5] == []
    lines = [contrast(colours[role], colours["surface"]) for role in "abcd"]
    assert min(lines) >= 3


def contrast(one, other):
    """WCAG 2.1's ratio of two colours."""

    def luminance(colour):
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((luminance(one), luminance(other)), reverse=True)
    return (a + 0.05) / (b + 0.05)


def test_headings_and_keys_lead_through_the_page(opened):
    page = opened("report", 390, "light")
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.className"))
    assert {"SUMMARY ", "A ", "DIV scroll"} <= reached
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_a_table_that_goes_on_is_shaded_where_it_does(opened):
    page = opened("report", 390, "light")
    wide = page.locator(".scroll", has_text="Binary tasks").first
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth")
    assert wide.evaluate("e => getComputedStyle(e).backgroundAttachment") == "local, local, scroll, scroll"
