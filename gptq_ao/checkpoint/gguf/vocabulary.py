"""A tokenizer as llama.cpp has it, which splits text itself: by merges in order of rank ("gpt2"), or of score ("llama",
as SentencePiece does)."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptq_ao.checkpoint.gguf.package import gguf_package
from gptq_ao.errors import CheckpointError

__all__ = ["Vocabulary", "vocabulary_of"]

# What comes before the merges: the pattern by which a tokenizer.json splits text → llama.cpp's name of its own code for
# that, and whether that takes a word that is a token as it is (`ignore_merges`).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    None: ("gpt-2", False),  # that of ByteLevel itself
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: ("llama-bpe", True),
    _CONTRACTIONS + r"\p{N}" + _REST: ("qwen2", False),
}
# A tokenizer without merges has to have some for llama.cpp. This one is never done: nothing makes its first half.
_NO_MERGES = ["ĀĀ Ā"]
_SPACE = "▁"
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
# Where the name of a model has this, llama.cpp looks up these tokens, takes spaces behind special ones away, and does
# not load a vocabulary without them.
_STRIPPED, _LOOKED_UP = re.compile("phi-?3", re.IGNORECASE), ("</s>", "<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """
    Attributes:
        add: what puts it into a GGUFWriter.
        notes: what may not be as in transformers, a sentence each.
        texts: of all tokens.
        strips: whether there are tokens that take spaces away.
    """

    add: Callable[[Any], None]
    notes: tuple[str, ...] = ()
    texts: frozenset[str] = frozenset(_LOOKED_UP)
    strips: bool = False

    def why_no_name(self, name: str) -> str | None:
        """Why a model with these tokens cannot be called so; None: it can."""
        missing = [t for t in _LOOKED_UP if t not in self.texts] if _STRIPPED.search(name) else []
        return f"llama.cpp looks for the token {missing[0]!r} in models that are called {name!r}" if missing else None

    def notes_for(self, name: str) -> tuple[str, ...]:
        """`notes`, in a model of that name."""
        if not self.strips or _STRIPPED.search(name):
            return self.notes
        note = "the tokenizer has special tokens that take spaces beside them away, which they do not in llama.cpp"
        return (*self.notes, note)


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """What is written of a tokenizer.

    Args:
        tokenizer: one of transformers; None: the file gets none, and whatever reads it takes token ids only.
        size: number of the model's tokens. Those that the tokenizer lacks get names of their own, as unused ones.

    Raises:
        CheckpointError: llama.cpp has no tokenizer of this kind, or the model has fewer tokens.
    """
    if tokenizer is None:
        note = "there is no tokenizer (give tokenizer=…), so the file has none: programs that take text cannot use it"
        return Vocabulary(lambda writer: writer.add_tokenizer_model("no_vocab"), (note,))
    gguf = gguf_package()
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _refused(tokenizer, "it has no tokenizer.json, from which it could be written")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(tokenizer, f"it is of the type {model['type']}, and only BPE is written")
    added = {t["id"]: t for t in content["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    if texts and max(texts) >= size:
        raise _refused(tokenizer, f"it has a token of number {max(texts)}, and the model {size} tokens")
    pieces = bool(model.get("byte_fallback"))  # SentencePiece's; others have a character for each byte
    steps = {place: _steps(content.get(place)) for place in ("normalizer", "pre_tokenizer")}
    split = _check_pieces(tokenizer, steps) if pieces else _split(tokenizer, model, steps)
    ranks = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    scores = _scores(ranks) if pieces else {}

    def kind(number: int) -> int:
        types = gguf.TokenType
        if number not in texts:
            return int(types.UNUSED)
        if pieces and texts[number] == model.get("unk_token"):
            return int(types.UNKNOWN)
        if number in added:
            return int(types.CONTROL if added[number]["special"] else types.USER_DEFINED)
        return int(types.BYTE if pieces and re.fullmatch("<0x[0-9A-F]{2}>", texts[number]) else types.NORMAL)

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama" if pieces else "gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(size)])
        writer.add_token_types([kind(i) for i in range(size)])
        if pieces:
            # A token that no merge makes comes after all that one does.
            writer.add_token_scores([float(scores.get(texts.get(i, ""), -len(ranks) - 1)) for i in range(size)])
            writer.add_add_space_prefix(any(_prepends(s) for place in steps.values() for s in place))
        else:
            writer.add_token_merges([" ".join(pair) for pair in ranks] or _NO_MERGES)
        _add_special(writer, tokenizer)

    notes = []
    if pieces and not _by_score(ranks, scores, model["vocab"]):
        notes.append(
            "the tokenizer's merges are not in the order of scores, as those of SentencePiece are: llama.cpp may split "
            "text in another way"
        )
    if not pieces and steps["normalizer"]:
        notes.append("the tokenizer brings text into Unicode's form NFC first, which llama.cpp does not")
    strips = any(token[side] for token in added.values() for side in ("lstrip", "rstrip"))
    return Vocabulary(add, tuple(notes), frozenset(texts.values()), strips)


def _steps(part: Any) -> list[dict[str, Any]]:
    """Of a normalizer or a pre-tokenizer, which may be a sequence of some."""
    part = part or {}
    return [s for s in part.get("normalizers", part.get("pretokenizers", [part])) if s]


def _split(tokenizer: Any, model: Mapping[str, Any], steps: Mapping[str, list[dict[str, Any]]]) -> str:
    """llama.cpp's name for what is done before the merges."""
    levels = [s for s in steps["pre_tokenizer"] if s["type"] == "ByteLevel"]
    patterns: list[str | None] = [s["pattern"].get("Regex", "") for s in steps["pre_tokenizer"] if s["type"] == "Split"]
    patterns += [None for s in levels if s.get("use_regex", True)]
    others = [s["type"] for s in steps["normalizer"] if s["type"] != "NFC"]
    others += [s["type"] for s in steps["pre_tokenizer"] if s["type"] not in ("Split", "ByteLevel")]
    if len(levels) == 1 and not others and not levels[0].get("add_prefix_space"):
        if not model["merges"]:
            return "gpt-2"  # a token for each byte, however text is split
        name, whole = _SPLITS.get(patterns[0], ("", False)) if len(patterns) == 1 else ("", False)
        if name and whole == bool(model.get("ignore_merges")):
            return name
    raise _refused(
        tokenizer,
        "what it does before the merges is none of "
        f"{', '.join(name for name, _ in _SPLITS.values())}, which llama.cpp has code for",
    )


