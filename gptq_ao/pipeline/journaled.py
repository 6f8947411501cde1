"""The stages of a run in its journal: what has to be known to put solved weights in their places without solving them.

Which stages are done, and what came out, is here; how they are solved is not.
"""

import base64
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_ao.adapter import LowRank
from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.calibration.batches import digest
from gptq_ao.checkpoint.files.directory import weight_files
from gptq_ao.codes.bit_stream import pack_bits, unpack_bits
from gptq_ao.codes.reinterpret import reinterpret
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.journal.facts import versions
from gptq_ao.journal.journal import Journal
from gptq_ao.journal.snapshot import pack_batches, unpack_batch
from gptq_ao.model.sharded import own_class
from gptq_ao.model.weights import Weights
from gptq_ao.passes.records import Layout, Part, Plan, Segment
from gptq_ao.pipeline.solved_part import SolvedPart
from gptq_ao.pipeline.spread import gathered
from gptq_ao.planning.job import Job
from gptq_ao.planning.prepare import Prepared
from gptq_ao.report import Choice, Decision, Unit
from gptq_ao.solver.solution import Solution
from gptq_ao.tensor import GroupTensor

__all__ = [
    "JournaledStages",
    "begin",
    "decided",
    "facts_of_files",
    "facts_of_values",
    "notes_of_journal",
    "waiting_batches",
    "write_decisions",
]


def begin(job: Job, prepared: Prepared) -> None:
    """Compare this run with the one that the journal is of, or begin it.

    Raises:
        ConfigError: it is the journal of another one, or snapshots are wanted of several ranks.
    """
    if job.journal is None or prepared.found is None or job.batches is None:
        return
    if job.journal.snapshot_every and job.ranks.size > 1:
        raise ConfigError(
            "snapshot_every keeps the activations that wait in one process, and several quantize together: leave it "
            "out. What is finished runs forward again when such a run goes on"
        )
    settings = {f.name: getattr(job.config, f.name) for f in dataclasses.fields(job.config) if f.name[0] != "_"}
    shapes = [(n, str(t.dtype), tuple(t.shape)) for n, t in _named(job)]
    # Where a node calls a function that has no name, torch writes its address.
    graph = re.sub(r" at 0x[0-9a-f]+", "", str(prepared.found.program.graph))
    selection = [(name, c.recipe) for name, c in prepared.selection.settings.items()]
    source = facts_of_values(job.weights) if job.source is None else job.source
    job.journal.begin(
        {
            "versions": versions(),
            "device": job.device.type,
            "settings": settings,
            "calibration data": {"batches": len(job.batches), "sha256": digest(job.batches)},
            "model": {
                "class": own_class(job.model).__name__,
                "names, dtypes and shapes": _digest(shapes),
                "computation": _digest(graph),
                "weights that are quantized, and how": _digest(selection),
                **source,
            },
        }
    )


def facts_of_values(weights: Weights) -> dict[str, Any]:
    """What tells a model from another by all of its values."""
    return {"contents of its parameters and buffers": _contents(weights)}


