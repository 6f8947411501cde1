"""Every error has its entry in the documentation, with a cause and a remedy."""

import re
from pathlib import Path

import pytest

from gptq_ao import errors

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", errors.__all__)
def test_it_has_an_entry(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    _, _, cause, remedy, _ = re.split(r"(?<!\\)\|", row)
    assert cause.strip()
    assert remedy.strip()


def test_no_entry_is_of_something_else() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == sorted(errors.__all__)


def test_the_exit_statuses_are_those_of_the_command() -> None:
    from gptq_ao.cli import _status

    for name in errors.__all__:
        kind = getattr(errors, name)
        if issubclass(kind, Warning):
            continue
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        said = re.search(r"Status (\d)", row)
        assert _status(kind("x")) == (int(said.group(1)) if said else 1), name
