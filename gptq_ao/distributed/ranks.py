"""The processes that quantize one model together: what they say to one another, and what they add up.

Nobody waits for a rank that has given up: every exchange begins with a word of each rank, which is what it has to say
or the error that it stopped with. A rank that fails says so where the others will listen next (`together`), and they
raise its error. So all ranks have to come to the same exchanges in the same order; between two of them each may fail.
"""

import json
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_ao import errors
from gptq_ao.errors import ConfigError, GPTQError, RankError

__all__ = ["ALONE", "Ranks", "is_told"]

T = TypeVar("T")

WORD = 4096  # bytes of a word that go with the first message; the rest, if any, with a second
BUCKET = 2**20  # bytes; smaller tensors are added up together
ALIGNED = 16  # bytes, for every dtype
LOST = (
    "The ranks quantize together, and one of them has ended or does not answer: see what it printed. How long the "
    "others wait for it is the `timeout` of torch.distributed.init_process_group"
)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a group. One alone does nothing of what follows, and all it says is its own.

    Attributes:
        group: None for a process alone, or for a plan of what several would do.
        device: where words are.
        kinds: types of devices whose tensors the group takes; others are copied to `device`.
        here: how many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kinds: frozenset[str] = frozenset()
    here: int = 1

    @classmethod
    def of(cls, distributed: bool, group: "dist.ProcessGroup | None", device: torch.device | None) -> "Ranks":
        """Those of `group`, or with `distributed` of all there are.

        Args:
            device: of this rank, which matters if the group takes no tensors of the CPU; None: the current one.

        Raises:
            ConfigError: there is no process group, or this process is not in it.
        """
        if group is None and not distributed:
            return ALONE
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "distributed=True is for a program in which torch.distributed is initialized, and it is not: start it "
                "with torchrun, and call torch.distributed.init_process_group() first"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ConfigError("this process is not in process_group: call it on the ranks of the group only")
        if size == 1:
            return ALONE
        kinds = frozenset(part.split(":")[0] for part in str(dist.get_backend_config(group)).split(","))
        if "cpu" in kinds:
            device = torch.device("cpu")
        elif device is None or device.type not in kinds:
            device = torch.device("cuda", torch.cuda.current_device())
        ranks = cls(rank, size, group or dist.group.WORLD, device, kinds)
        machines = ranks.tell(socket.gethostname())
        return replace(ranks, here=machines.count(machines[rank]))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, and that speaks to the user."""
        return self.rank == 0

    @property
    def members(self) -> list[int]:
        """The numbers that torch.distributed has for them, in their order."""
        if self.group is not None:
            return dist.get_process_group_ranks(self.group)
        return [dist.get_rank() if dist.is_available() and dist.is_initialized() else 0]

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This rank's, of things that all have: every `size`-th. There may be none."""
        return things[self.rank :: self.size]

    def number(self, index: int) -> int:
        """Which of all things number `index` of this rank's share is."""
        return index * self.size + self.rank

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, an error of one rank is an error of all.

        Raises:
            GPTQError: of the same class as the other rank's, if that is one of ours; its message names the rank.
            RankError: for any other error there.
        """
        if self.size == 1:
            yield
            return
        handled = sys.exc_info()[1]  # an error that is being handled here is told already, and is another one
        try:
            yield
        except Exception as e:
            if not is_told(e, handled):
                notes = "".join(f"\n{note}" for note in getattr(e, "__notes__", ()))
                with suppress(Exception):  # of the connection: what went wrong here says more
                    self._exchange({"error": [type(e).__name__, f"{e}{notes}"]})
                _mark(e)
            raise
        self._exchange({})

    def tell(self, value: Any = None) -> list[Any]:
        """What each rank says, in their order: something that JSON has."""
        return [value] if self.size == 1 else [word.get("value") for word in self._exchange({"value": value})]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Make each the sum over all ranks, in place; all have the same shapes and dtypes there."""
        tensors = list(tensors)
        if self.size == 1:
            return
        self.tell()
        small: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            if t.nbytes < BUCKET:
                small.setdefault(t.dtype, []).append(t)
        buckets = [torch.cat([self._sent(t).flatten() for t in alike]) for alike in small.values()]
        large = [t for t in tensors if t.nbytes >= BUCKET]
        sent = [self._sent(t) for t in large]
        with _known_if_lost():
            under_way = [dist.all_reduce(t, group=self.group, async_op=True) for t in (*sent, *buckets)]
            for work in under_way:
                work.wait()
        for t, total in zip(large, sent, strict=True):
            if total is not t:
                t.copy_(total)
        for alike, bucket in zip(small.values(), buckets, strict=True):
            for t, total in zip(alike, bucket.split([t.numel() for t in alike]), strict=True):
                t.copy_(total.view(t.shape))

    def broadcast(
        self, src: int, value: Any, tensors: Sequence[Tensor], device: torch.device
    ) -> tuple[Any, list[Tensor]]:
        """What rank `src` gives, the tensors on `device`; what the others give does not matter."""
        if self.size == 1:
            return value, list(tensors)
        mine = self.rank == src
        value, forms = self.tell([value, [_form(t) for t in tensors]] if mine else None)[src]
        place = device if device.type in self.kinds else self.device
        if mine:
            sent = [self._sent(t) for t in tensors]
        else:
            sent = [torch.empty(shape, dtype=_dtype(name), device=place) for shape, name in forms]
        with _known_if_lost():
            for t in sent:
                dist.broadcast(t, group=self.group, group_src=src)
        return value, list(tensors) if mine else [t.to(device) for t in sent]

    def gather(self, value: Any, tensors: Sequence[Tensor], device: torch.device) -> list[tuple[Any, list[Tensor]]]:
        """What each rank gives, in their order, the tensors on `device`: any number of them, of any shapes."""
        if self.size == 1:
            return [(value, list(tensors))]
        said = self.tell([value, [_form(t) for t in tensors]])
        longest = max(sum(map(_space, forms)) for _, forms in said)
        if not longest:
            return [(value, []) for value, _ in said]
        flat = torch.zeros(longest, dtype=torch.uint8, device=device)
        for t, place in zip(tensors, _places(flat, said[self.rank][1]), strict=True):
            place.copy_(t)
        everything = self._all_gather(flat).to(device)
        return [(value, list(_places(row, forms))) for row, (value, forms) in zip(everything, said, strict=True)]

    def _exchange(self, word: Mapping[str, Any]) -> list[dict[str, Any]]:
        words = [json.loads(text) for text in self._texts(json.dumps(word).encode())]
        for rank, each in enumerate(words):
            if "error" in each and "error" not in word:
                raise _mark(_error_of(rank, *each["error"]))
        return words

    def _texts(self, text: bytes) -> list[bytes]:
        head = len(text).to_bytes(8, "little") + text[: WORD - 8]
        heads = [row.numpy().tobytes() for row in self._all_gather(_as_tensor(head, WORD)).cpu()]
        lengths = [int.from_bytes(each[:8], "little") for each in heads]
        longest = max(lengths) - (WORD - 8)
        tails = [b""] * self.size
        if longest > 0:
            rest = self._all_gather(_as_tensor(text[WORD - 8 :], longest)).cpu()
            tails = [row.numpy().tobytes() for row in rest]
        return [(h[8:] + t)[:n] for h, t, n in zip(heads, tails, lengths, strict=True)]

    def _all_gather(self, t: Tensor) -> Tensor:
        """[size, n] of each rank's [n]."""
        t = self._sent(t)
        out = torch.empty(self.size * len(t), dtype=t.dtype, device=t.device)
        with _known_if_lost():
            # Its new name, and the one it has in older versions of torch.
            gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(out, t, group=self.group)
        return out.view(self.size, len(t))

    def _sent(self, t: Tensor) -> Tensor:
        """As the group takes it; `t` itself if it does."""
        return (t if t.device.type in self.kinds else t.to(self.device)).contiguous()


