"""The page and the table in a terminal: what comes first, what is in them, and that no name does anything."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from gptq_ao.presentation.files import FACTS, PAGE
from gptq_ao.presentation.plots import plots
from gptq_ao.report import Report

from .reports import HOSTILE, report


class Elements(HTMLParser):
    """All elements, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(made: Report, directory: Path, model: str = "") -> str:
    made.save(directory, model=model)
    return (directory / PAGE).read_text(encoding="utf-8")


def test_no_name_does_anything(tmp_path: Path) -> None:
    """In weights, messages, settings, measurements, plots, and the title."""
    usual = Elements(page_of(report(names=("a",) * len(HOSTILE)), tmp_path / "a", model="a"))
    hostile = Elements(page_of(report(names=HOSTILE), tmp_path / "b", model=HOSTILE[0]))
    assert hostile.tags.count("script") == 1
    assert {"img", "h1"} & set(hostile.tags) == {"h1"}
    assert hostile.tags.count("h1") == hostile.tags.count("style") - usual.tags.count("style") + 1
    assert not [value for name, value in hostile.attributes if name.startswith("on")]
    text = "".join(hostile.words)
    for name in HOSTILE[:-1]:
        assert name in text, name


def test_nothing_is_fetched(tmp_path: Path) -> None:
    elements = Elements(page_of(report(names=HOSTILE, experts=4), tmp_path))
    assert not {"base", "embed", "form", "iframe", "object"} & set(elements.tags)
    links = [v for n, v in elements.attributes if n.rpartition(":")[2] in ("src", "href", "srcset", "action", "data")]
    assert [v for v in links if v is not None and not v.startswith(("#", "data:,"))] == []


def test_what_went_wrong_comes_first(tmp_path: Path) -> None:
    page = page_of(report(), tmp_path)
    order = [
        "something to know",
        "12 rows",
        "also the embedding table",
        "a branch",
        "Measured",
        "All quantized weights",
    ]
    assert sorted(order, key=page.index) == order
    assert "<summary>warnings (1)</summary>" in page


def test_a_page_of_seventy_layers_is_less_than_a_megabyte(tmp_path: Path) -> None:
    made = report(layers=70, experts=8)
    assert len(made.weights) == 490
    page_of(made, tmp_path)
    assert (tmp_path / PAGE).stat().st_size < 1e6


def test_plots_of_what_there_is() -> None:
    titles = ["Error along the layers, by kind", "Bits chosen against sensitivity", "Damping", "Seconds by phase"]
    assert list(plots(report().to_dict())) == titles
    assert "Calibration rows of experts" in plots(report(experts=2).to_dict())
    plain = report().to_dict() | {"precision": [], "layers": [], "plan": {"seconds": {"solve": 3.0}}}
    assert list(plots(plain)) == ["Seconds by phase"]
    assert "planned" in plots(plain)["Seconds by phase"]
    many = report(layers=1, names=tuple(f"model.layers.1.kind{i}.weight" for i in range(20)))
    assert "other kinds" in plots(many.to_dict())["Error along the layers, by kind"]


def test_a_plot_changes_no_setting_of_matplotlib() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first = plots(report(names=HOSTILE).to_dict())
    assert dict(matplotlib.rcParams) == before
    assert plots(report(names=HOSTILE).to_dict()) == first


@pytest.mark.parametrize("width", [30, 60, 100, 200])
def test_a_terminal_of_any_width(width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report(names=HOSTILE[4:5]))
        lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = "".join(line.strip() for line in lines)
    assert "something to know" in text
    assert "also the embedding" in " ".join(lines)
    assert "[red]" in text
    assert ("damp" in text) == (width >= 110)


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    html = report(names=HOSTILE)._repr_html_()
    outer = Elements(html)
    assert outer.tags == ["iframe"]
    facts = dict(outer.attributes)
    assert facts["sandbox"] == "allow-scripts"
    inner = Elements(facts["srcdoc"] or "")
    assert inner.tags.count("script") == 1
    assert "something to know" in "".join(inner.words)


def test_experts_rows_are_their_own(tmp_path: Path) -> None:
    report(layers=1, experts=3).save(tmp_path)
    layers = json.loads((tmp_path / FACTS).read_text())["layers"]
    assert layers[2]["expert_rows"] == [2, 3, 4]
