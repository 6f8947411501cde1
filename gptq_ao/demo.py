"""The main job on the embedded model: quantize it to 4 and 3 bits, and show what that costs."""

import copy
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.config import gptq_config
from gptq_ao.data import spaced, text_batches, token_chunks
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.pipeline.quantize import quantize_
from gptq_ao.tiny_lm.corpus import documents

__all__ = ["DemoResult", "run_demo"]

SEQ_LEN = 512
CALIBRATION_SAMPLES = 64
CALIBRATION_SHARE = 20  # every 20th training document is taken: plenty for the samples
EVALUATION_CHUNKS = 40
PROMPT = "import os\n\n\ndef read("
GENERATED_TOKENS = 160


@dataclass(frozen=True)
class DemoRow:
    """`bytes`: of the weights that quantization touches."""

    name: str
    bytes: int
    perplexity: float
    kl: float | None


@dataclass(frozen=True)
class DemoResult:
    rows: tuple[DemoRow, ...]
    generated: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'':14} {'weights':>10} {'perplexity':>11} {'KL (nats/token)':>16}"]
        for row in self.rows:
            kl = "" if row.kl is None else f"{row.kl:.4f}"
            lines.append(f"{row.name:14} {row.bytes / 1024:>6.0f} KiB {row.perplexity:>11.4f} {kl:>16}")
        for name, text in self.generated.items():
            lines += [f"\n--- {name} writes:", text.rstrip()]
        return "\n".join(lines)


def run_demo() -> DemoResult:
    """Calibrates on training text and scores on held-out text: sources of this Python's standard library."""
    with as_file(files("gptq_ao") / "tiny_lm") as folder:
        original, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    batches = text_batches(
        tokenizer,
        documents("train")[::CALIBRATION_SHARE],
        num_samples=CALIBRATION_SAMPLES,
        seq_len=SEQ_LEN,
        batch_size=8,
    )
    chunks = spaced(token_chunks(tokenizer, documents("heldout"), SEQ_LEN), EVALUATION_CHUNKS)
    rows: list[DemoRow] = []
    generated = {"original": _generate(original, tokenizer)}
    for bits in (4, 3):
        for method in ("rtn", "gptq"):
            # `quantize_` works in place, and every row starts from the same weights.
            model = copy.deepcopy(original)
            report = quantize_(model, gptq_config(bits, 128, method=method, calibration=batches))
            assert report is not None
            # The first report tells which weights are quantized, and so what the original's take.
            if not rows:
                dense = sum(w.original_bytes for w in report.weights)
                rows.append(DemoRow("original", dense, evaluate(original, chunks).perplexity, None))
            score = evaluate(model, chunks, original)
            name = f"{bits}-bit {method.upper()}"
            rows.append(DemoRow(name, sum(w.bytes for w in report.weights), score.perplexity, score.kl))
            if method == "gptq":
                generated[name] = _generate(model, tokenizer)
    return DemoResult(tuple(rows), generated)


def _generate(model: nn.Module, tokenizer: Any) -> str:
    """A sampled continuation of PROMPT; the same seed for every model, and the global random state restored."""
    ids: Tensor = tokenizer(tokenizer.bos_token + PROMPT, return_tensors="pt")["input_ids"]
    generate: Any = model.generate
    # The model is on the CPU, so no GPU's random state has to be kept.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=tokenizer.eos_token_id,
            max_new_tokens=GENERATED_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)