ALONE = Ranks()


def is_told(error: BaseException | None, before: BaseException | None = None) -> bool:
    """Whether all ranks know of an error, or of one that led to it (since `before`), or cannot be told."""
    while error is not None and error is not before:
        if getattr(error, "told_to_ranks", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def _mark(error: Exception) -> Exception:
    error.told_to_ranks = True  # type: ignore[attr-defined]
    return error


def _error_of(rank: int, name: str, text: str) -> GPTQError:
    kind = getattr(errors, name, None)
    known = kind if isinstance(kind, type) and issubclass(kind, GPTQError) else RankError
    return known(f"rank {rank}: {name}: {text}")


@contextmanager
def _known_if_lost() -> Iterator[None]:
    """Torch's own errors, of a connection that has gone, with a word on what that means here."""
    try:
        yield
    except RuntimeError as e:
        e.add_note(LOST)
        raise _mark(e)  # noqa: B904 - it is the same


def _as_tensor(content: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)


def _form(t: Tensor) -> list[Any]:
    return [list(t.shape), str(t.dtype).removeprefix("torch.")]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _space(form: list[Any]) -> int:
    """Bytes that a tensor takes among others."""
    shape, name = form
    return -(-torch.Size(shape).numel() * _dtype(name).itemsize // ALIGNED) * ALIGNED


def _places(flat: Tensor, forms: Iterable[list[Any]]) -> Iterator[Tensor]:
    """Views of bytes, as the tensors that lie there one after the other."""
    start = 0
    for shape, name in forms:
        size = torch.Size(shape).numel() * _dtype(name).itemsize
        yield flat[start : start + size].view(_dtype(name)).view(shape)
        start += _space([shape, name])
