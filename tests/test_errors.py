"""Every error has its entry in the documentation, with a cause and a remedy."""

import re
import runpy
from pathlib import Path

import pytest

from gptq_ao import errors

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "errors.md").read_text(encoding="utf-8")
SOURCE = runpy.run_path(str(DOCS / "messages.py"))


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


def test_every_message_has_a_cause_and_a_remedy() -> None:
    """On the page of messages, whose lists are made of the source: each in one group, and no group names a file or a
    folder in vain. A new message in a place of its own needs a group."""
    page = (DOCS / "messages.md").read_text(encoding="utf-8")
    group = r"^\*\*\S[^\n]*\.\*\* Remedy: \S[^\n]*\.\n\n```{messages} (\w+)\n([^`]*)```"
    groups = re.findall(group, page, re.MULTILINE)
    assert len(groups) == page.count("```{messages}") > 30
    listed = [m for name, places in groups for m in SOURCE["of"](name, places.splitlines())]
    assert sorted(map(repr, listed)) == sorted(map(repr, SOURCE["messages"]()))
    assert [p for name, places in groups for p in places.splitlines() if not SOURCE["of"](name, [p])] == []


def test_the_messages_are_those_that_are_raised() -> None:
    from gptq_ao import gptq_config

    with pytest.raises(errors.ConfigError) as e:
        gptq_config(group_size=0)
    known = [m.text for m in SOURCE["messages"]() if m.error == "ConfigError" and m.file == "gptq_ao/config.py"]
    said = [re.escape(text).replace("…", ".*") for text in known if text]
    assert [text for text in said if re.fullmatch(text, str(e.value))] != []
    everything = SOURCE["messages"]()
    assert sum(not m.text for m in everything) < 0.05 * len(everything)  # those of other libraries
