"""Perplexity and KL of a language model quantized in several formats, recipe by recipe.

    python benchmarks/accuracy.py MODEL --calibration calibration.jsonl --data eval.jsonl --seq-len 512

MODEL is a local Hugging Face directory. Prints the device, the versions and one row per format and recipe: perplexity
and KL(original ‖ quantized) per token in nats, both as mean and, over several seeds of the choice of calibration
sequences, standard deviation; stored bits per weight; seconds to quantize; peak memory of the process so far.
"""

import argparse
import copy
import platform
from typing import Any

import torch
import torchao
import transformers

from gptq_ao import gptq_config, quantize_
from gptq_ao.data import read_documents, spaced, text_batches, token_chunks
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer

FORMATS: dict[str, dict[str, Any]] = {
    "W8 g128": {"bits": 8, "group_size": 128},
    "W4 g128": {"bits": 4, "group_size": 128},
    "W4 g32": {"bits": 4, "group_size": 32},
    "W3 g128": {"bits": 3, "group_size": 128},
    "W2 g64": {"bits": 2, "group_size": 64},
    # As large as W3 g128; what per-channel scales save goes to the weights that matter most.
    "3.25 bits": {"target_bits": 3.25, "group_size": -1, "candidates": (2, 3, 4, 8)},
}
PLAIN: dict[str, Any] = {
    "act_order": "static",
    "signed_scale": False,
    "scale_candidates": 1,
    "refine_sweeps": 0,
    "compensate": "none",
}
# One setting more from row to row, from what others do by default to the default recipe.
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("static order", {}),
    ("group-aware order", {"act_order": "group_aware"}),
    ("+ signed scales", {"signed_scale": True}),
    ("+ searched scales", {"scale_candidates": 40}),
    ("+ refinement", {"refine_sweeps": 4}),
    ("+ inputs compensated", {"compensate": "inputs"}),
    ("+ residual compensated", {"compensate": "residual"}),
]


def recipes(names: list[str]) -> dict[str, dict[str, Any]]:
    """Name → settings: "rtn", an effort, or "steps" for all of STEPS."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "rtn":
            found["round to nearest"] = {"method": "rtn"}
        elif name == "steps":
            settings = dict(PLAIN)
            for step, change in STEPS:
                settings |= change
                found[step] = dict(settings)
        else:
            found[name] = {"effort": name}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences that run together")
    parser.add_argument("--max-chunks", type=int, default=10**9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--recipes", nargs="*", default=["rtn", "fast", "default", "max"])
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    args = parser.parse_args()

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    print(
        f"{device}, torch {torch.__version__}, torchao {torchao.__version__}, transformers {transformers.__version__}"
    )
    print(f"Python {platform.python_version()}, {args.num_samples} calibration sequences of {args.seq_len} tokens")
    tokenizer = load_tokenizer(args.model)
    original = load_model(args.model, device=args.device)
    chunks = spaced(token_chunks(tokenizer, read_documents(args.data), args.seq_len), args.max_chunks)
    print(f"original: perplexity {evaluate(original, chunks).perplexity:.4f} on {len(chunks)} chunks")
    for format_ in args.formats:
        for recipe, settings in recipes(args.recipes).items():
            if "target_bits" in FORMATS[format_] and "method" in settings:
                continue  # bits are chosen by the error of GPTQ
            kls, perplexities, seconds = [], [], []
            for seed in args.seeds if settings.get("method") != "rtn" else args.seeds[:1]:
                batches = text_batches(
                    tokenizer,
                    args.calibration,
                    num_samples=args.num_samples,
                    seq_len=args.seq_len,
                    batch_size=args.batch_size,
                    seed=seed,
                )
                model = copy.deepcopy(original)
                config = gptq_config(**FORMATS[format_], **settings, sym=not args.asym, calibration=batches)
                report = quantize_(model, config)
                assert report is not None
                score = evaluate(model, chunks, original, batch_size=args.batch_size)
                assert score.kl is not None
                peak = report.peak_bytes
                kls.append(score.kl)
                perplexities.append(score.perplexity)
                seconds.append(sum(report.seconds.values()))
                stored = report.bits_per_weight
            memory = ", ".join(f"{k} {peak[k] / 2**30:.2f} GiB" for k in ("host", "cuda") if k in peak)
            print(
                f"{format_:8} {recipe:24} KL {spread(kls, 4)}, perplexity {spread(perplexities, 3)}, "
                f"{stored:.3f} bits/weight, {sum(seconds) / len(seconds):.1f} s, peak {memory}",
                flush=True,
            )


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation of several."""
    t = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {t.std():.{digits}f}" if len(values) > 1 else ""
    return f"{t.mean():.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
