"""The errors that the source makes, with their messages, in which … stands for a value."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("gptq_ao", "passes", "kernels", "examples/tiny_lm")  # those in gptq_ao/ that are links are not followed


@dataclass(frozen=True)
class Message:
    """`text` is "" where another function makes the message, or it is nothing but values."""

    error: str
    file: str
    line: int
    text: str


def words(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(map(words, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return words(left) + words(right)
    return "…"


def errors() -> set[str]:
    """Names of the classes of errors, warnings apart."""
    tree = ast.parse((ROOT / "gptq_ao" / "errors.py").read_text(encoding="utf-8"))
    return {c.name for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Error")}


@cache
def messages() -> tuple[Message, ...]:
    known, found = errors(), []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in known:
                    text = re.sub(r"\s+", " ", words(first)).strip()
                    said = len(re.findall(r"[a-z]{2,}", text)) > 1
                    found.append(Message(name, path.relative_to(ROOT).as_posix(), node.lineno, text if said else ""))
    return tuple(found)


def of(error: str, places: list[str]) -> list[Message]:
    """The messages of a class that files or folders make."""
    return [m for m in messages() if m.error == error and any((m.file + "/").startswith(f"{p}/") for p in places)]
