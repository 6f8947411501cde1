"""Other libraries' codes beside this one's, on the same text: perplexity and KL(original ‖ quantized).

    python benchmarks/comparison.py MODEL --data eval.jsonl [--max-chunks 100]
    python benchmarks/comparison.py MODEL --data eval.jsonl --calibration calibration.jsonl --formats 4x128 4x32 3x128

HQQ, bitsandbytes and rounding to nearest need no calibration data. Those that do, and this package's default recipe,
are run with --calibration; all get the same sequences. A library that is not installed is left out, and what it does
not have (nf4 with 3 bits) too. AWQ is llm-compressor's; perplexities of its models are of weights rounded on the fly.
"""

import argparse
import copy
import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.data import read_documents, spaced, text_batches, token_chunks
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.version import VERSION


@dataclasses.dataclass(frozen=True)
class Task:
    """What to quantize to, and with what: token ids [sequences, length]."""

    bits: int
    group_size: int
    device: str
    tokenizer: Any = None
    sequences: Tensor | None = None

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        assert self.sequences is not None
        return [{"input_ids": rows.to(self.device)} for rows in self.sequences.split(8)]


def nearest(model: nn.Module, task: Task) -> nn.Module | None:
    quantize_(model, gptq_config(task.bits, task.group_size, method="rtn"))
    return model


def default(model: nn.Module, task: Task) -> nn.Module | None:
    quantize_(model, gptq_config(task.bits, task.group_size, calibration=task.batches))
    return model


def autoround(model: nn.Module, task: Task) -> nn.Module | None:
    from auto_round import AutoRound  # type: ignore[import-not-found]

    assert task.sequences is not None
    found = AutoRound(
        model,
        task.tokenizer,
        bits=task.bits,
        group_size=task.group_size,
        sym=True,
        dataset=[row[None] for row in task.sequences],
        nsamples=len(task.sequences),
        seqlen=task.sequences.shape[1],
        batch_size=8,
        seed=0,
        device_map=task.device,
        enable_torch_compile=False,
    ).quantize()
    return found[0] if isinstance(found, tuple) else found or model


def awq(model: nn.Module, task: Task, symmetric: bool = False) -> nn.Module | None:
    from compressed_tensors.quantization import (  # type: ignore[import-not-found]
        QuantizationArgs,
        QuantizationScheme,
    )
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
    from llmcompressor.pipelines.cache import IntermediatesCache  # type: ignore[import-not-found]

    assert task.sequences is not None
    grid = QuantizationArgs(num_bits=task.bits, group_size=task.group_size, symmetric=symmetric, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    if task.device == "cpu":  # version 0.14 would pin memory, for an accelerator that is not there
        IntermediatesCache.pin_memory = lambda *_, **__: None
    return oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": task.sequences.tolist()}),
        recipe=[AWQModifier(), QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])],
        max_seq_length=task.sequences.shape[1],
        num_calibration_samples=len(task.sequences),
        batch_size=8,
        shuffle_calibration_samples=False,
    )


def hqq(model: nn.Module, task: Task) -> nn.Module | None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size, axis=1)
    return _replace(
        model, lambda linear: HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device=task.device)
    )


def nf4(model: nn.Module, task: Task) -> nn.Module | None:
    import bitsandbytes

    def convert(linear: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        new.bias = linear.bias
        new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return new.to(task.device)  # this quantizes

    return _replace(model, convert) if (task.bits, task.group_size) == (4, 128) else None


# Name → package, whether it calibrates, and what changes a model, or returns None.
METHODS: dict[str, tuple[str, bool, Callable[[nn.Module, Task], nn.Module | None]]] = {
    "round to nearest": ("gptq_ao", False, nearest),
    "HQQ": ("hqq", False, hqq),
    "nf4, block 64": ("bitsandbytes", False, nf4),
    "AutoRound": ("auto-round", True, autoround),
    "AWQ, asymmetric": ("llmcompressor", True, awq),
    "AWQ, symmetric": ("llmcompressor", True, functools.partial(awq, symmetric=True)),
    "default": ("gptq_ao", True, default),
}


def _replace(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, convert(module))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration", help="text; without it, only what needs none is run")
    parser.add_argument("--sequences", type=int, default=128, help="of calibration")
    parser.add_argument("--formats", nargs="*", default=["4x128"], help="bits x group size")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-chunks", type=int, default=10**9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    original = load_model(args.model).to(args.device)
    tokenizer = load_tokenizer(args.model)
    chunks = spaced(token_chunks(tokenizer, read_documents(args.data), args.seq_len), args.max_chunks).to(args.device)
    sequences = None
    if args.calibration:
        batches = text_batches(tokenizer, args.calibration, num_samples=args.sequences, seq_len=args.seq_len)
        sequences = torch.cat([batch["input_ids"] for batch in batches])
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{where}, torch {torch.__version__}, {len(chunks)} chunks of {args.seq_len}")
    print(f"original: perplexity {evaluate(original, chunks).perplexity:.4f}")
    for text in args.formats:
        bits, group_size = map(int, text.split("x"))
        for name in args.methods:
            package, calibrates, quantize = METHODS[name]
            try:
                version = VERSION if package == "gptq_ao" else importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
            if calibrates and sequences is None:
                continue
            task = Task(bits, group_size, args.device, tokenizer, sequences)
            start = time.perf_counter()
            model = quantize(copy.deepcopy(original), task)
            if model is None:
                continue
            seconds = time.perf_counter() - start
            model.to(device=torch.device(args.device), dtype=next(original.parameters()).dtype)
            score = evaluate(model, chunks, original)
            label = f"{text} {name} {package} {version}"
            print(f"{label:40}: perplexity {score.perplexity:.4f}, KL {score.kl:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