def _check_pieces(tokenizer: Any, steps: Mapping[str, list[dict[str, Any]]]) -> str:
    """llama.cpp's name for what is done before the merges: spaces become a letter, and nothing else."""
    gone = False  # whether there are no spaces left
    for step in (s for place in steps.values() for s in place):
        at_spaces = step.get("pattern") == {"String": " "}
        spaces = step["type"] == "Replace" and at_spaces and step["content"] == _SPACE
        gone = gone or spaces
        if gone and step["type"] == "Split" and at_spaces:
            continue  # Gemma's, which finds none
        whole = step["type"] == "Metaspace" and step.get("replacement") == _SPACE and not step.get("split", True)
        if not (spaces or whole or (step["type"] == "Prepend" and step["prepend"] == _SPACE)):
            raise _refused(tokenizer, f"before the merges it does {step}, which llama.cpp does not")
    return "default"


def _prepends(step: Mapping[str, Any]) -> bool:
    """Whether text gets a space in front."""
    metaspace = step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Prepend" or metaspace


def _add_special(writer: Any, tokenizer: Any) -> None:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    # By what it does: files say it in many ways, and llama.cpp has a default for each kind of tokenizer.
    around = tokenizer("").input_ids
    writer.add_add_bos_token(bool(around) and around[0] == ids["bos"])
    writer.add_add_eos_token(len(around) > (ids["bos"] == ids["eos"]) and around[-1] == ids["eos"])
    template = getattr(tokenizer, "chat_template", None)
    if template:
        named = isinstance(template, dict)
        writer.add_chat_template([{"name": n, "template": t} for n, t in template.items()] if named else template)


def _scores(ranks: list[Any]) -> dict[str, int]:
    """Token → score: the earlier a merge makes it, the higher."""
    scores: dict[str, int] = {}
    for rank, (left, right) in enumerate(ranks):
        scores.setdefault(left + right, -rank)
    return scores


def _by_score(ranks: list[Any], scores: Mapping[str, int], vocabulary: Mapping[str, int]) -> bool:
    """Whether to merge whatever makes the token of the highest score is to merge in the order of the ranks: all merges
    that make a token are there, one after the other."""
    order = [scores[left + right] for left, right in ranks]
    pairs = {(left, right) for left, right in ranks}
    halves = ((t[:i], t[i:]) for t in vocabulary for i in range(1, len(t)))
    return order == sorted(order, reverse=True) and all(
        half in pairs for half in halves if half[0] in vocabulary and half[1] in vocabulary
    )


def _refused(tokenizer: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"the {type(tokenizer).__name__} cannot be written for llama.cpp: {why}. A model without a tokenizer can be: "
        "save it where there are no files of one, with tokenizer=None"
    )
