"""What a format is: its names, what reads it, what writes it.

Each has a folder beside this one, whose `format.py` fills in the record; `checkpoint/formats.py` lists them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, export_model
from gptq_ao.checkpoint.exchange.packed_weight import Rounding
from gptq_ao.checkpoint.exchange.stacks import Stacks
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.tensor import GroupTensor

__all__ = ["Format", "QuantizedWeight", "Readable"]


class Readable(Protocol):
    """A tensor in files: a dense one (`StoredTensor`) or a quantized weight."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor, of this shape and dtype, on `device`."""
        ...


class QuantizedWeight(Readable, Protocol):
    """A quantized weight in files, under the name and shape of the dense one."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...


@dataclass(frozen=True)
class Format:
    """One way to write quantized weights into a Hugging Face directory.

    Attributes:
        name: as `save_quantized` calls it.
        quant_method: as config.json calls it, and transformers. Several formats may share one, and then a reader.
        parts: last parts of the names of a weight's tensors.
        read: from the quantization_config and the tensors of a directory to its quantized weights. It raises
            CheckpointError where the two contradict each other, and reads nothing but shapes and what it needs to know
            them.
        config: the quantization_config of a model. It raises CheckpointError where the format cannot hold a weight.
        encode: from a weight, and the model's dtype, to its tensors by their last parts.
        scale: the one part that transformers reads; the weight itself comes from `read`.
        others: pattern of the names of the other parts, as transformers has them.
        needs: packages without which transformers' own loader only raises an error; none, if it has no loader.
        config_file: a second file with the quantization_config, for older readers.
        hub_names: whether tensors are named `module.part`, in the modules that a hub checkpoint has; else
            `parameter.part`, in those of the model.
        check_dense: raises CheckpointError where the tensors that are no part of a weight, by name, say that there is
            more than quantized weights; None: they never do.
        stacks: which tensors of a hub checkpoint are one in the files; None: none are.
        settings: from a model's config to further keys of config.json, for readers that know others.
        notes: from a model's config to what readers may compute otherwise, a sentence each.
        moved: how far `encode` moves a weight by rounding, in steps (the distance of two codes); None: never.
    """

    name: str
    quant_method: str
    parts: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, StoredTensor], Rounding], Iterator[QuantizedWeight]]
    config: Callable[[ExportedModel], dict[str, Any]]
    encode: Callable[[GroupTensor, torch.dtype], dict[str, Tensor]]
    scale: str
    others: str
    needs: tuple[str, ...] = ()
    config_file: str | None = None
    hub_names: bool = True
    check_dense: Callable[[Mapping[str, StoredTensor]], None] | None = None
    stacks: Stacks | None = None
    settings: Callable[[Any], dict[str, Any]] = lambda config: {}
    notes: Callable[[Any], tuple[str, ...]] = lambda config: ()
    moved: Callable[[GroupTensor], float] | None = None

    def export(self, model: nn.Module, state: Mapping[str, Tensor]) -> ExportedModel:
        """Name a model's tensors as the format does.

        Args:
            state: parameter or buffer → its value; of tied ones the first name.

        Raises:
            CheckpointError: the format has no name for a quantized weight of this kind.
        """
        return export_model(model, state) if self.hub_names else ExportedModel(state, ())

    def tensors(self, exported: ExportedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Name and value of everything in the files, made one weight at a time.

        Args:
            dtype: that of the model.

        Raises:
            CheckpointError: tensors do not make a stack.
        """
        tensors = self._tensors(exported, dtype)
        modules = (name.rpartition(".")[0] for name in exported.tensors)
        return tensors if self.stacks is None else self.stacks.joined(modules, tensors)

    def _tensors(self, exported: ExportedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in exported.tensors.items():
            if isinstance(tensor, GroupTensor):
                prefix = name.removesuffix(".weight") if self.hub_names else name
                yield from ((f"{prefix}.{part}", t) for part, t in self.encode(tensor, dtype).items())
            else:
                yield name, tensor
