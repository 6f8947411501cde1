"""torch.distributed.checkpoint with quantized weights: saved and loaded in any arrangement of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gptq_ao.tensor import GroupTensor
from tests.ranks import device, on_ranks, some
from tests.tensor.test_fsdp import ids, local, quantized, same, shard, train, with_lora


def mesh(*sizes: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device(), sizes, mesh_dim_names=("data", "tensor")[: len(sizes)])


def arranged(model: Any, how: str) -> Any:
    """`model` as some processes hold it."""
    if how in ("tensor parallel", "both"):
        of_tensors = mesh(2) if how == "tensor parallel" else mesh(2, 2)["tensor"]
        for layer in model.model.layers:
            plan: dict[str, Any] = {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")}
            plan["mlp.down_proj"] = RowwiseParallel()
            parallelize_module(layer, of_tensors, plan)
    if how in ("sharded", "both", "hybrid"):
        shard(model, mesh=mesh(2, 2) if how == "hybrid" else mesh(2, 2)["data"] if how == "both" else None)
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(ids()).logits


def there_and_back(folder: Path, saved: str, loaded: str, dtype: torch.dtype) -> None:
    first, second = quantized(dtype=dtype, act_order="none"), quantized(dtype=dtype, act_order="none", seed=1)
    expected, other = logits(first), logits(second)
    assert not torch.equal(expected, other)
    arranged(first, saved)
    dcp.save({"model": first.state_dict()}, checkpoint_id=folder)
    arranged(second, loaded)
    before = logits(second)  # the CPU kernel has converted its weights now
    assert not torch.allclose(before, expected, atol=0.1)
    state = {"model": second.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    second.load_state_dict(state["model"])
    rounding = 1e-4 if dtype == torch.float32 else 3e-2
    close = {"rtol": 0, "atol": 0} if loaded in ("whole", "sharded", "hybrid") else {"rtol": 0, "atol": rounding}
    torch.testing.assert_close(logits(second), expected, **close)


@pytest.mark.parametrize(
    ("saved", "loaded", "dtype"),
    some(
        [
            ("whole", "whole", torch.bfloat16),
            ("whole", "sharded", torch.bfloat16),
            ("sharded", "sharded", torch.bfloat16),
            ("sharded", "whole", torch.bfloat16),
            ("tensor parallel", "whole", torch.float32),
            ("tensor parallel", "sharded", torch.float32),
            ("sharded", "tensor parallel", torch.bfloat16),
        ]
    ),
    ids=str,
)
def test_saved_and_loaded(tmp_path: Path, saved: str, loaded: str, dtype: torch.dtype) -> None:
    on_ranks(there_and_back, tmp_path, saved, loaded, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("saved", "loaded"), [("hybrid", "sharded"), ("both", "whole"), ("sharded", "both")])
def test_saved_and_loaded_by_four(tmp_path: Path, saved: str, loaded: str) -> None:
    """Two parts become four, and tensor parallelism with FSDP2 on top is taken apart."""
    on_ranks(there_and_back, tmp_path, saved, loaded, torch.float32, ranks=4)


def both_train() -> None:
    model = with_lora_on_attention(quantized(act_order="none"))
    expected = train(with_lora_on_attention(quantized(act_order="none")))
    before = {n: p for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    arranged(model.base_model.model, "both")
    up, down = (getattr(model.base_model.model.model.layers[0].mlp, n).weight for n in ("up_proj", "down_proj"))
    assert local(up).shape == (64, 128)
    assert local(down).shape == (64, 128)
    assert train(model) == pytest.approx(expected, abs=1e-3)
    for name, parameter in model.named_parameters():
        if name in before:
            assert same(parameter.full_tensor(), before[name])


def with_lora_on_attention(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.long
def test_tensor_parallel_and_fsdp_train() -> None:
    on_ranks(both_train, ranks=4)


def with_optimizer(folder: Path) -> None:
    """What a training run saves and goes on from; and the adapters alone."""
    first, second = shard(with_lora(quantized())), shard(with_lora(quantized(seed=1)))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (first, second)]
    for _ in range(2):
        first(input_ids=ids(), labels=ids()).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    model, optimizer = get_state_dict(first, optimizers[0])
    assert optimizer["state"]
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "all")
    model, optimizer = get_state_dict(second, optimizers[1])
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "all")
    set_state_dict(second, optimizers[1], model_state_dict=model, optim_state_dict=optimizer)
    assert train_on(first, optimizers[0]) == train_on(second, optimizers[1])

    adapters = get_model_state_dict(first, options=StateDictOptions(ignore_frozen_params=True))
    assert adapters
    assert all("lora_" in name for name in adapters)
    dcp.save(adapters, checkpoint_id=folder / "adapters")
    dcp.load(adapters, checkpoint_id=folder / "adapters")


def train_on(model: Any, optimizer: Any) -> list[float]:
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_training_run_goes_on(tmp_path: Path) -> None:
    on_ranks(with_optimizer, tmp_path)
