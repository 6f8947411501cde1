"""Perplexity of a language model, and its divergence from the model it was made from.

Both are taken over the predicted tokens 2…L of every chunk of L tokens: the forward in the model's dtype, the
log-softmax in fp32. KL(reference ‖ model) per token, in nats, tells quantizations apart long before perplexity does.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao.errors import CalibrationError
from gptq_ao.model.ambient import own_precision
from gptq_ao.passes.tracing.calibration_mode import calibration_mode
from gptq_ao.progress import Progress, Steps

__all__ = ["Evaluation", "evaluate", "next_tokens"]


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        perplexity: of the model.
        kl: KL(reference ‖ model), in nats per token; None without a reference.
        tokens: how many predictions were scored.
    """

    perplexity: float
    kl: float | None
    tokens: int


def evaluate(
    model: nn.Module,
    chunks: Tensor,
    reference: nn.Module | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Evaluation:
    """Score `model` on `chunks`. Both models are evaluated in eval mode and left as they were.

    Args:
        chunks: [n, L] int64, token ids.
        reference: the model it was made from; without it there is no KL divergence.
        batch_size: chunks that run together.
        progress: called after each batch, see `quantize_`.

    Raises:
        CalibrationError: there is no chunk of at least two tokens.
    """
    if chunks.dim() != 2 or chunks.shape[0] == 0 or chunks.shape[1] < 2:
        raise CalibrationError(f"chunks has shape {tuple(chunks.shape)}: nothing to predict")
    loss, divergence = 0.0, 0.0
    with ExitStack() as stack:
        stack.enter_context(own_precision())
        for m in (model, reference):
            if m is not None:
                stack.enter_context(calibration_mode(m))
        parts = chunks.split(batch_size)
        steps = stack.enter_context(Steps(progress, len(parts), "batch"))
        for ids in parts:
            with steps.step("evaluate"):
                log_p = next_tokens(model, ids).float().log_softmax(-1)
                target = ids[:, 1:].flatten().to(log_p.device)
                loss += F.nll_loss(log_p.flatten(0, 1), target, reduction="sum").item()
                if reference is not None:
                    log_q = next_tokens(reference, ids).float().log_softmax(-1).to(log_p.device)
                    divergence += F.kl_div(log_p, log_q, log_target=True, reduction="sum").item()
    tokens = chunks.shape[0] * (chunks.shape[1] - 1)
    return Evaluation(math.exp(loss / tokens), None if reference is None else divergence / tokens, tokens)


def next_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """What a model predicts for tokens 2…L of `ids` [rows, L]: logits [rows, L − 1, vocabulary], in its dtype."""
    output: Any = model(ids.to(next(model.parameters()).device))
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits[:, :-1]
