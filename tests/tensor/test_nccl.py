"""The same on GPUs that talk to each other by NCCL: run with -m gpu on a machine with two of them."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import test_sharded
from tests.ranks import on_ranks
from tests.tensor import test_distributed_checkpoint, test_fsdp, test_tensor_parallel
from tests.training import test_load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
BF16 = torch.bfloat16

CASES: dict[str, tuple[Any, ...]] = {
    "FSDP2": (test_fsdp.fsdp_trains, {}, "default"),
    "FSDP2, bf16": (test_fsdp.fsdp_trains, {"dtype": BF16}, "default"),
    "FSDP2, 2 bits, mixed precision": (test_fsdp.fsdp_trains, {"bits": 2}, "mixed precision"),
    "FSDP2, 3 bits, stays gathered": (test_fsdp.fsdp_trains, {"bits": 3}, "stays gathered"),
    "FSDP2, 8 bits, act_order, offloaded": (test_fsdp.fsdp_trains, {"bits": 8, "act_order": "group"}, "offloaded"),
    "FSDP2, compiled": (test_fsdp.fsdp_trains, {}, "compiled and checkpointed"),
    "FSDP2, loaded between forwards": (test_fsdp.loads_into_shards, BF16, "reshard"),
    "FSDP2 from meta": (test_fsdp.from_meta, True),
    "DDP": (test_fsdp.ddp_trains, True),
    "collectives": (test_fsdp.collectives,),
    "tensor parallel": (test_tensor_parallel.both_ways, {}, 0),
    "tensor parallel, 3 bits": (test_tensor_parallel.both_ways, {"bits": 3}, None),
    "sequence parallel, compiled": (test_tensor_parallel.sequence_parallel,),
    "tensor parallel Llama": (test_tensor_parallel.whole_model,),
    "experts": (test_tensor_parallel.experts,),
    "sharded already, FSDP2": (test_sharded.as_the_whole_model, "after a forward"),
    "sharded already, FSDP2, offloaded": (test_sharded.as_the_whole_model, "offloaded"),
    "sharded already, experts": (test_sharded.as_the_whole_model, "stack"),
    "sharded already, tensor parallel": (test_sharded.as_the_whole_model, "tensor parallel"),
    "sharded already, put back": (test_sharded.put_back, "default"),
    "sharded already, adapters": (test_sharded.trains, False, {}),
    "only rank 0 has it": (test_load.from_rank0, "sharded", {"dtype": BF16}, "torch"),
    "only rank 0 has it, meta": (test_load.from_rank0, "meta", {}, "gptq_ao"),
}
CHECKPOINTS = [("whole", "sharded"), ("sharded", "whole"), ("tensor parallel", "sharded")]


def every_case(folder: Path) -> dict[str, str]:
    """The errors of all cases, by name. In one pair of processes, which take long to start."""
    cases = dict(CASES)
    for saved, loaded in CHECKPOINTS:
        arguments = (folder / f"{saved}, {loaded}", saved, loaded, BF16)
        cases[f"checkpoint: {saved}, {loaded}"] = (test_distributed_checkpoint.there_and_back, *arguments)
    errors = {}
    for name, (case, *given) in cases.items():
        try:
            case(*given)
        except Exception:
            errors[name] = traceback.format_exc(limit=-3)
    return errors


def test_on_two_gpus(tmp_path: Path) -> None:
    for errors in on_ranks(every_case, tmp_path, backend="nccl", seconds=600):
        assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())
