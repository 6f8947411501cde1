"""A linear layer or output head of vLLM whose weight is quantized, or partly so: q, k and v are one layer there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gptq_ao.errors import CheckpointError
from gptq_ao.integrations.vllm.parts import Product, joined, narrowed, share
from gptq_ao.tensor import GroupTensor

__all__ = ["LinearMethod"]

_NUMBERS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of an attention layer


class LinearMethod(LinearMethodBase):
    """Keeps the parts of the weight as they arrive, and makes as few products of them as can be."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        # Without elements: what it will be is not known before the parts are there.
        weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        arrived: dict[int, Tensor] = {}

        def load(parameter: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
            for number, part in _parts(layer, loaded, shard_id, len(output_partition_sizes)):
                size = output_partition_sizes[number]
                own = _of_rank(layer, part, size, input_size_per_partition)
                arrived[number] = own.to(device=parameter.device, dtype=params_dtype)

        weight.weight_loader = load  # type: ignore[attr-defined]
        layer.register_parameter("weight", weight)
        layer.arrived, layer.expected = arrived, len(output_partition_sizes)

    def process_weights_after_loading(self, layer: Any) -> None:
        arrived: dict[int, Tensor] = layer.arrived
        parts = [arrived[number] for number in sorted(arrived)]
        tied = not parts and layer.weight.numel() > 0  # to the embedding
        if not tied and len(parts) != layer.expected:
            raise CheckpointError(
                f"the checkpoint has {len(parts)} of the {layer.expected} weights of {layer.prefix!r}: they are "
                "missing, or have names that vLLM does not know"
            )
        if tied or not any(isinstance(part, GroupTensor) for part in parts):
            # One of vLLM's own layers, with what it makes of a dense weight.
            if not tied:
                layer.weight = nn.Parameter(torch.cat(parts), requires_grad=False)
            layer.quant_method = (
                UnquantizedLinearMethod() if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod()
            )
            layer.quant_method.process_weights_after_loading(layer)
        else:
            layer.products = nn.ModuleList(Product(weight) for weight in joined(parts))
        arrived.clear()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        made = [product(x) for product in layer.products]
        y = made[0] if len(made) == 1 else torch.cat(made, -1)
        return y if bias is None else y + bias


def _parts(layer: Any, loaded: Tensor, shard_id: Any, count: int) -> list[tuple[int, Tensor]]:
    """Number and weight of the parts that arrive: one, or, of a checkpoint that has them as one, several."""
    if isinstance(shard_id, int | str):
        return [(_NUMBERS[shard_id] if isinstance(shard_id, str) else shard_id, loaded)]
    numbers = range(count) if shard_id is None else shard_id
    if len(numbers) == 1:
        return [(numbers[0], loaded)]
    if hasattr(layer, "total_num_kv_heads"):  # its `output_sizes` count heads that several ranks have more than once
        keys, values = (layer.total_num_kv_heads * size for size in (layer.head_size, layer.v_head_size))
        sizes = [layer.total_num_heads * layer.head_size, keys, values]
    else:
        sizes = [layer.output_sizes[number] for number in numbers]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(n, narrowed(loaded, 0, start, size)) for n, start, size in zip(numbers, starts, sizes, strict=True)]


def _of_rank(layer: Any, weight: Tensor, rows: int, columns: int) -> Tensor:
    """What this rank has of a part, [rows, columns]."""
    if hasattr(layer, "shard_indices"):  # tokens; an engine has more than the file, so that ranks have equally many
        indices = layer.shard_indices
        own = narrowed(weight, 0, indices.org_vocab_start_index, indices.num_org_elements)
        more = rows - len(own)
        if more == 0:
            return own
        return (
            torch.cat([own, own.new_zeros(more, columns)])
            if isinstance(own, GroupTensor)
            else F.pad(own, (0, 0, 0, more))
        )
    if len(weight) % rows or weight.shape[1] % columns:
        raise CheckpointError(
            f"{layer.prefix!r} has a weight [{rows}, {columns}] on a rank, which is no part of the checkpoint's "
            f"{list(weight.shape)}"
        )
    own = share(weight, 0, rows, layer.tp_rank, layer.tp_size)
    return share(own, 1, columns, layer.tp_rank, layer.tp_size)
