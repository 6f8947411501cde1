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
    assert by_hand["recipe"]["calibration"] == chats["recipe"]["calibration"]


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


def test_a_file_of_messages(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing need be said: the file says that they are chats."""
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": text}]}))
    (tmp_path / "by_hand.txt").write_text(f"<user>{text}</user>")
    (tmp_path / "a" / "chat_template.jinja").write_text(TEMPLATE)
    found = {}
    for name in ("chats.jsonl", "by_hand.txt"):
        given = [str(tmp_path / name) if part.endswith("text.txt") else part for part in arguments("--json")]
        found[name] = run(monkeypatch, *given[:2], str(tmp_path / f"{name}.out"), *given[3:])
    chats, by_hand = found["chats.jsonl"], found["by_hand.txt"]
    assert chats["recipe"]["calibration"] == by_hand["recipe"]["calibration"]
    assert chats["recipe"]["calibration data"] == "2 sequences of chats.jsonl"
    assert not [w for w in chats["warnings"] if MISSED in w]
    assert [w for w in by_hand["warnings"] if MISSED in w]


@pytest.mark.parametrize("option", ["--calibration", "--check"])
def test_messages_for_a_model_without_a_template(
    option: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    given = arguments()
    if option == "--check":
        given = (*given, "--check", str(tmp_path / "chats.jsonl"))
    else:
        given = tuple(str(tmp_path / "chats.jsonl") if part.endswith("text.txt") else part for part in given)
    assert "the tokenizer has no chat template, and" in fail(monkeypatch, capsys, *given)
    assert not (tmp_path / "q").exists()
