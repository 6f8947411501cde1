"""Perplexity and KL of a language model quantized in several formats, round-to-nearest beside GPTQ.

    python benchmarks/accuracy.py MODEL --calibration calibration.jsonl --data eval.jsonl --seq-len 512

MODEL is a local Hugging Face directory. Prints the device, the versions and one row per format: perplexity,
KL(original ‖ quantized) per token in nats, seconds to quantize, and the peak resident memory of the process so far.
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

FORMATS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 32},
    {"bits": 3, "group_size": 128},
    {"bits": 2, "group_size": 64},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-chunks", type=int, default=10**9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--act-order", nargs="*", default=["static"])
    parser.add_argument("--damp-percent", nargs="*", type=float, default=[None])
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
    for settings in FORMATS:
        variants: list[dict[str, Any]] = [{"method": "rtn", "sym": not args.asym}]
        for act_order in args.act_order:
            variants += [
                {"act_order": act_order, "damp_percent": d if d is None or d > 0 else None, "sym": not args.asym}
                for d in args.damp_percent
            ]
        for variant in variants:
            for seed in args.seeds if variant.get("method") != "rtn" else args.seeds[:1]:
                batches = text_batches(
                    tokenizer,
                    args.calibration,
                    num_samples=args.num_samples,
                    seq_len=args.seq_len,
                    batch_size=args.batch_size,
                    seed=seed,
                )
                model = copy.deepcopy(original)
                report = quantize_(model, gptq_config(**settings, **variant, calibration=batches))
                assert report is not None
                score = evaluate(model, chunks, original)
                peak = ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in report.peak_bytes.items())
                phases = ", ".join(f"{phase} {s:.1f}" for phase, s in report.seconds.items())
                print(
                    f"W{settings['bits']} g{settings['group_size']:<4} {variant} seed {seed}: perplexity "
                    f"{score.perplexity:.4f}, KL {score.kl:.4f}, {report.bits_per_weight:.3f} bits/weight, "
                    f"{sum(report.seconds.values()):.1f} s ({phases}), peak {peak}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
