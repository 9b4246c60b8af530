"""The report in a real browser: no error, no request, readable at both sizes, light, dark, by keyboard, on paper."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.config import ReportConfig
from tests.support.browser import browser, executable
from tests.support.report_runs import demo_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(executable() is None, reason="no Chromium on this machine (apt-get install chromium)"),
]
AXE = "axe.run().then(found => found.violations.map(v => v.id + ': ' + v.nodes.map(n => n.html).join(' | ')))"
LUMINANCE = """(() => {
  const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  return .2126 * r + .7152 * g + .0722 * b;
})()"""


@pytest.fixture
def url(tmp_path):
    return report.report(ReportConfig([str(demo_run(tmp_path))])).resolve().as_uri()


@pytest.fixture
def page(tmp_path):
    pytest.importorskip("websocket")
    with browser(tmp_path / "profile") as page:
        yield page


def axe() -> str:
    pytest.importorskip("axe_core_python")
    places = importlib.util.find_spec("axe_core_python").submodule_search_locations
    return (Path(places[0]) / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_loads_without_error_or_request_and_fits(page, url, width, scheme):
    page.open(url, width, 900, scheme)
    assert page.complaints() == []
    assert page.requests() == [url]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelectorAll('svg.chart').length") == 4
    assert page.evaluate(
        "[...document.querySelectorAll('svg.chart')].every(c => c.getBoundingClientRect().width > 250)"
    )
    smallest = (
        "Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height))"
    )
    assert page.evaluate(smallest) >= 10  # the height of a line of text in pixels
    assert (page.evaluate(LUMINANCE) > 128) == (scheme == "light")
    page.call("Page.setBypassCSP", enabled=True)
    page.open(url, width, 900, scheme)
    page.evaluate(axe() + ";0")
    assert page.evaluate(AXE) == []


def test_policy_stops_what_would_load(page, url):
    page.open(url)
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.evaluate("fetch('http://127.0.0.1:9/y').catch(() => 0)")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<i onclick=\"window.ran = 1\">x</i>')")
    page.evaluate("document.querySelector('i').click()")
    assert page.evaluate("window.ran === undefined")
    assert sum("Content Security Policy" in text for text in page.complaints()) >= 3
    assert not page.of("Network.responseReceived")[1:]


def test_keyboard_reaches_the_values(page, url):
    page.open(url)
    stops = 'document.querySelectorAll(\'svg.chart [tabindex="0"], table.heat [tabindex="0"]\').length'
    assert page.evaluate(stops) == page.evaluate("document.querySelectorAll('svg.chart, table.heat').length")
    page.evaluate("document.querySelector('table.heat td').focus()")
    first = page.evaluate("document.getElementById('tip').textContent")
    assert first == "depth 0–10%, 256 tokens: 0 percent of 3 answers found"
    page.key("ArrowDown")
    assert "depth 10–20%" in page.evaluate("document.getElementById('tip').textContent")
    page.key("ArrowRight")
    shown = page.evaluate("document.activeElement.dataset.v")
    assert shown == "depth 10–20%, 2,048 tokens: 10 percent of 3 answers found"
    assert page.evaluate("document.getElementById('tip').getBoundingClientRect().left >= 0")
    page.key("Escape")
    assert page.evaluate("document.getElementById('tip').hidden")


def test_prints_with_the_numbers(page, url, tmp_path):
    page.open(url, scheme="dark")
    data = page.pdf()
    assert data.startswith(b"%PDF") and len(data) > 20_000
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate(LUMINANCE) > 250  # paper is white
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.evaluate("dispatchEvent(new Event('beforeprint')), 0")
    assert page.evaluate("document.querySelectorAll('details:not(.quiet):not([open])').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint')), 0")
    assert page.evaluate("document.querySelectorAll('figure details[open]').length") == 0
