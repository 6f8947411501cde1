"""Text as calibration batches.

Packed: every document's tokens follow one separator (the tokenizer's beginning-of-text token, else its end-of-text
token, else none); documents are concatenated in order and cut into chunks of equal length without overlap, so no
position is wasted. Padded: each document is a row of its own, and an attention mask says where it ends; what is behind
that does not count in a Hessian.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gptq_ao.data.batches import Batches
from gptq_ao.data.chats import Document, as_chats, rendered
from gptq_ao.data.documents import Opened, Source, checked, opened
from gptq_ao.errors import CalibrationError, ConfigError

__all__ = ["Samples", "shares", "spaced", "text_batches", "text_samples", "token_chunks"]

Tokenizer = Callable[..., Any]


@dataclass(frozen=True)
class Samples:
    """Sequences that were drawn.

    Attributes:
        inputs: "input_ids" int64 [n, L]; if padded also "attention_mask" int64 [n, L].
        origin: int64 [n], the source of each.
        sources: what these are, in words.
        plain: whether any of the text is no chat.
    """

    inputs: dict[str, Tensor]
    origin: Tensor
    sources: tuple[str, ...]
    plain: bool

    def __len__(self) -> int:
        return len(self.origin)

    def __getitem__(self, part: slice | Tensor) -> "Samples":
        return replace(self, inputs={k: v[part] for k, v in self.inputs.items()}, origin=self.origin[part])

    @property
    def described(self) -> str:
        counts = torch.bincount(self.origin, minlength=len(self.sources)).tolist()
        parts = zip(counts, self.sources, strict=True)
        return "; ".join(f"{_count(n)} of {said}" for n, said in parts)

    def batches(self, batch_size: int) -> Batches:
        parts = [self[start : start + batch_size].inputs for start in range(0, len(self), batch_size)]
        return Batches(parts, self.described)


def text_batches(
    tokenizer: Tokenizer,
    source: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    split: str = "train",
    column: str = "text",
    pack: bool = True,
    chat_template: bool = False,
) -> Batches:
    """Calibration batches `{"input_ids": int64 [batch_size, seq_len]}` from text; a list.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: a list of documents (strings, chats as lists of messages, or dicts that hold one), a `datasets.Dataset`
            or data frame, a local .jsonl, .json, .txt or .parquet file, a folder of such files, the name of a preset
            (`gptq_ao.data.PRESETS`; `"NAME@REVISION"` for another revision), `"hf:REPOSITORY[:CONFIG][:SPLIT][#COLUMN]
            [@REVISION]"` for any other set of the hub, of which as many rows are streamed as are needed, or a name for
            `datasets.load_dataset` (`"name"` or `"name:configuration"`), which is loaded as a whole.
        weights: `source` is then a list of sources, and these are the shares of `num_samples` that they give: numbers
            above 0, of any sum. Rounded by the largest remainder; a source that has not as many sequences is an error.
        num_samples: sequences to draw, without repetition; of a single source all of them if there are fewer.
        seed: of the draw. The global random state is neither read nor changed.
        split, column: where the text is in a dataset; `column` also in files and documents with fields. Rows without a
            field "text" may have `messages` (role, content) or `conversations` (from, value): the tokenizer's chat
            template makes text of them, without a prompt for an answer.
        pack: whether documents are joined to sequences of full length. If not, each document is a sequence, cut at
            `seq_len`, padded on the right to the longest that was drawn, with an "attention_mask" int64 beside the ids.
        chat_template: whether each document that is text is what a user says.

    Raises:
        CalibrationError: a source cannot be read, holds something that is not text, or less than is needed.
        ConfigError: a number is less than 1, the seed is too large, the weights do not fit the sources, or there are
            chats and the tokenizer has no template for them.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}: give a number, 1 or more")
    samples = text_samples(
        tokenizer,
        [source] if weights is None else source,  # type: ignore[arg-type]
        weights,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        split=split,
        column=column,
        pack=pack,
        chat_template=chat_template,
    )
    return samples.batches(batch_size)


