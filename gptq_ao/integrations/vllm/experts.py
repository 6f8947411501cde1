"""The experts of a layer of vLLM, if they are quantized: two products by stacks, with an activation in between."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations.vllm.parts import ExpertsProduct, share
from gptq_ao.tensor import GroupTensor

__all__ = ["ExpertsMethod"]

# vLLM's names: w1 and w3 (gate and up) are one product, w2 (down) the other.
_OF_W13, _OF_W2 = ("w1", "w3"), ("w2",)


class ExpertsMethod(FusedMoEMethodBase):
    """Keeps the weights of the experts that this rank has as they arrive, and stacks them."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        if self.moe.has_bias:
            raise ConfigError(f"{layer.layer_name!r} has experts with biases, which gptq_ao does not serve in vLLM")
        arrived: dict[tuple[int, str], Tensor] = {}

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:  # else another rank has it
                dim, size = (1 if shard_id == "w2" else 0), intermediate_size_per_partition
                own = share(loaded_weight, dim, size, self.moe.tp_rank, self.moe.tp_size)
                arrived[local, shard_id] = own.to(device=param.device, dtype=params_dtype)
            return local != -1 if return_success else None

        for name in ("w13_weight", "w2_weight"):
            parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = load  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        layer.arrived = arrived
        layer.sizes = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size_per_partition": intermediate_size_per_partition,
            "params_dtype": params_dtype,
            **more,
        }

    def process_weights_after_loading(self, layer: Any) -> None:
        arrived: dict[tuple[int, str], Tensor] = layer.arrived
        first = _OF_W13 if self.moe.is_act_and_mul else _OF_W13[:1]
        expected = [(e, shard) for e in range(layer.sizes["num_experts"]) for shard in (*first, *_OF_W2)]
        missing = [key for key in expected if key not in arrived]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of the {len(expected)} weights of {layer.layer_name!r}, such as "
                f"{missing[0][1]} of expert {missing[0][0]}: they are missing, or have names that vLLM does not know"
            )
        quantized = {isinstance(weight, GroupTensor) for weight in arrived.values()}
        stacks = [self._stack(layer, names) for names in (first, _OF_W2)]
        arrived.clear()
        if quantized == {False}:
            self._leave_to_vllm(layer, stacks)
        else:
            layer.w13, layer.w2 = map(ExpertsProduct, stacks)

    def _stack(self, layer: Any, names: tuple[str, ...]) -> Tensor:
        """[E, rows, columns] of all experts, whose weights of these names are joined by their rows."""
        each = [[layer.arrived[e, name] for name in names] for e in range(layer.sizes["num_experts"])]
        if len({isinstance(weight, GroupTensor) for weights in each for weight in weights}) == 1:
            try:
                return torch.stack([torch.cat(weights) for weights in each])
            except ValueError:  # they have other bits or groups
                pass
        kinds = sorted({repr(weight) if isinstance(weight, GroupTensor) else "dense" for w in each for weight in w})
        raise ConfigError(
            f"the experts of {layer.layer_name!r} are one product in vLLM, and their {' and '.join(names)} differ: "
            f"{'; '.join(kinds[:3])}. Quantize all experts of a layer with the same settings"
        )

    def _leave_to_vllm(self, layer: Any, stacks: list[Tensor]) -> None:
        """Dense experts run as vLLM runs those of a dense checkpoint."""
        method = UnquantizedFusedMoEMethod(self.moe)
        del layer.w13_weight, layer.w2_weight
        method.create_weights(layer, **layer.sizes)
        for parameter, stack in zip((layer.w13_weight, layer.w2_weight), stacks, strict=True):
            parameter.data.copy_(stack)
        layer._replace_quant_method(method)
        method.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # what vLLM's own kernels are told

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] from x [tokens, hidden]: the sum over `topk_ids` [tokens, k], weighted by `topk_weights`."""
        tokens, k = topk_ids.shape
        count = layer.sizes["num_experts"]
        experts = topk_ids.flatten().long()
        if layer.expert_map is not None:  # global number → that on this rank, or −1, which comes behind all others
            experts = layer.expert_map[experts].long()
            experts = torch.where(experts < 0, count, experts)
        order = experts.argsort(stable=True)
        ends = torch.searchsorted(experts[order], torch.arange(count, device=x.device), right=True).to(torch.int32)
        rows = x[order // k]
        if layer.apply_router_weight_on_input:
            rows = rows * topk_weights.flatten()[order, None].to(x.dtype)
        hidden = layer.w13(rows, ends)
        active = hidden.new_empty(len(hidden), layer.sizes["intermediate_size_per_partition"])
        limits = ApplyMoEActivationConfig.from_configs(self.moe, FusedMoEQuantConfig.make())
        apply_moe_activation(layer.activation, active, hidden, activation_config=limits)
        made = torch.empty_like(rows)
        made[order] = layer.w2(active, ends)
        made = made.view(tokens, k, -1)
        if layer.apply_router_weight_on_input:
            return made.sum(1)
        return (made * topk_weights.unsqueeze(-1).to(torch.float32)).sum(1).to(x.dtype)
