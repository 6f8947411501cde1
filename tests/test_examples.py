"""The examples of quantizing run, and each is the text of a short tutorial."""

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


def test_each_has_its_short_tutorial() -> None:
    assert len(EXAMPLES) >= 6
    pages = [page.read_text(encoding="utf-8") for page in TUTORIALS]
    assert [len(page.splitlines()) for page in pages if len(page.splitlines()) >= 80] == []
    for path in EXAMPLES:
        including = f"```{{literalinclude}} ../../examples/{path.name}\n"
        assert sum(including in page for page in pages) == 1, path.name