def facts_of_files(directory: Path) -> dict[str, Any]:
    """What tells a model on disk from another, without reading its weights: of each shard the size, the time of its
    last change and a digest of its header; of the config and of code that comes along, the contents."""
    facts: dict[str, Any] = {}
    for name in sorted(weight_files(directory)):
        path = directory / name
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        about = path.stat()
        facts[name] = {
            "bytes": about.st_size,
            "last change (ns since 1970)": about.st_mtime_ns,
            "header": hashlib.sha256(header).hexdigest(),
        }
    for path in sorted((directory / "config.json", *directory.glob("*.py"))):
        facts[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def decided(job: Job) -> tuple[Decision, ...] | None:
    """What automatic precision has chosen, if the journal knows; the same on all ranks."""
    step = job.journal.step("precision") if job.journal is not None else None
    known: tuple[Decision, ...] | None = None
    if job.journal is not None and step is not None:
        with _damage(job.journal, "its choice of precision"):
            known = tuple(_decision(d) for d in step["decisions"])
    told = job.ranks.tell(None if known is None else [dataclasses.asdict(d) for d in known])[0]
    return None if told is None else tuple(_decision(d) for d in told)


def notes_of_journal(job: Job) -> tuple[str, ...]:
    """What was not as it should be; the same on all ranks."""
    return tuple(job.ranks.tell([] if job.journal is None else job.journal.notes)[0])


def write_decisions(job: Job, decisions: Sequence[Decision]) -> None:
    """So that the choice, which takes long, need not be made again."""
    if job.journal is not None:
        job.journal.finish("precision", decisions=[dataclasses.asdict(d) for d in decisions])


def waiting_batches(job: Job, plan: Plan) -> Iterator[dict[str, Any]] | None:
    """What waits behind the last stages that need not run, batch by batch; None: all have to."""
    skipped = JournaledStages(job, plan).skipped
    if not skipped:
        return None
    assert job.journal is not None
    return _unpacked(job.journal, skipped, set(plan.segments[skipped - 1].keeps), len(job.batches or ()))


def _unpacked(journal: Journal, number: int, keeps: set[str], count: int) -> Iterator[dict[str, Any]]:
    parts = (journal.step("snapshot", number) or {})["parts"]
    if len(parts) != count:
        raise journal.damaged(f"its snapshot is of {len(parts)} batches, not of {count}")
    before: Mapping[str, Any] = {}
    for part in parts:
        with _damage(journal, "its snapshot"):
            values = unpack_batch(part["values"], journal.part(part), before)
            if set(values) != keeps:
                raise ValueError(f"it has {sorted(values)}, and {sorted(keeps)} are needed")
        yield values
        before = values


class JournaledStages:
    """The stages of a plan as the journal of the job has them; without a journal, none. Of several ranks the first has
    the journal, and tells the others.

    Attributes:
        skipped: as many stages need not run any more, as a snapshot has what comes out.
    """

    def __init__(self, job: Job, plan: Plan) -> None:
        self._journal, self._device, self._plan, self._layouts = job.journal, job.device, plan, plan.selection.layouts
        self._ranks, self._done, self.skipped = job.ranks, frozenset[int](), 0
        # A snapshot has the activations of all batches, of which each of several ranks has a share.
        if self._journal is None or self._ranks.size > 1:
            return
        self.skipped = self._journal.last("snapshot")
        if not 0 <= self.skipped <= len(plan.stages):
            raise self._journal.damaged(f"it has a snapshot of stage {self.skipped}")
        # A stage that has to be solved again reads what comes before.
        if not all(self._journal.step("stage", n + 1) for n in range(self.skipped)):
            self.skipped = 0

    def start(self) -> None:
        """Before the first stage: random numbers are those that they were."""
        journal, size = self._journal, self._ranks.size
        steps = {n: journal.step("stage", n) for n in range(1, len(self._plan.stages) + 1)} if journal else {}
        self._done = frozenset(self._ranks.tell([n for n, step in steps.items() if step is not None])[0])
        if journal is None:
            return
        others = sorted({step.get("ranks", 1) for step in steps.values() if step is not None} - {size})
        if others:
            was = " or ".join(str(n) for n in others)
            journal.notes.append(f"resumed: some stages were solved by {was} processes, and these are {size}")
        step = journal.step("start")
        if step is None:
            journal.finish("start", random=_random_state(self._device))
        else:
            self._set_random_state(step)

    def has(self, number: int) -> bool:
        """Whether a stage is done."""
        return number in self._done

    def solved(self, number: int) -> Iterator[SolvedPart]:
        """The weights of a stage that is done, in the order in which they were solved.

        Raises:
            CheckpointError: they are not those of the plan.
        """
        yield from gathered(self._ranks, () if self._journal is None else self._read(number), self._device)

    def _read(self, number: int) -> Iterator[SolvedPart]:
        assert self._journal is not None
        step = self._journal.step("stage", number)
        assert step is not None
        stage, settings, layouts = self._plan.stages[number - 1], self._plan.selection.settings, self._layouts
        names = [part.get("name") for part in step["parts"]]
        wanted = {name for shared in stage.inputs for name in shared.weights}
        if len(names) != len(wanted) or set(names) != wanted:
            raise self._journal.damaged(f"it has the weights {names} of stage {number}, which has {sorted(wanted)}")
        for part in step["parts"]:
            with _damage(self._journal, f"weight {part['name']!r}"):
                tensors = {n: t.to(self._device) for n, t in self._journal.part(part).items()}
                whole = _solved(part, tensors, layouts[part["name"]], settings[part["name"]])
            del tensors
            yield whole

    def add(self, number: int, whole: SolvedPart, config: GPTQConfig) -> None:
        """A weight of the stage that is being solved."""
        if self._journal is None:
            return
        s, adapter = whole.solution, whole.adapter
        tensors = {"codes": pack_bits(s.codes, config.bits), "scale": s.scale, "zero_point": s.zero_point}
        tensors |= {} if s.perm is None else {"perm": s.perm.clone()}  # weights that are solved together share it
        tensors |= {} if adapter is None else {"A": adapter.A, "B": adapter.B}
        said = {"name": whole.part.weight, **{n: getattr(whole, n) for n in _SAID}}
        self._journal.add("stage", number, said, {n: t.detach().cpu().contiguous() for n, t in tensors.items()})

    def finish(self, number: int, store: ActivationStore, segment: Segment) -> None:
        """All of a stage is in its place; `store` holds what waits behind it."""
        if self._journal is None:
            return
        step = self._journal.step("stage", number)
        if step is not None:
            self._set_random_state(step)
            return
        self._journal.finish("stage", number, random=_random_state(self._device), ranks=self._ranks.size)
        every = self._journal.snapshot_every
        if every and number % every == 0 and number < len(self._plan.stages):
            for said, tensors in pack_batches(store.read(segment.keeps)):
                self._journal.add("snapshot", number, {"values": said}, tensors)
            self._journal.finish("snapshot", number)
            self._journal.keep_only("snapshot", number)

    def _set_random_state(self, step: Mapping[str, Any]) -> None:
        assert self._journal is not None
        with _damage(self._journal, "the state of random numbers"):
            cpu, *cuda = (torch.frombuffer(bytearray(base64.b64decode(s)), dtype=torch.uint8) for s in step["random"])
            torch.set_rng_state(cpu)
            for state in cuda:
                torch.cuda.set_rng_state(state, self._device)


# Of a SolvedPart, as JSON.
_SAID = ("method", "rows", "damp", "dead", "changed", "energy", "fallback", "expert_rows")


def _solved(said: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout, config: GPTQConfig) -> SolvedPart:
    """
    Raises:
        ValueError: it is not one of this layout and these settings.
    """
    spec, n, k = layout.packed(config.recipe), layout.rows, layout.in_features
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (n, -(-k * spec.bits // 8))),
        "scale": (torch.float16, (n, spec.groups)),
        "zero_point": (torch.uint8, (n, spec.groups)),
    }
    # Not even with `act_order="group"` where no data came.
    expected |= {"perm": (torch.int32, (k,))} if "perm" in tensors and spec.permuted else {}
    if "A" in tensors and config.adapter_rank:
        each = (layout.stack,) if tensors["A"].dim() == 3 else ()
        height, rank = n // layout.stack if each else n, config.adapter_rank
        expected |= {"A": (torch.float32, (*each, rank, k)), "B": (torch.float32, (*each, height, rank))}
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    if found != expected:
        raise ValueError(f"it has {found}, and needs {expected}")
    scale, zero_point, perm = tensors["scale"], tensors["zero_point"], tensors.get("perm")
    if not scale.isfinite().all() or int(zero_point.max()) >= 2**spec.bits:
        raise ValueError("a scale is not finite, or a zero point no code")
    if perm is not None and not torch.equal(perm.sort().values, torch.arange(k, dtype=perm.dtype, device=perm.device)):
        raise ValueError("its perm is not a permutation")
    values = {name: said[name] for name in _SAID}
    for name, value in values.items():
        if type(value) not in _TYPES[name]:
            raise ValueError(f"its {name} is {value!r}")
    if any(type(rows) is not int for rows in values["expert_rows"]):
        raise ValueError(f"its expert_rows are {values['expert_rows']!r}")
    values["expert_rows"] = tuple(values["expert_rows"])
    adapter = LowRank(tensors["A"], tensors["B"]) if "A" in expected else None
    codes = unpack_bits(tensors["codes"], spec.bits, k)
    return SolvedPart(Part(said["name"], 0, n), Solution(codes, scale, zero_point, perm), adapter=adapter, **values)


_NUMBER, _NOTHING = (int, float), type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "rows": (int,),
    "damp": (*_NUMBER, _NOTHING),
    "dead": (int,),
    "changed": (*_NUMBER, _NOTHING),
    "energy": (*_NUMBER, _NOTHING),
    "fallback": (str, _NOTHING),
    "expert_rows": (list,),
}


def _decision(said: Mapping[str, Any]) -> Decision:
    choices = tuple(Choice(**choice) for choice in said["unit"]["choices"])
    return Decision(Unit(tuple(said["unit"]["names"]), choices), Choice(**said["chosen"]), said["weights"])


@contextlib.contextmanager
def _damage(journal: Journal, what: str) -> Iterator[None]:
    """What does not fit is not of this run."""
    try:
        yield
    except CheckpointError:  # a file that cannot be read
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise journal.damaged(f"{what}: {type(e).__name__}: {e}") from e


def _random_state(device: torch.device) -> list[str]:
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _named(job: Job) -> Iterator[tuple[str, Tensor]]:
    yield from job.model.named_parameters()
    yield from job.model.named_buffers()


def _contents(weights: Weights) -> str:
    """SHA-256 of all values."""
    found = hashlib.sha256()
    model = weights.model
    for name in (*dict(model.named_parameters()), *dict(model.named_buffers())):
        value = weights.get(name)
        found.update(name.encode())
        for part in value.parts().values() if isinstance(value, GroupTensor) else (value,):
            found.update(reinterpret(part.detach().cpu().contiguous().flatten(), torch.uint8).numpy().data)
    return found.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()
