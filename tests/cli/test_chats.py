"""Calibration of a model with a chat template: with it, or with a word that it was without."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .test_commands import fail, run

Arguments = Callable[..., tuple[str, ...]]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
MISSED = "the model has a chat template, and the text is not in it: give --chat-template"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_model(place: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the template is stored."""
    given = arguments("--json")
    if place.endswith("jinja"):
        (tmp_path / "a" / place).write_text(TEMPLATE)
    else:
        facts = json.loads((tmp_path / "a" / place).read_text())
        (tmp_path / "a" / place).write_text(json.dumps(facts | {"chat_template": TEMPLATE}))
    plain = run(monkeypatch, *given)
    assert [w for w in plain["warnings"] if MISSED in w]
    assert MISSED in (tmp_path / "q" / "report" / "report.html").read_text()
    chats = run(monkeypatch, *given[:2], str(tmp_path / "chats"), *given[3:], "--chat-template")
    assert not [w for w in chats["warnings"] if MISSED in w]
    assert chats["recipe"]["calibration"] != plain["recipe"]["calibration"]
    # What is calibrated with is what a user would write by hand.
    (tmp_path / "chat.txt").write_text(f"<user>{(tmp_path / 'text.txt').read_text()}</user>")
    other = [str(tmp_path / "chat.txt") if part.endswith("text.txt") else part for part in given]
    by_hand = run(monkeypatch, *other[:2], str(tmp_path / "by_hand"), *other[3:])
    assert by_hand["recipe"] == chats["recipe"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template: leave out --chat-template"),
        ("{{ raise_exception('only tools') }}", "chat template cannot be used: TemplateError: only tools"),
    ],
)
def test_a_template_that_is_of_no_use(
    template: str | None,
    message: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments("--chat-template")
    if template is not None:
        (tmp_path / "a" / "chat_template.jinja").write_text(template)
    assert message in fail(monkeypatch, capsys, *given)
