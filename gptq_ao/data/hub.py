"""Rows of a dataset of the Hugging Face hub, streamed: the first ones of a seeded order, of a known revision."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from gptq_ao.data.files import columns_of
from gptq_ao.data.presets import PRESETS
from gptq_ao.errors import CalibrationError

__all__ = ["BUFFER", "Dataset", "hub_rows", "located", "named", "whole_dataset"]

# Rows that are shuffled at once, beside the order of the files; it is part of what makes the order the same again.
BUFFER = 1000

_SPEC = re.compile(
    r"hf:(?P<repository>[^:#@]+)(:(?P<config>[^:#@]*))?(:(?P<split>[^:#@]+))?(#(?P<column>[^@]+))?(@(?P<revision>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Dataset:
    """One split of a repository.

    Attributes:
        name: as it was asked for.
        revision: to read; None: the newest.
        lines: see `Preset`.
    """

    name: str
    repository: str
    config: str | None
    split: str
    column: str
    revision: str | None
    license: str | None
    lines: bool = False

    @property
    def where(self) -> str:
        """For messages."""
        at = f" at {self.revision}" if self.revision else ""
        return f"dataset {self.repository!r}{at}, split {self.split!r},"

    def __str__(self) -> str:
        preset = self.name.partition("@")[0]
        # Where a folder lies on this machine is nobody's business.
        name = os.path.basename(self.repository) if os.path.isdir(self.repository) else self.repository
        parts = (
            f"{preset}: {name}" if preset in PRESETS else name,
            self.config,
            f"split {self.split}",
            f"column {self.column}",
            self.revision and f"revision {self.revision}",
            f"license {self.license or 'not stated'}",
        )
        return ", ".join(p for p in parts if p)


def named(source: str, *, split: str, column: str) -> Dataset | None:
    """What a source names: `NAME[@REVISION]` of a preset or `hf:REPOSITORY[:CONFIG][:SPLIT][#COLUMN][@REVISION]`.
    None: it is neither.

    Args:
        split: if none is named; of a preset "train" and "test" are what it calibrates with and holds out.

    Raises:
        CalibrationError: it begins like one, and is not; or the preset holds nothing out.
    """
    name, _, revision = source.partition("@")
    if name in PRESETS:
        preset = PRESETS[name]
        there = {"train": preset.train, "test": preset.test}.get(split, split)
        if there is None:
            raise CalibrationError(
                f"{name} holds no text out, so nothing is known to be new to a model that was calibrated with it: give "
                "another text"
            )
        revision = revision or preset.revision or ""
        return Dataset(
            source,
            preset.repository,
            preset.config,
            there,
            preset.column,
            revision or None,
            preset.license,
            preset.lines,
        )
    if not source.startswith("hf:"):
        return None
    found = _SPEC.fullmatch(source)
    if found is None:
        raise CalibrationError(
            f"{source!r} is not hf:REPOSITORY[:CONFIG][:SPLIT][#COLUMN][@REVISION], such as "
            "hf:owner/name:default:train#text@main"
        )
    given = found.groupdict()
    return Dataset(
        source,
        given["repository"],
        given["config"] or None,
        given["split"] or split,
        given["column"] or column,
        given["revision"],
        None,
    )


def located(dataset: Dataset) -> Dataset:
    """With the commit that its revision is now, and the license that its card names.

    Raises:
        CalibrationError: the hub cannot be asked, or has no such repository or revision.
    """
    pinned = dataset.revision is not None and _COMMIT.fullmatch(dataset.revision) is not None
    if os.path.isdir(dataset.repository) or (pinned and dataset.license is not None):
        return dataset
    try:
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(dataset.repository, revision=dataset.revision, timeout=60)
    except Exception as e:
        raise _unavailable(dataset.where, e) from e
    card: Any = getattr(info, "card_data", None)
    stated = getattr(card, "license", None)
    told = ", ".join(map(str, stated)) if isinstance(stated, list) else stated
    return replace(dataset, revision=info.sha, license=dataset.license or told)


def hub_rows(dataset: Dataset, seed: int) -> Iterator[Any]:
    """Rows of a `located` dataset: if they are lines, in their order, else in one of the seed.

    Raises:
        CalibrationError: it cannot be loaded.
    """
    try:
        import datasets

        loaded = datasets.load_dataset(
            dataset.repository, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
        if not dataset.lines:
            loaded = loaded.shuffle(seed=seed % 2**64, buffer_size=BUFFER)
        rows = iter(loaded)
    except Exception as e:
        raise _unavailable(dataset.where, e) from e
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:  # files are fetched when they are read
            raise _unavailable(dataset.where, e) from e
        yield row


def whole_dataset(name: str, split: str, column: str) -> Iterable[Any]:
    """Rows with the field `column`, or a chat's, of what `datasets` loads as `"name"` or `"name:configuration"`.

    Raises:
        CalibrationError: it cannot be loaded, or has no such column.
    """
    path, _, configuration = name.partition(":")
    try:
        import datasets

        rows = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as e:
        meant = get_close_matches(name, PRESETS, 1, 0.7)
        hint = f"\nThere is a preset {meant[0]!r}" if meant else ""
        raise _unavailable(f"dataset {name!r}, split {split!r},", e, hint) from e
    columns = columns_of(rows.column_names, column)
    if not columns:
        raise CalibrationError(f"dataset {name!r} has the columns {rows.column_names}, not {column!r}")
    return rows.select_columns(columns)


def _unavailable(what: str, e: Exception, hint: str = "") -> CalibrationError:
    """A missing name, no network, no such split: there is a different error for each."""
    otherwise = "give a local file (.jsonl, .json, .txt, .parquet) or a folder of such files"
    if isinstance(e, ImportError):
        return CalibrationError(f"{what} needs a package that is missing ({e}): pip install datasets, or {otherwise}")
    return CalibrationError(f"{what} cannot be loaded: {type(e).__name__}: {e}\nWithout a network, {otherwise}{hint}")
