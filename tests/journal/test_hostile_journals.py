"""Journals that were not written here, or not for this: each is refused by what is wrong with it, or, where a file was
lost or damaged, what it held is made again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.errors import CheckpointError
from gptq_ao.journal.files import append_line
from gptq_ao.journal.journal import LINES
from gptq_ao.tensor import GroupTensor

from ..models import seeded


def make() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)))


def run(journal: Path, **more: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(12, 32, generator=generator) for _ in range(3)]
    model = make()
    settings = gptq_config(4, 16, adapter_rank=2, act_order="group", calibration=data)
    report: Any = quantize_(model, settings, journal=journal, snapshot_every=2, **more)
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    return {f"{n}.{k}": t for n, p in weights.items() for k, t in p.parts().items()}, report.notes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The journal of a run, and what it made."""
    journal = tmp_path_factory.mktemp("finished") / "journal"
    return journal, run(journal)[0]


@pytest.fixture
def journal(finished: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "journal"))


def lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (journal / LINES).read_text().splitlines()]


def rewrite(journal: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """With digests that are right."""
    said = lines(journal)
    for line in said:
        del line["sha256"]
    change(said)
    (journal / LINES).unlink()
    for line in said:
        append_line(journal / LINES, line)


def find(said: list[dict[str, Any]], kind: str, number: int = 0) -> dict[str, Any]:
    return next(line for line in said if line["kind"] == kind and line.get("number", 0) == number)


def with_tensors(journal: Path, file: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(journal / file)
    change(tensors)
    save_file(tensors, journal / file)

    def change_line(said: list[dict[str, Any]]) -> None:
        for part in (part for line in said for part in line.get("parts", ()) if part["file"] == file):
            part["file_sha256"] = hashlib.sha256((journal / file).read_bytes()).hexdigest()

    rewrite(journal, change_line)


STAGE = "stage-00002-00000.safetensors"
SNAPSHOT = "snapshot-00002-00001.safetensors"
LINE_CHANGES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "another format": (lambda s: s[0].update(format="x"), r"journal.jsonl is not a journal of gptq_ao"),
    "no first line": (lambda s: s.pop(0), r"journal.jsonl is not a journal of gptq_ao"),
    "another version": (lambda s: s[0].update(format_version=2), r"has format version 2, this gptq_ao reads 1"),
    "facts are a list": (lambda s: s[0].update(facts=[]), r"has format version 1, this gptq_ao reads 1"),
    "another kind": (lambda s: s[1].update(kind="code"), r"is damaged: a line says \{'kind': 'code'"),
    "a number that is none": (lambda s: find(s, "stage", 2).update(number="2"), r"is damaged: a line says"),
    "parts that are none": (lambda s: find(s, "stage", 2).update(parts=[3]), r"is damaged: a line says"),
    "a path": (
        lambda s: find(s, "stage", 2)["parts"][0].update(file="../model.safetensors"),
        r"names the file '../model.safetensors': only names that a journal gives are allowed",
    ),
    "an absolute path": (
        lambda s: find(s, "stage", 2)["parts"][0].update(file="/etc/passwd"),
        r"names the file '/etc/passwd'",
    ),
    "the lines": (lambda s: find(s, "stage", 2)["parts"][0].update(file=LINES), r"names the file 'journal.jsonl'"),
    "no name of a file": (lambda s: find(s, "stage", 2)["parts"][0].pop("file"), r"names the file None"),
    "another weight": (
        lambda s: find(s, "stage", 2)["parts"][0].update(name="4.weight"),
        r"is damaged: it has the weights \['4.weight'\] of stage 2, which has \['2.weight'\]",
    ),
    "no weight": (lambda s: find(s, "stage", 2).update(parts=[]), r"is damaged: it has the weights \[\] of stage 2"),
    "twice a weight": (
        lambda s: find(s, "stage", 2)["parts"].append(dict(find(s, "stage", 2)["parts"][0])),
        r"is damaged: it has the weights \['2.weight', '2.weight'\] of stage 2",
    ),
    "an error that is none": (
        lambda s: find(s, "stage", 2)["parts"][0].update(changed="0"),
        r"is damaged: weight '2.weight': ValueError: its changed is '0'",
    ),
    "no method": (lambda s: find(s, "stage", 2)["parts"][0].pop("method"), r"weight '2.weight': KeyError: 'method'"),
    "random numbers": (
        lambda s: find(s, "stage", 2).update(random=["aaaa"]),
        r"is damaged: the state of random numbers: \w+",
    ),
    "a stage that there is not": (
        lambda s: find(s, "snapshot", 2).update(number=9),
        r"is damaged: it has a snapshot of stage 9",
    ),
    "a snapshot of one batch": (
        lambda s: find(s, "snapshot", 2)["parts"].pop(),
        r"snapshot is of 2 batches, not of 3",
    ),
    "a snapshot of no batch": (lambda s: find(s, "snapshot", 2)["parts"].clear(), r"is of 0 batches, not of 3"),
    "a snapshot of nothing": (
        lambda s: find(s, "snapshot", 2)["parts"][1].update(values={}),
        r"its snapshot: ValueError: it has \[\], and \['original__relu', 'relu'\] are needed",
    ),
    "a snapshot of objects": (
        lambda s: [v.update(dtype="nn") for v in find(s, "snapshot", 2)["parts"][1]["values"].values()],
        r"its snapshot: ValueError: .* is of 'nn'",
    ),
    "a snapshot beyond its file": (
        lambda s: [v.update(stride=[10**6, 1]) for v in find(s, "snapshot", 2)["parts"][1]["values"].values()],
        r"its snapshot: RuntimeError: .*out of bounds",
    ),
}


@pytest.mark.parametrize("what", LINE_CHANGES)
def test_lines(what: str, journal: Path) -> None:
    change, message = LINE_CHANGES[what]
    rewrite(journal, change)
    with pytest.raises(CheckpointError, match=message) as e:
        run(journal)
    assert not any("goes on from there" in note for note in getattr(e.value, "__notes__", ()))


TENSOR_CHANGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "fewer rows": (STAGE, lambda t: t.update(codes=t["codes"][:-1].clone()), r"it has \{.*, and needs \{"),
    "another dtype": (STAGE, lambda t: t.update(scale=t["scale"].float()), r"it has \{.*, and needs \{"),
    "a tensor more": (STAGE, lambda t: t.update(more=t["scale"].clone()), r"it has \{.*, and needs \{"),
    "a tensor less": (STAGE, lambda t: t.pop("zero_point"), r"it has \{.*, and needs \{"),
    "an adapter of another rank": (STAGE, lambda t: t.update(A=t["A"][:1].clone()), r"it has \{.*, and needs \{"),
    "a scale that is infinite": (STAGE, lambda t: t["scale"].fill_(float("inf")), "a scale is not finite, or a zero"),
    "a zero point that is no code": (STAGE, lambda t: t["zero_point"].fill_(16), "or a zero point no code"),
    "no permutation": (STAGE, lambda t: t["perm"].fill_(70000), "its perm is not a permutation"),
    "another activation": (
        SNAPSHOT,
        lambda t: t.update({n: v[:-4].clone() for n, v in t.items()}),
        r"its snapshot: ValueError: .* of shape \(12, 64\) has 767 elements",
    ),
}


