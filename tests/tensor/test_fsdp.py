"""FSDP2 (`fully_shard`), FSDP1 and DistributedDataParallel with quantized weights: two processes train as one does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.tensor import GroupTensor
from tests.models import seeded, tiny_llama, token_batches
from tests.ranks import device, on_ranks, outcomes, some


def quantized(**settings: Any) -> Any:
    """A Llama whose weights can be cut in two in both directions."""
    model = tiny_llama(width=128, layers=1, dtype=settings.pop("dtype", torch.float32), seed=settings.pop("seed", 0))
    settings = {"bits": 4, "group_size": 32, "effort": "fast", "calibration": token_batches(2), **settings}
    quantize_(model, gptq_config(**settings))
    return model.to(device())


def ids() -> Tensor:
    return token_batches(1)[0]["input_ids"].to(device())


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


def shard(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    layers = next(m.layers for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def local(parameter: Any) -> Tensor:
    part: Tensor = getattr(parameter, "_local_tensor", parameter)
    return part


def fsdp_trains(settings: dict[str, Any], option: str) -> None:
    """The losses of one process, on half of the memory each; and the same codes afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    ways: dict[str, dict[str, Any]] = {
        "default": {},
        "stays gathered": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "hybrid": {"mesh": init_device_mesh(device(), (1, 2), mesh_dim_names=("replicate", "shard"))},
        "compiled and checkpointed": {},
    }
    model = with_lora(quantized(**settings))
    expected = train(copy.deepcopy(model))
    before = {n: copy.deepcopy(p) for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    assert len(before) == 7
    if option == "compiled and checkpointed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        layers = model.base_model.model.model.layers
        layers[0] = checkpoint_wrapper(layers[0])
        layers[0].compile(backend="aot_eager")
        model.enable_input_require_grads()
    shard(model, **ways[option])
    cut = [local(p) for p in model.parameters() if isinstance(local(p), GroupTensor)]
    orders = sum(p.perm.nbytes for p in before.values() if p.perm is not None)
    assert sum(p.nbytes for p in cut) == (sum(p.nbytes for p in before.values()) + orders) / 2
    coarse = settings.get("dtype") == torch.bfloat16 or option == "mixed precision"
    assert train(model) == pytest.approx(expected, abs=3e-2 if coarse else 1e-4)
    for name, parameter in model.named_parameters():
        if (name := name.replace("_checkpoint_wrapped_module.", "")) in before:
            assert same(parameter.full_tensor(), before[name])


def same(a: Any, b: Any) -> bool:
    """The same codes and scales, wherever they are."""
    return a.spec == b.spec and all(torch.equal(t.cpu(), b.parts()[n].cpu()) for n, t in a.parts().items())


@pytest.mark.parametrize(
    ("settings", "option"),
    some(
        [
            ({}, "default"),
            ({"bits": 2}, "mixed precision"),
            ({"bits": 3}, "stays gathered"),
            ({"bits": 8}, "hybrid"),
            ({"act_order": "group"}, "offloaded"),
            ({"act_order": "group", "bits": 3}, "default"),
            ({"dtype": torch.bfloat16}, "default"),
            ({"group_size": -1}, "compiled and checkpointed"),
        ]
    ),
    ids=str,
)
def test_fsdp_trains(settings: dict[str, Any], option: str) -> None:
    on_ranks(fsdp_trains, settings, option)


def alone(offloaded: bool) -> None:
    """One rank, of which FSDP gathers nothing."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = with_lora(quantized(act_order="group"))
    expected = train(copy.deepcopy(model))
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offloaded else {}
    assert train(shard(model, **options)) == pytest.approx(expected, abs=1e-5)
    other = quantized(act_order="group", seed=1).state_dict()
    for name, parameter in model.named_parameters():
        if isinstance(part := local(parameter), GroupTensor):
            part.copy_(other[name.removeprefix("base_model.model.").replace("base_layer.", "")])
    losses = train(model)
    assert losses[0] != pytest.approx(expected[0], abs=1e-3)
    whole = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.full_tensor()
    assert same(whole, other["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.long
@pytest.mark.parametrize("offloaded", [False, True])
def test_one_rank(offloaded: bool) -> None:
    on_ranks(alone, offloaded, ranks=1)


def fsdp_of_others() -> None:
    """A convolution, a bias, and layers with weights that are whole on each rank."""
    from torch.distributed.fsdp import fully_shard

    from gptq_ao.training import unshardable

    x = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0))
    model = seeded(nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64 * 49, 40), nn.Linear(40, 8)))
    quantize_(model, gptq_config(4, 16, method="rtn", rules={"3": None}))
    expected = model(x)
    whole = unshardable(model, 2)
    assert {n for n, p in model.named_parameters() if p in whole} == {"2.weight"}
    fully_shard(model, ignored_params=whole)
    assert local(model[0].weight).shape == (32, 16, 3, 3)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model[3].weight.grad is not None


def test_fsdp_of_other_layers() -> None:
    on_ranks(fsdp_of_others)


def fsdp_uneven(rows: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(64, rows, bias=False))
    quantize_(model, gptq_config(4, 32, method="rtn"))
    fully_shard(model)
    model(torch.ones(1, 64))


@pytest.mark.parametrize("rows", [40, 31, 17, 16, 72])
def test_weights_that_cannot_be_cut_are_refused_on_every_rank(rows: int) -> None:
    """Before the first collective: a rank that knew nothing of it would wait for ever. (72 rows on 3 ranks: the last
    part would begin and end with a tile.)"""
    why = rf"{rows} is no multiple of" if rows % 2 else "codes lie in tiles of 16 output features"
    for found in outcomes(fsdp_uneven, rows, ranks=3 if rows == 72 else 2, seconds=30):
        assert found.error is not None
        assert f"shape=({rows}, 64)" in found.error
        assert "cannot be cut into" in found.error
        assert why in found.error
        assert "ignored_params=gptq_ao.training.unshardable(model," in found.error


def fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    FullyShardedDataParallel(quantized(), device_id=torch.device("cpu"), use_orig_params=True)


def test_fsdp1_is_refused() -> None:
    for found in outcomes(fsdp1):
        assert found.error is not None
        assert "makes one dense parameter of all weights, quantized ones too: use FSDP2" in found.error


def loads_into_shards(dtype: torch.dtype, option: str) -> None:
    """What the CPU kernel has converted is not used for other codes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    first, second = quantized(dtype=dtype), quantized(dtype=dtype, seed=1)
    with torch.no_grad():
        before, expected = first(ids()).logits, second(ids()).logits
        shard(first, reshard_after_forward=option == "reshard")
        assert torch.equal(first(ids()).logits, before)
        first.reshard()
        for layer in first.model.layers:
            layer.reshard()
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(first, second.state_dict(), options=options)
        assert torch.equal(first(ids()).logits, expected)


@pytest.mark.parametrize("option", some(["reshard", "stays gathered"]))
@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float32]), ids=str)
def test_weights_loaded_into_shards_are_those_that_compute(dtype: torch.dtype, option: str) -> None:
    on_ranks(loads_into_shards, dtype, option)


