"""Train the tiny byte-level language model that the demo and the tests quantize, or one of another family.

    python examples/tiny_lm/train.py --out examples/tiny_lm --device cuda
    python examples/tiny_lm/train.py --family qwen3 --out tiny_qwen3 --device cuda

A transformers causal language model reads the sources of the Python standard library (``corpus.py``) one
byte per token. The script writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load offline,
weights in bf16 safetensors, plus ``training.json`` with the held-out loss of the saved model. Nothing is
downloaded.

The shipped weights, a Llama's, took 101 seconds on one NVIDIA H200. On a CPU the script runs too, but not in
reasonable time.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gptq_ao.tiny_lm.corpus import documents

END = "<|endoftext|>"
CONTEXT = 512
BATCH = 128
WARMUP = 200
# The layers that add into the residual stream, by the end of their names.
RESIDUAL = ("o_proj", "down_proj", "c_proj")


@dataclass(frozen=True)
class Family:
    """The size of a model and how it is trained.

    The corpus is small (7 to 10 MB, read dozens of times), so what limits a model is overfitting: the larger
    ones read it less often and are held back more.
    """

    sizes: dict[str, Any]  # arguments of the configuration
    steps: int
    peak_lr: float
    weight_decay: float
    dropout: float


# By transformers' ``model_type``. Every in_features is a multiple of 128, the usual group size.
FAMILIES = {
    "llama": Family(
        sizes={
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        steps=10000,
        peak_lr=3e-3,
        weight_decay=0.5,
        dropout=0.2,
    ),
    "qwen3": Family(
        sizes={
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            # As in the small Qwen3s, the heads together are wider than the residual stream.
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        steps=4000,
        peak_lr=2e-3,
        weight_decay=1.0,
        dropout=0.3,
    ),
    "gpt2": Family(
        sizes={
            "n_embd": 384,
            "n_layer": 6,
            "n_head": 6,
            # Dropout is add_dropout's, the same for every family, and not part of the saved model.
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        steps=4000,
        peak_lr=2e-3,
        weight_decay=1.0,
        dropout=0.3,
    ),
}


# Written out, as the class name that transformers itself saves differs between its major versions.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "clean_up_tokenization_spaces": False,  # so that decoding gives back every byte
    "model_max_length": CONTEXT,
    "model_input_names": ["input_ids", "attention_mask"],
}


def build_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte (byte ``b`` is id ``b + 1``) and ``<|endoftext|>`` as id 0.

    Byte-level BPE without merges. Its vocabulary names bytes by printable characters: bytes that print
    in Latin-1 stand for themselves, the others are numbered from U+0100 upwards (GPT-2's convention).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocab = {END: 0} | {letter[byte]: byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def token_stream(texts: Iterable[str]) -> torch.Tensor:
    """int64 [tokens]: every text preceded by token 0, concatenated. What the tokenizer gives, but fast."""
    pieces = []
    for text in texts:
        pieces.append(torch.zeros(1, dtype=torch.int64))
        pieces.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int64) + 1)
    return torch.cat(pieces)


def build_model(family: str, generator: torch.Generator) -> PreTrainedModel:
    """A freshly initialised fp32 model; every matrix is drawn from ``generator``."""
    config = AutoConfig.for_model(
        family,
        vocab_size=257,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **FAMILIES[family].sizes,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # The matrices that add into the residual stream start smaller, as it sums 2 * layers of them.
            residual = name.removesuffix(".weight").endswith(RESIDUAL)
            std = 0.04 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.04
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def add_dropout(model: PreTrainedModel, share: float) -> None:
    """While training, drop out what each attention and MLP block adds to the residual stream."""

    def drop(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, module.training)

    for name, module in model.named_modules():
        if name.endswith(RESIDUAL):
            module.register_forward_hook(drop)


def last_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, n, hidden_size]: what ``model.lm_head`` reads for ``tokens``, int64 [batch, n].

    The model's own modules, called without the attention mask that ``model(...)`` materialises under
    ``torch.compile``: without one, attention takes its fast causal kernel.
    """
    decoder = model.base_model
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if model.config.model_type == "gpt2":
        hidden = decoder.wte(tokens) + decoder.wpe(positions)
        for layer in decoder.h:
            hidden = layer(hidden)
        return decoder.ln_f(hidden)
    hidden = decoder.embed_tokens(tokens)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=rotary)
    return decoder.norm(hidden)


