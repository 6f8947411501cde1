"""Every snippet of the README and of docs/ runs: Python blocks in order, in one namespace a page; `$ gptq-ao` lines."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from gptq_ao import cli
from gptq_ao.tiny_lm.corpus import documents

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "docs", ROOT / "docs" / "tutorials"]
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for folder in FOLDERS for p in sorted(folder.glob("*.md")))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def in_a_folder_like_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    text = documents("heldout")[:6]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
    (tmp_path / "text.txt").write_text("\n".join(text))
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.usefixtures("loaders")
@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    # Whatever is neither run here nor listed must not be written as a snippet.
    assert {kind for kind, _ in blocks} <= {"python", "console", "bash", "yaml"}
    namespace: dict[str, object] = {"__name__": "snippet"}
    for kind, body in blocks:
        if kind == "python":
            exec(compile(body, page, "exec"), namespace)
        elif kind == "console":
            for line in body.splitlines():
                assert line.startswith("$ gptq-ao "), line
                monkeypatch.setattr(sys, "argv", shlex.split(line[2:]))
                with pytest.raises(SystemExit) as e:
                    cli.main()
                assert e.value.code == 0, line


def test_bash_lines_are_those_that_ci_runs() -> None:
    lines = [
        line.split("#")[0].strip()
        for kind, body in BLOCK.findall((ROOT / "README.md").read_text())
        if kind == "bash"
        for line in body.splitlines()
    ]
    assert lines == ["pip install -e .", "make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo: " in makefile
    assert "\ntest: " in makefile


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]:
        path = ROOT / page
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{page}: {target}"


NAMED = re.compile(r"`([\w/]+\.py)`|\b((?:gptq_ao|passes|kernels|tests|benchmarks|examples)/[\w/]+\.py)")


@pytest.mark.parametrize("name", ["graph", "stage", "tile"])
def test_drawings_are_what_the_code_does(name: str) -> None:
    """Else: python docs/drawings/draw.py."""
    folder = ROOT / "docs" / "drawings"
    drawings = runpy.run_path(str(folder / "draw.py"))["DRAWINGS"]
    assert {path.stem for path in folder.glob("*.svg")} == {path.removesuffix(".svg") for path in drawings}
    assert drawings[f"{name}.svg"]() == (folder / f"{name}.svg").read_text(encoding="utf-8")
    assert f"](drawings/{name}.svg)" in (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")


def test_numbers_that_decide_are_measured_ones() -> None:
    """Each number with a point on the page of decisions is also on a page that says how it was measured; but for bits
    per weight, which follow from the format: those of a code, and 32 for each group."""
    pages = ["README.md", "docs/accuracy.md", "docs/comparison.md", "docs/performance.md"]
    number = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.]*\w)")
    measured = {n for page in pages for n in number.findall((ROOT / page).read_text(encoding="utf-8"))}
    stored = {f"{bits + 32 / group:.2f}" for bits in (2, 3, 4, 8) for group in (32, 64, 128)} | {"0.75"}
    used = set(number.findall((ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")))
    assert len(used) > 30
    assert used - measured - stored == set()


def test_files_that_prose_names_exist() -> None:
    """In Markdown, Python and the Makefile: a file is beside the one that names it, or below one of the roots."""
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/*.md"),
        *ROOT.glob("docs/tutorials/*.md"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
    folders = ("gptq_ao", "kernels", "passes", "benchmarks", "docs/drawings")
    sources = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*pages, *sources]
        for name in map("".join, NAMED.findall(path.read_text(encoding="utf-8")))
        if name != "__init__.py" and not any((root / name).is_file() for root in (path.parent, ROOT, ROOT / "gptq_ao"))
    ]
    assert missing == []


def test_modules_that_the_makefile_runs_exist() -> None:
    modules = re.findall(r"-m (tests[\w.]*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_every_option_of_quantize_is_documented() -> None:
    import typer.main

    command = typer.main.get_command(cli.app).commands["quantize"]  # type: ignore[attr-defined]
    options = {o for p in command.params if p.param_type_name == "option" for o in p.opts + p.secondary_opts}
    text = (ROOT / "docs" / "cli.md").read_text()
    assert [
        o for o in options - {"--help"} if o.removeprefix("--no-") not in text and o not in text and "strict" not in o
    ] == []