def from_meta(act_order: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model = quantized(act_order="group" if act_order else "none")
    empty = shard(copy.deepcopy(model).to("meta"))
    empty.to_empty(device=device())
    for made, given in zip(empty.buffers(), model.buffers(), strict=True):
        made.copy_(given)
    set_model_state_dict(empty, model.state_dict(), options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        assert torch.equal(empty(ids()).logits, model(ids()).logits)
    for offload in (False, True):
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        state = get_model_state_dict(empty, options=options)
        if state:  # offloaded ones are only on rank 0
            assert all(same(state[n], t) for n, t in model.state_dict().items() if isinstance(t, GroupTensor))


@pytest.mark.parametrize("act_order", some([False, True]))
def test_a_model_made_on_meta_is_filled_from_a_full_state_dict(act_order: bool) -> None:
    on_ranks(from_meta, act_order)


def ddp_trains(init_sync: bool) -> list[float]:
    model = with_lora(quantized())
    expected = train(copy.deepcopy(model))
    losses = train(nn.parallel.DistributedDataParallel(model, init_sync=init_sync))
    assert losses == pytest.approx(expected, abs=1e-5)
    return losses


@pytest.mark.parametrize("init_sync", some([True, False]))
def test_distributed_data_parallel_trains(init_sync: bool) -> None:
    first, second = on_ranks(ddp_trains, init_sync)
    assert first == second


def ddp_of_different_weights() -> None:
    import torch.distributed as dist

    nn.parallel.DistributedDataParallel(with_lora(quantized(seed=dist.get_rank())))


def test_ranks_with_different_weights_are_found() -> None:
    _, second = outcomes(ddp_of_different_weights)
    assert second.error is not None
    assert "is not that of rank 0: DistributedDataParallel trains equal models" in second.error


def collectives() -> None:
    """Of the tensors themselves."""
    import torch.distributed as dist

    rank, kept = dist.get_rank(), [quantized(seed=s, dtype=torch.bfloat16).lm_head for s in (0, 1)]
    weights = [quantized(seed=s, dtype=torch.bfloat16).model.layers[0].mlp.up_proj.weight.detach() for s in (0, 1)]
    assert kept
    x = torch.ones(2, 128, dtype=torch.bfloat16, device=device())
    mine = weights[rank].clone()
    products = [nn.functional.linear(x, w) for w in weights]
    assert torch.equal(nn.functional.linear(x, mine), products[rank])  # converted for the CPU's kernel now
    gathered = [torch.empty_like(mine) for _ in weights]
    dist.all_gather(gathered, mine)
    assert all(same(g, w) for g, w in zip(gathered, weights, strict=True))
    dist.broadcast(mine, 1)
    assert same(mine, weights[1])
    assert torch.equal(nn.functional.linear(x, mine), products[1])
    dist.scatter(mine, weights[::-1] if rank == 0 else None, 0)
    assert same(mine, weights[1 - rank])
    assert torch.equal(nn.functional.linear(x, mine), products[1 - rank])
    # What DTensor calls on GPUs to cut along another dimension.
    rows, columns = (weights[0].chunk(2, dim)[rank].contiguous() for dim in (0, 1))
    group = dist.distributed_c10d._get_default_group().group_name
    assert same(torch.ops._dtensor.shard_dim_alltoall(rows, 0, 1, group), columns)
    for collective in (
        lambda: dist.all_reduce(mine),
        lambda: dist.reduce(mine, 0),
        lambda: dist.send(mine, 1 - rank),
        lambda: dist.all_to_all([mine.clone(), mine.clone()], [mine, mine]),
    ):
        with pytest.raises(NotImplementedError, match=r"does not know Int4GroupTensor.*: between processes, quantized"):
            collective()


@pytest.mark.long
def test_collectives() -> None:
    on_ranks(collectives)


def fsdp_of_different_weights() -> None:
    import torch.distributed as dist

    shard(quantized(seed=dist.get_rank()))(ids())


def test_ranks_with_parts_of_different_weights_are_found() -> None:
    """In the first forward, on every rank."""
    for found in outcomes(fsdp_of_different_weights):
        assert found.error is not None
        assert "the ranks hold parts of different weights for Int4GroupTensor" in found.error
