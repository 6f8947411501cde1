"""Images, audio, and text beside them, as calibration batches: what a processor of transformers makes of samples."""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from itertools import islice
from typing import Any

from gptq_ao.data.batches import Batches
from gptq_ao.data.chats import chat_in
from gptq_ao.errors import CalibrationError, ConfigError

__all__ = ["processor_batches"]

# What processors of several kinds of data take, where theirs does not say it; and how data sets call the same.
_KINDS = ("images", "text", "videos", "audio", "raw_speech")
_ALSO = {"image": ("images",), "video": ("videos",), "audio": ("raw_speech",), "messages": ("text",)}


def processor_batches(
    processor: Any,
    samples: Iterable[Any],
    *,
    batch_size: int = 1,
    num_samples: int | None = None,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> Batches:
    """Calibration batches as `processor(…, return_tensors="pt")` gives them, of samples in their order.

    Args:
        processor: of transformers: for images, for audio, or of a model that takes several of these.
        samples: dicts, or a `datasets.Dataset`, in memory or streamed. If the processor takes only one thing, samples
            may be that (images, arrays).
        num_samples: the first ones; None: all.
        columns: argument of the processor → field of a sample; None: fields are called like the arguments (images,
            text, videos, audio), or `image`, `video`. A field `messages`, or one that has them for `text`, is a chat:
            the processor's template makes text of it. Audio may be `{"array", "sampling_rate"}`.
        options: further arguments of the processor. Text is padded (`padding=True`) unless they say otherwise.

    Raises:
        CalibrationError: there are no samples, one lacks a field, or the processor fails.
        ConfigError: a number is less than 1, or a field is nothing that the processor takes.
    """
    for name, value in (("batch_size", batch_size), ("num_samples", 1 if num_samples is None else num_samples)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}: give a number, 1 or more")
    if isinstance(samples, Mapping):
        raise CalibrationError(
            f"the samples are a {type(samples).__name__} with {list(samples)}: give one of its splits"
        )
    kind, takes = type(processor).__name__, _takes(processor)
    unknown = [name for name in columns or () if name not in takes]
    if unknown:
        raise ConfigError(f"columns names {unknown[0]!r}, and {kind} takes {', '.join(takes)}")
    batches: list[dict[str, Any]] = []
    count, given = 0, islice(samples, num_samples)
    while part := list(islice(given, batch_size)):
        rows = [_arguments(s, takes, columns, processor, count + n) for n, s in enumerate(part)]
        different = next((n for n, row in enumerate(rows) if set(row) != set(rows[0])), None)
        if different is not None:
            raise CalibrationError(
                f"sample {count + different} has {sorted(rows[different])} and sample {count} {sorted(rows[0])}: those "
                "that run together have the same fields"
            )
        arguments: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        how = {**_sampling(arguments, count), **({"padding": True} if "text" in arguments else {}), **options}
        try:
            batches.append(dict(processor(**arguments, **how, return_tensors="pt")))
        # It may be any code.
        except Exception as e:
            which = f"sample {count}" if len(part) == 1 else f"samples {count} to {count + len(part) - 1}"
            raise CalibrationError(f"{kind} cannot process {which}: {type(e).__name__}: {e}") from e
        count += len(part)
    if not batches:
        raise CalibrationError("there are no samples (a generator already read?)")
    return Batches(batches, f"{count} sample{'' if count == 1 else 's'} in memory, by {kind}")


def _takes(processor: Any) -> list[str]:
    """The arguments that data is given in."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = [name for name, p in signature(processor.__call__).parameters.items() if p.kind in named]
    return [name for name in names if name in _KINDS] or names[:1] or [name for name in _KINDS if name != "raw_speech"]


def _arguments(
    sample: Any, takes: list[str], columns: Mapping[str, str] | None, processor: Any, number: int
) -> dict[str, Any]:
    kind = type(processor).__name__
    if not isinstance(sample, Mapping):
        if len(takes) > 1:
            raise CalibrationError(
                f"sample {number} is a {type(sample).__name__}, and {kind} takes {', '.join(takes)}: give dicts"
            )
        sample, columns = {takes[0]: sample}, None
    if columns is None:
        columns = {}
        for field in sample:
            argument = next((name for name in (field, *_ALSO.get(field, ())) if name in takes), None)
            if argument is None or argument in columns:
                raise ConfigError(
                    f"sample {number} has the fields {sorted(sample)}, and {kind} takes {', '.join(takes)}, so "
                    f"{field!r} is nothing for it: name what it is to get, columns={{{takes[0]!r}: FIELD}}"
                )
            columns[argument] = field
    missing = [field for field in columns.values() if field not in sample]
    if missing:
        raise CalibrationError(f"sample {number} has the fields {sorted(sample)}, not {missing[0]!r}")
    found = {argument: sample[field] for argument, field in columns.items()}
    chat = None if isinstance(found.get("text", ""), str) else chat_in(found["text"], f"sample {number}")
    if chat is not None:
        if not hasattr(processor, "apply_chat_template"):
            raise ConfigError(f"sample {number} is a chat (messages), and {kind} has no chat template: give text")
        try:
            found["text"] = processor.apply_chat_template(chat, tokenize=False)
        except Exception as e:
            raise ConfigError(f"the chat template of {kind} cannot be used: {type(e).__name__}: {e}") from e
    return found


def _sampling(arguments: dict[str, Any], first: int) -> dict[str, int]:
    """Audio as `datasets` has it, made the arrays alone; and what is said of their rate."""
    rates = set()
    for name in ("audio", "raw_speech"):
        for n, value in enumerate(arguments.get(name, ())):
            if isinstance(value, Mapping) or hasattr(value, "get_all_samples"):
                arguments[name][n] = value["array"]
                rates.add(int(value["sampling_rate"]))
    if len(rates) > 1:
        raise CalibrationError(f"the samples from {first} on have the sampling rates {sorted(rates)}: resample them")
    return {"sampling_rate": rates.pop()} if rates else {}