def training_loss(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting ``windows[:, 1:]`` from ``windows[:, :-1]``.

    windows: int64 [batch, CONTEXT + 1].
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    logits = model.lm_head(last_hidden(model, tokens))  # [batch, CONTEXT, vocab]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, int]:
    """Mean loss in nats per predicted token over non-overlapping chunks of CONTEXT tokens, and their number.

    tokens: int64 [n]; an incomplete last chunk is dropped. In each chunk, tokens 2 to CONTEXT are predicted.
    """
    chunks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    for batch in chunks.split(64):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:].to(model.device)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / (len(chunks) * (CONTEXT - 1)), len(chunks)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then a cosine down to zero at the last step."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    heldout: torch.Tensor,
    family: Family,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train ``model`` in place on random windows of ``tokens``; the held-out loss is only printed.

    tokens, heldout: int64 [n]; ``tokens`` and ``generator`` on the model's device.
    """
    device = model.device
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # gains and biases
    groups = [{"params": matrices, "weight_decay": family.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    loss_of = torch.compile(training_loss) if device.type == "cuda" else training_loss
    offsets = torch.arange(CONTEXT + 1, device=device)
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, family.peak_lr)
        begins = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, tokens[begins + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 1000 == 0 or step == steps - 1:
            seen, unseen = loss.item(), heldout_loss(model.eval(), heldout)[0]
            model.train()
            seconds = time.perf_counter() - start
            print(f"step {step:6d}/{steps}  train {seen:.4f}  held-out {unseen:.4f}  {seconds:6.1f} s")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Train, save, and measure the saved model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="architecture (default: llama)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the family's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, windows and dropout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    start = time.perf_counter()
    family = FAMILIES[args.family]
    steps = family.steps if args.steps is None else args.steps
    device = torch.device(args.device)
    tokenizer = build_tokenizer()
    sample = "def π(x):\r\n\treturn '\N{SNAKE}' \n"
    if tokenizer.encode(sample).ids != token_stream([sample]).tolist()[1:]:
        raise AssertionError("the tokenizer and token_stream disagree")

    tokens = token_stream(documents("train")).to(device)
    heldout = token_stream(documents("heldout"))
    model = build_model(args.family, torch.Generator().manual_seed(args.seed))
    model.to(device)
    add_dropout(model, family.dropout)
    torch.manual_seed(args.seed)  # dropout's masks have no generator of their own
    train(model, tokens, heldout, family, steps, torch.Generator(device).manual_seed(args.seed))
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_json(args.out / "tokenizer_config.json", TOKENIZER_CONFIG)

    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    saved.to(device)
    loss, chunks = heldout_loss(saved, heldout)
    report = {
        "parameters": sum(p.numel() for p in saved.parameters()),
        "steps": steps,
        "seed": args.seed,
        "peak_learning_rate": family.peak_lr,
        "weight_decay": family.weight_decay,
        "dropout": family.dropout,
        "batch_windows": BATCH,
        "window_tokens": CONTEXT,
        "bytes_seen": steps * BATCH * CONTEXT,
        "train_bytes": len(tokens),
        "heldout_chunks": chunks,
        "heldout_nats_per_byte": round(loss, 4),
        "heldout_bits_per_byte": round(loss / math.log(2), 4),
        "heldout_perplexity": round(math.exp(loss), 4),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(args.out / "training.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
