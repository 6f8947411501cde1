"""Merging a trained adapter back: what each way of doing it loses.

    python benchmarks/merging.py [MODEL] [--bits 4 3] [--steps 150]

LoRA of rank 16 is trained on quantized weights, on license texts of this machine. Measured on held-out text of the same
kind: perplexity, and the KL divergence from the quantized model with the adapter beside it. One seed.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.data import spaced, text_batches, token_chunks
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.solver.solve import round_to_nearest
from gptq_ao.tiny_lm.corpus import documents
from gptq_ao.training import merge_and_requantize_
from gptq_ao.training.peft_layers import PlainModel

LENGTH = 256


def trained(model: nn.Module, chunks: torch.Tensor, steps: int, rate: float) -> Any:
    import peft  # after gptq_ao: transformers would take `kernels.py` beside this file for a package

    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    made: Any = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        ids = chunks[torch.randint(0, len(chunks), (4,))]
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


def dense(model: Any) -> Any:
    """The plain model with merged weights that are not quantized."""
    plain = PlainModel.of(model)
    for name, w in plain.adapted.items():
        owner, _, leaf = name.rpartition(".")
        values = w.merged().to(w.weight.dtype)
        plain.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    return plain.model


def old_grid(model: Any) -> Any:
    plain = PlainModel.of(model)
    for name, w in plain.adapted.items():
        owner, _, leaf = name.rpartition(".")
        recipe = gptq_config(w.weight.bits, w.weight.group_size).recipe
        values = round_to_nearest(w.merged(), recipe, (w.weight.scale, w.weight.zero_point)).dequantize()
        plain.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(values.to(w.weight.dtype))
    return plain.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parents[1] / "examples" / "tiny_lm"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    files = sorted({p.resolve() for p in Path("/usr/share/common-licenses").glob("*")})
    text = "".join(f.read_text(errors="ignore") for f in files)
    cut = int(len(text) * 0.85)
    chunks = token_chunks(tokenizer, [text[:cut]], LENGTH)
    held_out = spaced(token_chunks(tokenizer, [text[cut:]], LENGTH), 48)
    chosen = chunks[torch.randperm(len(chunks), generator=torch.Generator().manual_seed(1))[:64]]
    like_training = [{"input_ids": ids} for ids in chosen.split(8)]
    before = text_batches(tokenizer, list(documents("train")), num_samples=64, seq_len=LENGTH, batch_size=8)
    for bits in arguments.bits:
        model: Any = load_model(arguments.model)
        quantize_(model, gptq_config(bits, arguments.group_size, calibration=before))
        with torch.enable_grad():
            made = trained(model, chunks, arguments.steps, arguments.rate)

        def gptq(**settings: Any) -> Callable[[Any], Any]:
            return lambda m: merge_and_requantize_(m, gptq_config(**{"calibration": like_training, **settings}))[0]

        def nearest(m: Any, bits: int = bits) -> Any:
            plain = dense(m)
            quantize_(plain, gptq_config(bits, arguments.group_size, method="rtn"))
            return plain

        def new_grids(m: Any, bits: int = bits) -> Any:
            plain = dense(m)
            quantize_(plain, gptq_config(bits, arguments.group_size, calibration=like_training))
            return plain

        ways: dict[str, Callable[[Any], Any]] = {
            "adapter beside the weights": lambda m: m,
            "without the adapter": lambda m: m.unload(),
            "merged, dense": dense,
            "merged, rounded to nearest": nearest,
            "merged, nearest code on the old grid": old_grid,
            "merged, GPTQ with new scales only": new_grids,
            "merge_and_requantize_, effort fast": gptq(effort="fast"),
            "merge_and_requantize_": gptq(),
            "merge_and_requantize_, data of the first time": gptq(calibration=before),
        }
        print(f"{bits} bits, groups of {arguments.group_size}{'':24} perplexity         KL", flush=True)
        for name, way in ways.items():
            result = evaluate(way(copy.deepcopy(made)), held_out, made, 8)
            print(f"  {name:46} {result.perplexity:10.4f} {result.kl or 0.0:10.5f}", flush=True)


if __name__ == "__main__":
    main()
