"""accelerate and the Trainer with FSDP2, in two processes: the losses of one, and the same codes afterwards."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao.tensor import GroupTensor
from tests.models import token_batches
from tests.ranks import on_ranks, some
from tests.tensor.test_fsdp import ids, local, quantized, same, train, with_lora


@contextlib.contextmanager
def as_on_gpus() -> Iterator[None]:
    """accelerate shards nothing on a CPU: while it makes its state, it is told that these are several GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    yield
    PartialState().distributed_type = DistributedType.FSDP


def accelerator(mixed_precision: str = "no", **options: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    efficient = options.pop("cpu_ram_efficient_loading", False)
    with as_on_gpus():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, sync_module_states=False, **options
        )
        # Not at once, since the plugin then looks for a GPU.
        plugin.cpu_ram_efficient_loading = efficient
        made = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=mixed_precision)
    assert made.is_fsdp2
    return made


def steps(used: Any, model: Any, optimizer: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(input_ids=ids(), labels=ids()).loss
        used.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prepared(folder: Path, options: dict[str, Any], settings: dict[str, Any]) -> None:
    used = accelerator(**options)
    model = with_lora(quantized(**settings))
    expected = train(copy.deepcopy(model))
    before = {n: copy.deepcopy(p) for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    if options.get("cpu_ram_efficient_loading") and not used.is_main_process:
        # What is on the other ranks is not used.
        other = quantized(**settings, seed=1).state_dict()
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(other[name.removeprefix("base_model.model.").replace("base_layer.", "")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model, optimizer = used.prepare(model, optimizer)
    assert sum(isinstance(local(p), GroupTensor) for p in model.parameters()) == len(before) == 7
    assert all(local(p).shape[0] * 2 == p.shape[0] for p in model.parameters())
    coarse = options.get("mixed_precision") == "bf16"
    assert steps(used, model, optimizer, 3) == pytest.approx(expected, abs=3e-2 if coarse else 1e-4)
    if state := used.get_state_dict(model):  # on rank 0
        assert all(same(state[name], weight) for name, weight in before.items())
    used.save_state(str(folder))
    expected = steps(used, model, optimizer, 2)
    used.load_state(str(folder))
    assert steps(used, model, optimizer, 2) == expected


@pytest.mark.parametrize(
    ("options", "settings"),
    some(
        [
            ({}, {}),
            ({"cpu_ram_efficient_loading": True, "auto_wrap_policy": "transformer_based_wrap"}, {"act_order": "group"}),
            ({"cpu_ram_efficient_loading": True, "state_dict_type": "FULL_STATE_DICT"}, {"bits": 3}),
            ({"state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "transformer_based_wrap"}, {"bits": 8}),
            ({"mixed_precision": "bf16", "cpu_ram_efficient_loading": True}, {}),
            ({"activation_checkpointing": True, "auto_wrap_policy": "transformer_based_wrap"}, {"bits": 2}),
            ({"reshard_after_forward": False}, {"dtype": torch.float32, "group_size": -1}),
        ]
    ),
    ids=str,
)
def test_accelerate_prepares_saves_and_loads(tmp_path: Path, options: dict[str, Any], settings: dict[str, Any]) -> None:
    """With `cpu_ram_efficient_loading`, rank 0 alone has weights; with a full state dict, it alone reads the file."""
    on_ranks(prepared, tmp_path, options, settings)


def trainer(folder: Path, config: dict[str, Any] | None) -> list[float]:
    """The losses, which those after a resumption from the second step equal."""
    from transformers import Trainer, TrainingArguments

    class OnTwo(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            with as_on_gpus() if config else contextlib.nullcontext():
                super().create_accelerator_and_postprocess()

    rows = [{"input_ids": row, "labels": row} for row in token_batches(1, rows=16, length=16)[0]["input_ids"]]
    arguments: dict[str, Any] = {"output_dir": str(folder), "per_device_train_batch_size": 2, "report_to": []}
    arguments |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True}
    arguments |= {"disable_tqdm": True, "ddp_backend": "gloo"}
    arguments |= {"fsdp": True, "fsdp_config": {"version": 2, **config}} if config else {}
    losses = []
    for resumed in (None, str(folder / "checkpoint-2")):
        used = OnTwo(with_lora(quantized()), TrainingArguments(**arguments), train_dataset=rows)
        used.train(resume_from_checkpoint=resumed)
        assert {isinstance(local(p), GroupTensor) for p in used.model_wrapped.parameters()} == {True, False}
        assert all(hasattr(p, "placements") == bool(config) for p in used.model_wrapped.parameters())
        losses.append([entry["loss"] for entry in used.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    first: list[float] = losses[0]
    return first


LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@pytest.mark.parametrize(
    "config",
    some([{**LAYERS, "state_dict_type": "SHARDED_STATE_DICT"}, LAYERS, {**LAYERS, "activation_checkpointing": True}]),
    ids=["sharded state dict", "layers", "activation checkpointing"],
)
def test_trainer_shards_saves_and_resumes(tmp_path: Path, config: dict[str, Any]) -> None:
    expected, _ = on_ranks(trainer, tmp_path / "whole", None)
    found, _ = on_ranks(trainer, tmp_path / "sharded", config)
    assert found == pytest.approx(expected, abs=1e-3)