def text_samples(
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    num_samples: int,
    seq_len: int,
    seed: int = 0,
    split: str = "train",
    column: str = "text",
    pack: bool = True,
    chat_template: bool = False,
) -> Samples:
    """What `text_batches` makes batches of. See there; without weights, several sources give equal shares."""
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}: give a number, 1 or more")
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}: give a number of at most 64 bits")
    if isinstance(sources, str) or not isinstance(sources, Sequence):
        raise ConfigError(f"weights are of several sources, and source is one ({type(sources).__name__}): give a list")
    if not sources:
        raise ConfigError("there are no sources: give one or more")
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise ConfigError(f"there are {len(sources)} sources and {len(weights)} weights: give one for each")
    counts = [num_samples] if len(sources) == 1 else shares(weights, num_samples)
    drawn, plain = [], False
    for source, count in zip(sources, counts, strict=True):
        found = opened(source, split=split, column=column, seed=seed)
        texts = _Texts(tokenizer, found, chat_template)
        drawn.append(_packed(texts, count, seq_len, seed) if pack else _padded(texts, count, seq_len, seed))
        plain |= texts.plain
        have = len(drawn[-1])
        if len(sources) > 1 and have < count:
            full = f" of {seq_len} tokens" if pack else ""
            raise CalibrationError(
                f"{found.name} has {_count(have)}{full}, and its share of {num_samples} is {count}: give more text, a "
                "smaller weight, or fewer samples"
            )
        if have < count:
            drawn[-1] = replace(drawn[-1], said=f"{drawn[-1].said}, fewer than the {count} that were asked for")
    said = tuple(d.said for d in drawn)
    width = max(len(row) for d in drawn for row in d.rows)
    ids = torch.full((sum(map(len, drawn)), width), _filler(tokenizer))
    mask = torch.zeros_like(ids)
    for into, real, row in zip(ids, mask, (row for d in drawn for row in d.rows), strict=True):
        into[: len(row)] = row
        real[: len(row)] = 1
    origin = torch.cat([torch.full((len(d),), n) for n, d in enumerate(drawn)])
    samples = Samples({"input_ids": ids} if pack else {"input_ids": ids, "attention_mask": mask}, origin, said, plain)
    # One after another, the first batches, or a part that is kept to check with, would be of one source only.
    return samples if len(sources) == 1 else samples[_shuffled(len(samples), seed)]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by weights: what each gets differs from its exact share by less than 1 (largest remainders; of
    equal ones the first).

    Raises:
        ConfigError: a weight is no number above 0, or its share is none.
    """
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"the weight {weight!r} of a source is no number above 0")
    # As it was written: 0.7 is seven tenths.
    parts = [Fraction(w) if isinstance(w, int) else Fraction(repr(float(w))) for w in weights]
    exact = [total * part / sum(parts) for part in parts]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for n in order[: total - sum(counts)]:
        counts[n] += 1
    if 0 in counts:
        raise ConfigError(
            f"source {counts.index(0)}, counting from 0, of weight {weights[counts.index(0)]} gives none of {total} "
            "samples: raise its weight, or take more samples"
        )
    return counts


def token_chunks(tokenizer: Tokenizer, documents: Iterable[Document], seq_len: int) -> Tensor:
    """All chunks of `documents` (texts and chats), int64 [chunks, seq_len]; the remainder is left out.

    Raises:
        CalibrationError: the text is less than one chunk.
        ConfigError: there are chats and the tokenizer has no template for them.
    """
    name = "the documents"
    return _chunks(_Texts(tokenizer, Opened(checked(documents, name), False, name, name), False), seq_len)


def spaced(chunks: Tensor, at_most: int) -> Tensor:
    """`at_most` of the chunks [n, L], evenly spaced over all of them, the first included."""
    return chunks if len(chunks) <= at_most else chunks[torch.arange(at_most) * len(chunks) // at_most]


@dataclass(frozen=True)
class _Drawn:
    rows: Sequence[Tensor]  # int64 [≤ seq_len] each
    said: str

    def __len__(self) -> int:
        return len(self.rows)


class _Texts:
    """The texts of a source, each with whether it was a chat.

    Attributes:
        plain: whether one of those so far was not.
    """

    def __init__(self, tokenizer: Tokenizer, source: Opened, as_user: bool) -> None:
        self.tokenizer, self.source, self.plain = tokenizer, source, False
        self._as_user = as_user

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        for document in self.source.documents:
            said = as_chats(self.tokenizer, [document])[0] if self._as_user else document
            chat = not isinstance(said, str)
            self.plain |= not chat
            yield rendered(self.tokenizer, said, self.source.name), chat

    def tokens(self, text: str) -> list[int]:
        # Special tokens are placed by hand. Not verbose: the tokenizer would warn of long documents.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _count(sequences: int) -> str:
    return f"{sequences} sequence{'' if sequences == 1 else 's'}"


def _shuffled(count: int, seed: int) -> Tensor:
    # A generator of its own, on the CPU: the same seed draws the same samples anywhere.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _packed(texts: _Texts, count: int, seq_len: int, seed: int) -> _Drawn:
    chunks = _chunks(texts, seq_len, count if texts.source.streamed else None)
    return _Drawn([*chunks[_shuffled(len(chunks), seed)[:count]]], texts.source.said)


def _chunks(texts: _Texts, seq_len: int, at_most: int | None = None) -> Tensor:
    tokenizer = texts.tokenizer
    # Asked for None, not for truth: a token may have the number 0.
    separator = getattr(tokenizer, "bos_token_id", None)
    separator = getattr(tokenizer, "eos_token_id", None) if separator is None else separator
    first = getattr(tokenizer, "bos_token", None) or ""
    tokens: list[int] = []
    seen = 0
    for text, chat in texts:
        seen += 1
        if separator is not None:
            tokens.append(separator)
        # A template may write the token that separates.
        tokens += texts.tokens(text.removeprefix(first) if chat else text)
        if at_most is not None and len(tokens) >= at_most * seq_len:
            break
    if not seen:
        raise CalibrationError(f"{texts.source.name} holds no document")
    # What does not fill a chunk is dropped: padding would be calibrated on.
    count = len(tokens) // seq_len
    if count == 0:
        raise CalibrationError(
            f"the text has {len(tokens)} tokens, less than one sequence of {seq_len}, in {texts.source.name}: give "
            "more text or a smaller seq_len"
        )
    return torch.tensor(tokens[: count * seq_len]).view(count, seq_len)


def _padded(texts: _Texts, count: int, seq_len: int, seed: int) -> _Drawn:
    first = getattr(texts.tokenizer, "bos_token_id", None)
    written = ((text, chat) for text, chat in texts if text.strip())
    if texts.source.streamed:
        drawn = list(islice(written, count))
    else:
        every = list(written)
        drawn = [every[n] for n in _shuffled(len(every), seed)[:count].tolist()]
    rows, cut = [], 0
    for text, chat in drawn:
        # A template writes what begins a chat itself.
        tokens = texts.tokens(text)
        tokens = tokens if chat or first is None else [first, *tokens]
        cut += len(tokens) > seq_len
        rows.append(torch.tensor(tokens[:seq_len]))
    if not rows:
        raise CalibrationError(f"{texts.source.name} holds no document that is not empty")
    return _Drawn(rows, f"{texts.source.said}, a document each, {cut} of them cut to {seq_len} tokens")


def _filler(tokenizer: Tokenizer) -> int:
    """The token where there is none; the mask says so, whichever it is."""
    found = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in found if token is not None), 0)
