"""The options of DistributedDataParallel and FSDP2, and what a training loop does with their models by hand: two
processes train as one does, or all are refused alike."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.errors import TrainingWarning
from gptq_ao.tensor import GroupTensor
from tests.models import seeded, tiny_llama, token_batches
from tests.ranks import on_ranks, outcomes, some
from tests.tensor.test_distributed_checkpoint import logits, mesh
from tests.tensor.test_fsdp import ids, local, quantized, same, shard, train, with_lora

DDP = nn.parallel.DistributedDataParallel


def replicated(model: Any) -> Any:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model)


def compiled_within(model: Any) -> Any:
    model.base_model.model.model.layers[0].compile(backend="aot_eager")
    return DDP(model)


def accumulated(model: Any) -> Any:
    wrapped = DDP(model)
    with wrapped.no_sync():
        wrapped(input_ids=ids(), labels=ids()).loss.backward()
    wrapped.zero_grad()
    return wrapped


def prefetched(model: Any) -> Any:
    layers = list(shard(model).base_model.model.model.layers)
    model.set_modules_to_forward_prefetch(layers)
    model.set_modules_to_backward_prefetch(layers)
    return model


def by_hand(model: Any) -> Any:
    layer = shard(model).base_model.model.model.layers[0]
    weight = local(layer.mlp.up_proj.base_layer.weight)
    for in_background in (False, True):
        handle = layer.unshard(async_op=in_background)
        if handle is not None:
            handle.wait()
        whole = layer.mlp.up_proj.base_layer.weight
        assert isinstance(whole, GroupTensor)
        assert whole.shape == (256, 128)
        layer.reshard()
        assert same(local(layer.mlp.up_proj.base_layer.weight), weight)
    return model


def placed(model: Any) -> Any:
    """Only weights that are not quantized are cut by columns."""
    from torch.distributed.tensor import Shard

    names = {p: n for n, p in model.named_parameters()}
    return shard(model, shard_placement_fn=lambda p: Shard(1) if "lora_A" in names[p] else None)


def reloaded(model: Any) -> Any:
    """By names, in place and by assignment, from another model."""
    other = shard(with_lora(quantized(act_order="group", seed=1)))
    other(input_ids=ids(), labels=ids())
    state = shard(model).state_dict()
    other.load_state_dict(state)
    other.load_state_dict(state, assign=True)
    return other


WAYS: dict[str, Callable[[Any], Any]] = {
    "static_graph": lambda m: DDP(m, static_graph=True),
    "find_unused_parameters": lambda m: DDP(m, find_unused_parameters=True),
    "gradient_as_bucket_view": lambda m: DDP(m, gradient_as_bucket_view=True),
    "no buffers": lambda m: DDP(m, broadcast_buffers=False),
    "compiled": lambda m: torch.compile(DDP(m), backend="aot_eager"),
    "compiled within": compiled_within,
    "no_sync": accumulated,
    "replicate": replicated,
    "replicas": lambda m: shard(m, mesh=mesh(2, 1)),
    "world": lambda m: shard(m, reshard_after_forward=2),
    "prefetch": prefetched,
    "unshard": by_hand,
    "placement": placed,
    "load_state_dict": reloaded,
}


def trains(way: str) -> None:
    model = with_lora(quantized(act_order="group"))
    expected = train(copy.deepcopy(model))
    assert train(WAYS[way](model)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("way", some(WAYS))
def test_trains(way: str) -> None:
    on_ranks(trains, way)


def by_columns(stacked: bool) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    layer = seeded(nn.Linear(128, 64, bias=False))
    quantize_(layer, gptq_config(4, 32, method="rtn"))
    if stacked:
        layer.weight = nn.Parameter(torch.stack([layer.weight.detach()] * 2), requires_grad=False)
    fully_shard(layer, shard_placement_fn=lambda p: Shard(1))


@pytest.mark.parametrize("stacked", [False, True])
def test_fsdp_cuts_along_the_first_dimension(stacked: bool) -> None:
    """What another dimension would give was dense, or gathered in a wrong order."""
    for found in outcomes(by_columns, stacked, seconds=20):
        assert found.error is not None
        assert "FSDP2 gathers packed codes along the first dimension" in found.error
        assert "shard_placement_fn has to return None or Shard(0)" in found.error


def some_ranks(dense: bool) -> None:
    model = tiny_llama(width=128, layers=1) if dense else quantized()
    logits(shard(model, reshard_after_forward=2))


@pytest.mark.long
def test_fsdp_keeps_nothing_on_some_ranks() -> None:
    """Torch cuts one gathered tensor again, and here are several: its own error, on every rank."""
    on_ranks(some_ranks, True, ranks=4)
    for found in outcomes(some_ranks, False, ranks=4, seconds=20):
        assert found.error is not None
        assert "Expected 1 all_gather_output" in found.error


def cast(dense: bool, before: bool) -> None:
    model = shard(with_lora(tiny_llama(width=128, layers=1) if dense else quantized()))
    if not before:
        train(model)
    train(model.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert dense or sum(isinstance(local(p), GroupTensor) for p in model.parameters()) == 7


@pytest.mark.long
def test_cast_after_sharding() -> None:
    """Later, in the middle of training, torch refuses dense ones too."""
    on_ranks(cast, False, True)
    for found in (*outcomes(cast, False, False, seconds=20), *outcomes(cast, True, False, seconds=20)):
        assert found.error is not None
        assert "Expected out tensor to have dtype" in found.error


def copied(dense: bool) -> None:
    copy.deepcopy(shard(tiny_llama(width=128, layers=1) if dense else quantized()))


@pytest.mark.long
def test_torch_copies_no_sharded_model() -> None:
    for found in (*outcomes(copied, False), *outcomes(copied, True)):
        assert found.error is not None
        assert "FSDP does not support deepcopy" in found.error


def of_ddp(full: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    first, second = DDP(with_lora(quantized())), DDP(with_lora(quantized(seed=1)))
    state = get_model_state_dict(first, options=StateDictOptions(full_state_dict=full))
    assert sum(isinstance(t, GroupTensor) for t in state.values()) == 7
    set_model_state_dict(second, state)
    assert torch.equal(logits(first).contiguous(), logits(second).contiguous())


@pytest.mark.long
@pytest.mark.parametrize("full", [False, True])
def test_state_dict_of_a_wrapped_model(full: bool) -> None:
    on_ranks(of_ddp, full)


def in_background(folder: Path) -> None:
    first, second = shard(quantized(act_order="group")), shard(quantized(act_order="group", seed=1))
    expected = logits(first)
    state = {"model": first.state_dict()}
    saving: Any = dcp.async_save(state, checkpoint_id=folder)
    saving.result()
    state = {"model": second.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    second.load_state_dict(state["model"])
    assert torch.equal(logits(second), expected)


@pytest.mark.long
def test_saved_in_the_background(tmp_path: Path) -> None:
    on_ranks(in_background, tmp_path)


def from_a_file(folder: Path) -> None:
    from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

    first, second = quantized(), shard(quantized(seed=1))
    if dist.get_rank() == 0:
        torch.save(first.state_dict(), folder / "model.pt")
        torch_save_to_dcp(folder / "model.pt", folder / "checkpoint")
    dist.barrier()
    state = second.state_dict()
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    second.load_state_dict(state)
    assert torch.equal(logits(second), logits(first))


@pytest.mark.long
def test_from_a_file_of_torch(tmp_path: Path) -> None:
    on_ranks(from_a_file, tmp_path)


def to_a_file(folder: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = quantized()
    expected = {n: t.dequantize() for n, t in model.state_dict().items() if isinstance(t, GroupTensor)}
    dcp.save(shard(model).state_dict(), checkpoint_id=folder / "checkpoint")
    if dist.get_rank() == 0:
        with pytest.warns(TrainingWarning, match="the values are right, and no longer quantized"):
            dcp_to_torch_save(folder / "checkpoint", folder / "model.pt")
        state = torch.load(folder / "model.pt", weights_only=True)
        assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    dist.barrier()


def test_a_dense_file_of_torch_is_said_to_be_one(tmp_path: Path) -> None:
    on_ranks(to_a_file, tmp_path)


def of_a_part() -> None:
    """Operators on a weight of which each rank has a part."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight: Any = quantized(act_order="none").model.layers[0].mlp.up_proj.weight.detach()
    part: Any = distribute_tensor(weight, mesh(2), [Shard(0)])
    for made in (part.clone(), part.detach(), part.contiguous(), part.cpu(), part.float(), copy.deepcopy(part)):
        assert same(made.full_tensor(), weight)
    for placement in (Replicate(), Shard(1), Shard(0)):
        assert same(part.redistribute(placements=[placement]).full_tensor(), weight)
    empty: Any = torch.empty_like(part)
    assert same(empty.copy_(part).full_tensor(), weight)
    assert part.to(torch.bfloat16).to_local().dtype == torch.bfloat16
    assert isinstance(part.to("meta").to_local(), GroupTensor)
    assert isinstance(part.t().to_local(), GroupTensor)
    assert isinstance(part.to(torch.bfloat16).to_local(), GroupTensor)
    assert torch.equal(part, part)
    assert (part == part).full_tensor().all()
    assert torch.equal((part * 2).full_tensor(), weight.dequantize() * 2)
    torch.testing.assert_close(part.norm().full_tensor(), weight.dequantize().norm())
    assert "Int4GroupTensor(shape=(128, 128)" in repr(part)
    x: Any = distribute_tensor(torch.ones(3, 128), mesh(2), [Replicate()])
    torch.testing.assert_close((x @ part.t()).full_tensor(), torch.ones(3, 128) @ weight.t())
    with pytest.raises(NotImplementedError, match=r"cannot change .* in place"):
        part.add_(1)


