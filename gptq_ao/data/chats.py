"""Chats: rows with `messages` of {role, content}, or ShareGPT's `conversations` of {from, value}; and their text, which
is what the chat template of the tokenizer makes of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from gptq_ao.errors import CalibrationError, ConfigError

__all__ = ["CHAT_COLUMNS", "Chat", "Document", "as_chats", "chat_in", "rendered"]

Chat = list[dict[str, Any]]
Document = str | Chat

CHAT_COLUMNS = ("messages", "conversations")  # where a row has no field that was asked for
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}


def chat_in(value: Any, where: str) -> Chat | None:
    """The messages that a field of a row holds; None: it is no list of them.

    Raises:
        CalibrationError: a message has no role or no content, or there is none.
    """
    if isinstance(value, Mapping):  # a struct of lists, as some readers of columnar files give it
        columns = {str(k): _listed(v) for k, v in value.items()}
        if not columns or any(c is None or len(c) != len(next(iter(columns.values())) or ()) for c in columns.values()):
            return None
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    messages = _listed(value)
    if messages is None or not all(isinstance(m, Mapping) for m in messages):
        return None
    if not messages:
        raise CalibrationError(f"{where} is a chat without messages: leave such documents out")
    return [_message(dict(m), f"{where}, message {n}") for n, m in enumerate(messages)]


def _listed(value: Any) -> list[Any] | None:
    value = value.tolist() if hasattr(value, "__array__") else value
    return list(value) if isinstance(value, list | tuple) else None


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = message.pop("role", message.pop("from", None)), message.pop("content", message.pop("value", None))
    # Columnar files have every field in every row: null where it was not given.
    others = {k: v for k, v in message.items() if v is not None}
    if not isinstance(role, str):
        raise CalibrationError(
            f"{where}, counting from 0, has no role: a message is {{role, content}}, or ShareGPT's {{from, value}}"
        )
    if not isinstance(content, str | list) and not others.get("tool_calls"):
        raise CalibrationError(f"{where}, counting from 0, has no content that is text: leave such documents out")
    return {"role": _ROLES.get(role, role), "content": content, **others}


def rendered(tokenizer: Any, document: Document, where: str = "a document") -> str:
    """A document's text: of a chat, what the tokenizer's template makes of it, without a prompt for an answer.

    Raises:
        ConfigError: the tokenizer has no template, or one that does not take these messages.
    """
    return document if isinstance(document, str) else _templated(tokenizer, document, f"{where} is a chat (messages)")


def as_chats(tokenizer: Any, documents: Iterable[Document]) -> list[Document]:
    """Each text as what a user says; chats are what they were.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template: leave out --chat-template")
    return [[{"role": "user", "content": d}] if isinstance(d, str) else d for d in documents]


def _templated(tokenizer: Any, chat: Chat, what: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer has no chat template, and {what}: give text, another tokenizer, or set "
            "tokenizer.chat_template"
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    # A template is a program of its own.
    except Exception as e:
        raise ConfigError(f"the tokenizer's chat template cannot be used: {type(e).__name__}: {e}") from e
