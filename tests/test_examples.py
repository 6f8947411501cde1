"""The examples of quantizing run, are short, and each is the text of a tutorial."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("quantize_*.py"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.usefixtures("loaders")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it claims is asserted in it."""
    monkeypatch.setattr("sys.argv", [str(example)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(example), run_name="__main__")


def test_each_is_short_and_has_its_tutorial() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES}
    assert len(lengths) >= 6
    assert {name: n for name, n in lengths.items() if n >= 60} == {}
    pages = [page.read_text(encoding="utf-8") for page in TUTORIALS]
    assert [len(page.splitlines()) for page in pages if len(page.splitlines()) >= 80] == []
    for name in lengths:
        including = f"```{{literalinclude}} ../../examples/{name}\n"
        assert sum(including in page for page in pages) == 1, name
