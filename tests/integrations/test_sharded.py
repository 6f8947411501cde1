"""transformers spreads quantized models over processes when it loads them; accelerate and its Trainer, afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptq_ao import gptq_config, quantize_, save_quantized
from gptq_ao.tensor import GroupTensor
from tests.models import tiny_llama, token_batches
from tests.ranks import on_ranks, outcomes, some
from tests.tensor.test_fsdp import ids, local, quantized, train, with_lora


def saved(folder: Path, format: str, **settings: Any) -> Path:
    model = tiny_llama(width=128, layers=1)
    settings = {"bits": 4, "group_size": 32, "effort": "fast", "act_order": "none", **settings}
    quantize_(model, gptq_config(**settings, calibration=token_batches(2)))
    save_quantized(model, folder / "model", format=format)
    return folder / "model"


def loads(directory: Path, how: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    whole = AutoModelForCausalLM.from_pretrained(directory)
    given = {"tp_plan": "auto"} if how == "tp_plan" else {"distributed_config": DistributedConfig(**{how: 2})}
    model = AutoModelForCausalLM.from_pretrained(directory, **given)
    with torch.no_grad():
        found = model(ids()).logits
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(found, whole(ids()).logits, rtol=1e-4, atol=1e-5)
    down = local(model.model.layers[0].mlp.down_proj.weight)
    assert isinstance(down, GroupTensor)
    assert down.shape == ((64, 256) if how == "fsdp_size" else (128, 128))


@pytest.mark.parametrize("format", some(["native", "gptq", "compressed-tensors"]))
@pytest.mark.parametrize("how", some(["tp_plan", "tp_size", "fsdp_size"]))
def test_loaded_spread(tmp_path: Path, format: str, how: str) -> None:
    on_ranks(loads, saved(tmp_path, format), how)


def test_what_cannot_be_cut_is_refused_on_every_rank(tmp_path: Path) -> None:
    """transformers prints the error of each weight, and raises one of its own."""
    directory = saved(tmp_path, "native", bits=2, group_size=-1)
    for found in outcomes(loads, directory, "tp_plan"):
        assert found.error is not None
        assert "issues during automatic conversion of the weights" in found.error


class Layer(torch.nn.Linear):
    """With a method of transformers' models."""

    get_parameter_or_buffer = torch.nn.Module.get_parameter


def placed(rows: int, columns: int, dim: int) -> None:
    """A part of a weight for a model whose parameter is cut along `dim`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from gptq_ao.integrations.sharded import part_of

    layer = Layer(columns, rows, bias=False)
    quantize_(layer, gptq_config(4, 32, method="rtn"))
    whole = layer.weight.detach()
    place = distribute_tensor(torch.empty(rows, columns, device="meta"), init_device_mesh("cpu", (2,)), [Shard(dim)])
    layer.weight = torch.nn.Parameter(place)
    part_of(layer, "weight", whole)


@pytest.mark.parametrize(
    ("rows", "columns", "dim", "why"),
    [
        (72, 64, 0, "cut into 2 parts along dimension 0 and stay packed: codes lie in tiles of 16 output features"),
        (64, 96, 1, "cut into 2 parts along dimension 1 and stay packed: codes lie in tiles of 64 input features"),
        (64, 96, -1, "cut into 2 parts along dimension 1 and stay packed: codes lie in tiles of 64 input features"),
    ],
    ids=["rows", "columns", "from the end"],
)
def test_a_part_is_packed_or_refused(rows: int, columns: int, dim: int, why: str) -> None:
    for found in outcomes(placed, rows, columns, dim):
        assert found.error is not None
        assert f"'weight', Int4GroupTensor(shape=({rows}, {columns})" in found.error
        assert why in found.error


def prepared(folder: Path) -> list[float]:
    from accelerate import Accelerator

    model = with_lora(quantized())
    expected = train(with_lora(quantized()))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids(), labels=ids()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    accelerator.save_state(str(folder / "state"), safe_serialization=False)
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder / "state"))
    return losses


def test_accelerate_prepares_for_data_parallel_training(tmp_path: Path) -> None:
    """And saves the state by torch, as one file of safetensors has no quantized weights."""
    first, second = on_ranks(prepared, tmp_path)
    assert first == second


def trainer(folder: Path) -> list[float]:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in token_batches(1, rows=16, length=16)[0]["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        ddp_backend="gloo",
    )
    used = Trainer(with_lora(quantized()), arguments, train_dataset=rows)
    used.train()
    assert type(used.model_wrapped).__name__ == "DistributedDataParallel"
    assert arguments.world_size == dist.get_world_size() == 2
    return [entry["loss"] for entry in used.state.log_history if "loss" in entry]


def test_trainer_in_two_processes(tmp_path: Path) -> None:
    first, second = on_ranks(trainer, tmp_path)
    assert len(first) == 3
    assert first == second or not second