@pytest.mark.parametrize("what", TENSOR_CHANGES)
def test_tensors(what: str, journal: Path) -> None:
    file, change, message = TENSOR_CHANGES[what]
    with_tensors(journal, file, change)
    with pytest.raises(CheckpointError, match=message):
        run(journal)


def truncate(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CUT = "resumed: the last line of the journal was cut off"
LOST = {
    "line cut off": (lambda j: truncate(j / LINES), CUT),
    "line of zeros": (lambda j: (j / LINES).write_bytes((j / LINES).read_bytes() + bytes(99)), CUT),
    "last stage": (
        lambda j: (j / "stage-00003-00000.safetensors").unlink(),
        "resumed: stage-00003-00000.safetensors of the journal was missing or damaged, and made again",
    ),
    "earlier stage": (lambda j: (j / STAGE).unlink(), f"resumed: {STAGE} of the journal was missing or damaged"),
    "first stage": (lambda j: (j / STAGE.replace("2", "1")).unlink(), "resumed: stage-00001"),
    "stage damaged": (lambda j: corrupt(j / STAGE), f"resumed: {STAGE} of the journal was missing or damaged"),
    "stage empty": (lambda j: (j / STAGE).write_bytes(b""), f"resumed: {STAGE} of the journal was missing or damaged"),
    "snapshot": (lambda j: (j / SNAPSHOT).unlink(), None),
    "snapshot damaged": (lambda j: corrupt(j / SNAPSHOT), None),
    "files that no line names": (lambda j: (j / "stage-00007-00000.safetensors").write_bytes(b"half"), None),
    "what is left of a lock": (lambda j: (j / "lock").write_text('{"pid": 1, "host": "x"}'), None),
}


@pytest.mark.parametrize("what", LOST)
def test_what_was_lost_is_made_again(what: str, journal: Path, finished: tuple[Path, dict[str, Tensor]]) -> None:
    lose, said = LOST[what]
    lose(journal)
    weights, notes = run(journal)
    assert [n for n in notes if n.startswith("resumed")] == [n for n in notes if said is not None and said in n]
    assert (said is None) == (not any("resumed" in n for n in notes))
    assert weights.keys() == finished[1].keys()
    assert all(torch.equal(t, finished[1][n]) for n, t in weights.items())
    again, notes = run(journal)  # the journal is whole again
    assert not any("resumed" in n for n in notes)
    assert all(torch.equal(t, finished[1][n]) for n, t in again.items())


def test_a_line_in_the_middle_that_is_damaged(journal: Path) -> None:
    text = (journal / LINES).read_text()
    count = len(text.splitlines())
    for damage in (text.replace('"rows": ', '"rows": 1', 1), text.replace("\n{", "\nnot JSON {", 1)):
        (journal / LINES).write_text(damage)
        with pytest.raises(CheckpointError, match=rf"is damaged: line \d of {count} is not what was written. Remove"):
            run(journal)


def link_file(journal: Path) -> None:
    (journal / STAGE).rename(journal.parent / "elsewhere")
    (journal / STAGE).symlink_to(journal.parent / "elsewhere")


def link_lines(journal: Path) -> None:
    (journal / LINES).rename(journal.parent / "elsewhere")
    (journal / LINES).symlink_to(journal.parent / "elsewhere")


def link_lock(journal: Path) -> None:
    (journal.parent / "mine").write_text("text")
    (journal / "lock").unlink(missing_ok=True)
    (journal / "lock").symlink_to(journal.parent / "mine")


def pipe(journal: Path) -> None:
    (journal / STAGE).unlink()
    os.mkfifo(journal / STAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link_file, rf"{STAGE} is a link: a journal has none"),
        (link_lines, r"journal.jsonl is a link: a journal has none"),
        (link_lock, r"lock is a link: a journal has none"),
        (pipe, rf"{STAGE} is no file: a journal has nothing else"),
    ],
)
def test_links_and_pipes(change: Callable[[Path], None], message: str, journal: Path) -> None:
    change(journal)
    with pytest.raises(CheckpointError, match=message):
        run(journal)
    assert not (journal.parent / "mine").exists() or (journal.parent / "mine").read_text() == "text"


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds 'thesis.txt' and no journal: give an empty directory, or a new"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "lock"] == ["thesis.txt"]
    with pytest.raises(CheckpointError, match=r"the journal .*thesis.txt could not be written or read: .*File exists"):
        run(tmp_path / "thesis.txt")


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match=r"the journal .*here could not be written or read: .*Permission denied"):
        run(tmp_path / "here")
