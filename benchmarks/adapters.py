"""Adapters that begin as a correction of what quantizing did, of one rank, made in several ways.

    python benchmarks/adapters.py MODEL --calibration calibration.jsonl --data eval.jsonl --seq-len 512

MODEL is a local Hugging Face directory. Prints a row per format and way: KL(original ‖ quantized with its adapter) per
token in nats, and perplexity, before any training.

    none                  the quantized model
    LoftQ                 codes rounded to nearest and singular vectors of the error, five times in turn, without data
    SVD after             GPTQ, then singular vectors of the error W − Ŵ
    EoRA after            GPTQ, then those in the metric of the original model's activations
    rounds 1, rounds 2    `gptq_config(adapter_rank=…, adapter_rounds=…)`
"""

import argparse
import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.adapter import LowRank
from gptq_ao.data import read_documents, spaced, text_batches, token_chunks
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import factor
from gptq_ao.solver.hessian import Hessian, HessianObserver
from gptq_ao.solver.low_rank import low_rank
from gptq_ao.solver.solve import round_to_nearest
from gptq_ao.tensor import GroupTensor

FORMATS: dict[str, dict[str, Any]] = {
    "W3 g128": {"bits": 3, "group_size": 128},
    "W2 g64": {"bits": 2, "group_size": 64},
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def hessians(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Hessian]:
    """Of the inputs of every linear, of the model as it is."""
    observers = {name: HessianObserver(m.in_features) for name, m in linears(model).items()}
    hooks = [m.register_forward_pre_hook(lambda _, args, o=observers[n]: o(args[0])) for n, m in linears(model).items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: o.finish()[0] for name, o in observers.items()}


def identity(k: int) -> Hessian:
    return Hessian(torch.eye(k), k)


def corrected(quantized: nn.Module, adapters: dict[str, LowRank]) -> nn.Module:
    """With Ŵ + BA as dense weights, which is what the model with its adapter computes."""
    made: Any = copy.deepcopy(quantized)
    for name, module in linears(made).items():
        w: Any = module.weight
        value = w.dequantize(torch.float32) if isinstance(w, GroupTensor) else w.float()
        change = adapters[name].dense() if name in adapters else 0
        module.weight = nn.Parameter((value + change).to(w.dtype), requires_grad=False)
    return made


def loftq(original: nn.Module, rank: int, format_: dict[str, Any]) -> nn.Module:
    made: Any = copy.deepcopy(original)
    for module in linears(made).values():
        weight, change = module.weight.detach().float(), torch.zeros(())
        for _ in range(5):
            rounded = round_to_nearest(weight - change, Recipe(**format_)).dequantize()
            f = factor(identity(weight.shape[1]), Recipe(damp_percent=1e-6))
            change = low_rank(weight - rounded, f, rank).dense()
        module.weight = nn.Parameter((rounded + change).to(module.weight.dtype), requires_grad=False)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-chunks", type=int, default=96)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    args = parser.parse_args()
    tokenizer, original = load_tokenizer(args.model), load_model(args.model)
    chunks = spaced(token_chunks(tokenizer, read_documents(args.data), args.seq_len), args.max_chunks)
    batches = text_batches(
        tokenizer, args.calibration, num_samples=args.num_samples, seq_len=args.seq_len, batch_size=8
    )
    of_original = hessians(original, batches)
    for format_ in args.formats:
        settings = FORMATS[format_]

        def solved(settings: dict[str, Any] = settings, **more: Any) -> tuple[nn.Module, dict[str, LowRank]]:
            model = copy.deepcopy(original)
            report = quantize_(model, gptq_config(**settings, effort=args.effort, calibration=batches, **more))
            assert report is not None
            return model, {name.removesuffix(".weight"): a for name, a in report.adapter.items()}

        plain = solved()[0]

        def after(hessian: Callable[[str, int], Hessian], plain: nn.Module = plain) -> nn.Module:
            found = {}
            for name, module in linears(original).items():
                quantized: Any = plain.get_submodule(name).weight
                error = module.weight.detach().float() - quantized.dequantize(torch.float32)
                found[name] = low_rank(error, factor(hessian(name, error.shape[1]), Recipe()), args.rank)
            return corrected(plain, found)

        ways: dict[str, Callable[[], nn.Module]] = {
            "none": lambda plain=plain: plain,  # type: ignore[misc]
            "LoftQ": lambda settings=settings: loftq(original, args.rank, settings),  # type: ignore[misc]
            "SVD after": lambda after=after: after(lambda _, k: identity(k)),  # type: ignore[misc]
            "EoRA after": lambda after=after: after(lambda n, _: of_original[n]),  # type: ignore[misc]
            "rounds 1": lambda solved=solved: corrected(*solved(adapter_rank=args.rank, adapter_rounds=1)),  # type: ignore[misc]
            "rounds 2": lambda solved=solved: corrected(*solved(adapter_rank=args.rank)),  # type: ignore[misc]
        }
        for name, way in ways.items():
            with torch.no_grad():
                score = evaluate(way(), chunks, original, 4)
            print(
                f"{format_:8} rank {args.rank}  {name:12} KL {score.kl:.4f}  perplexity {score.perplexity:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