def test_operators_on_a_part() -> None:
    on_ranks(of_a_part)


def mixture(implementation: str, experts: bool, kind: str) -> Any:
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 32}
    if kind == "Mixtral":
        sizes |= {"num_local_experts": 4}
    else:
        sizes |= {"num_experts": 4, "moe_intermediate_size": 128}
    model = seeded(getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)))
    quantize_(model, gptq_config(4, 32, effort="fast", act_order="none", calibration=token_batches(2)))
    model.set_experts_implementation(implementation)
    torch.manual_seed(0)
    more: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if experts else {}
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more))


def mixture_trains(implementation: str, experts: bool, kind: str) -> None:
    model = mixture(implementation, experts, kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    assert sum(p.dim() == 3 for p in before.values()) == 2
    expected = train(copy.deepcopy(model))
    shard(model)
    parts = [local(p) for p in model.parameters() if isinstance(local(p), GroupTensor)]
    assert sum(p.nbytes for p in parts) * 2 == sum(p.nbytes for p in before.values())
    assert train(model) == pytest.approx(expected, abs=1e-4)
    for name, parameter in model.named_parameters():
        assert name not in before or same(parameter.full_tensor(), before[name])


@pytest.mark.parametrize("implementation", some(["eager", "batched_mm", "grouped_mm"]))
@pytest.mark.parametrize("experts", some([False, True]), ids=["attention", "experts"])
@pytest.mark.parametrize("kind", some(["Mixtral", "Qwen3Moe"]))
def test_a_mixture_of_experts_trains(implementation: str, experts: bool, kind: str) -> None:
    """A rank has whole experts of a stack, which FSDP2 holds on to as one dimension, too."""
    on_ranks(mixture_trains, implementation, experts, kind)
