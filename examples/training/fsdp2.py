"""LoRA on a quantized model spread over processes (FSDP2): torchrun --nproc-per-node 2 examples/training/fsdp2.py"""

import copy
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from embedded import LORA, chunks, quantized
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from gptq_ao.training import load_full_state_dict, unshardable


def main() -> None:
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpus else torch.device("cpu")
    # Here every rank quantizes, with the same data. A large model is quantized before, by one process, and saved.
    model, tokenizer = quantized()
    ids = chunks(tokenizer, count=32 - 32 % ranks).to(device)
    torch.manual_seed(0)  # the same adapters on all
    model = get_peft_model(model, LORA).to(device)
    state = copy.deepcopy(model.state_dict()) if rank == 0 else {}

    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=unshardable(layer, ranks))
    fully_shard(model, ignored_params=unshardable(model, ranks))
    load_full_state_dict(model, state, from_rank0=True)  # what only one rank has read, for example

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(2):
        for batch in ids.split(8):
            mine = batch.chunk(ranks)[rank]
            loss = model(input_ids=mine, labels=mine).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            losses.append(mean.item())

    # What training changes: the adapters. They fit any number of processes.
    adapters = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    dcp.save(adapters, checkpoint_id=folder[0])
    dist.destroy_process_group()
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
