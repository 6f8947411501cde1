"""Other libraries' 4 bits beside this one's, on the same text: perplexity and KL(original ‖ quantized).

    python benchmarks/comparison.py MODEL --data eval.jsonl [--max-chunks 100]

HQQ and bitsandbytes need no calibration data, nor does rounding to nearest, which is this package's row here (for
GPTQ see `accuracy.py`, with the same chunks). A library that is not installed is left out.
"""

import argparse
import copy
import importlib.metadata
from collections.abc import Callable

import torch
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.data import read_documents, spaced, token_chunks
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.version import VERSION


def nearest(model: nn.Module) -> None:
    quantize_(model, gptq_config(4, 128, method="rtn"))


def hqq(model: nn.Module) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=128, axis=1)
    _replace(model, lambda linear: HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu"))


def nf4(model: nn.Module) -> None:
    import bitsandbytes

    def convert(linear: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        new.bias = linear.bias
        new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return new.to("cpu")  # this quantizes

    _replace(model, convert)


METHODS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "round to nearest, group 128": ("gptq_ao", nearest),
    "HQQ, group 128": ("hqq", hqq),
    "nf4, block 64": ("bitsandbytes", nf4),
}


def _replace(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, convert(module))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-chunks", type=int, default=10**9)
    args = parser.parse_args()
    original = load_model(args.model)
    chunks = spaced(token_chunks(load_tokenizer(args.model), read_documents(args.data), args.seq_len), args.max_chunks)
    print(f"torch {torch.__version__}, {len(chunks)} chunks of {args.seq_len}")
    print(f"original: perplexity {evaluate(original, chunks).perplexity:.4f}")
    for name, (package, quantize) in METHODS.items():
        try:
            version = VERSION if package == "gptq_ao" else importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        model = copy.deepcopy(original)
        quantize(model)
        score = evaluate(model, chunks, original)
        print(f"{name:28} {package} {version}: perplexity {score.perplexity:.4f}, KL {score.kl:.4f}", flush=True)


if __name__ == "__main__":
    main()
