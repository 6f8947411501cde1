"""The page in a real browser: sorted, filtered, by keyboard; nothing runs but our script, which has nothing to say."""

from collections.abc import Iterator

import pytest

from gptq_ao.presentation.files import PAGE

from .browser import CHROMIUM, Browser
from .reports import HOSTILE, report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    place = tmp_path_factory.mktemp("page")
    report(names=HOSTILE).save(place, model=HOSTILE[0])
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(place / PAGE)
        yield opened


def column(browser: Browser, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('#weights tbody tr')].filter(r => !r.hidden)"
    found: list[str] = browser.run(f"{rows}.map(r => r.cells[{number}].textContent)")
    return found


def click(browser: Browser, number: int) -> str:
    heading = f"document.querySelectorAll('#weights thead th')[{number}]"
    browser.run(f"{heading}.querySelector('button').click()")
    sort: str = browser.run(f"{heading}.getAttribute('aria-sort')")
    return sort


def test_a_heading_sorts(browser: Browser) -> None:
    """By numbers, where there are; what is not known comes last."""
    assert click(browser, 10) == "ascending"
    errors = column(browser, 10)
    assert errors[-1] == ""
    known = [float(e) for e in errors[:-1]]
    assert known == sorted(known)
    assert known[0] == 0
    assert click(browser, 10) == "descending"
    errors = column(browser, 10)
    assert errors[-1] == ""
    assert [float(e) for e in errors[:-1]] == sorted(known, reverse=True)
    assert click(browser, 2) == "ascending"  # shapes, by their sizes
    heights = [int(shape.split("x")[0]) for shape in column(browser, 2)]
    assert heights == sorted(heights)
    assert click(browser, 0) == "ascending"
    layers = [name for name in column(browser, 0) if name.startswith("model.layers.")]
    assert layers[0] == "model.layers.0.down_proj.weight"
    assert browser.run("document.querySelectorAll('#weights [aria-sort]').length") == 1


def test_words_filter(browser: Browser) -> None:
    box = "document.querySelector('input[data-table=weights]')"
    browser.run(f"{box}.value = 'LAYERS.1. proj'; {box}.dispatchEvent(new Event('input'))")
    assert sorted(column(browser, 0)) == sorted(w.name for w in report().weights if ".1." in w.name)
    assert browser.run("document.querySelector('output[for=filter-weights]').textContent") == "7 of 28 shown"
    browser.run(f"{box}.value = ''; {box}.dispatchEvent(new Event('input'))")
    assert len(column(browser, 0)) == 21 + len(HOSTILE)


def test_the_keyboard_does_what_the_mouse_does(browser: Browser) -> None:
    browser.run("document.querySelector('#weights thead th button').focus()")
    browser.press("Tab", 9)
    browser.press("Tab", 9)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.textContent") == "bits"
    browser.press("Enter", 13)
    assert browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    bits = [int(b) for b in column(browser, 3)]
    assert bits == sorted(bits)


def test_all_that_is_told_can_be_heard(browser: Browser) -> None:
    assert browser.run("[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent)")
    assert browser.run("[...document.querySelectorAll('thead th')].every(h => h.scope === 'col')")
    assert browser.run("[...document.querySelectorAll('input')].every(i => i.labels.length === 1)")
    assert browser.run("[...document.querySelectorAll('[role=img]')].every(i => i.ariaLabel)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, browser: Browser) -> None:
    """At least 4.5, as WCAG has it, of all text that is shown."""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    least = browser.run(
        """(() => {
          const channels = (c) => c.match(/[\\d.]+/g).map(Number);
          const light = (c) => channels(c).slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = (e) => {
            for (; e; e = e.parentElement) {
              const c = getComputedStyle(e).backgroundColor;
              if ((channels(c)[3] ?? 1) > 0) return c;
            }
          };
          const tags = "h1,h2,p,dt,dd,summary,li,caption,th,td,figcaption,label,output";
          const words = [...document.querySelectorAll(tags)];
          return Math.min(...words.map((e) => {
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }));
        })()"""
    )
    assert least >= 4.5


def test_nothing_is_said_and_nothing_asked_for(browser: Browser) -> None:
    """Whatever a name tries; ours is the only script that runs, and it makes no error."""
    assert browser.run("document.title").startswith("Quantization report: <script>")
    assert browser.said == []
    assert [url for url in browser.asked if not url.startswith("data:")] == [browser.run("location.href")]
