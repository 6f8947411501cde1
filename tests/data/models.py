"""Tokenizers of the tests of this room."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Bytes:
    """A tokenizer: byte b is token b + 1, 0 begins a text."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 300

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        assert kwargs["add_special_tokens"] is False
        return {"input_ids": [b + 1 for b in text.encode()]}


class Chatting(Bytes):
    """And one with a chat template."""

    chat_template = TEMPLATE

    def apply_chat_template(self, chat: Any, tokenize: bool, **kwargs: Any) -> str:
        assert not tokenize
        assert not kwargs  # neither tools nor a prompt for an answer
        return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in chat)


def stream(texts: Iterable[str]) -> list[int]:
    """Documents as `Bytes` packs them."""
    return [token for text in texts for token in (0, *(b + 1 for b in text.encode()))]


def tiny(template: str | None = TEMPLATE) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    return tokenizer
