"""Perplexity of a language model, and its divergence from the model it was made from.

Both are taken over the predicted tokens 2…L of every chunk of L tokens: the forward in the model's dtype, the
log-softmax in fp32. KL(reference ‖ model) per token, in nats, tells quantizations apart long before perplexity does.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from gptq_ao.errors import CalibrationError

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """`kl` is None without a reference. `tokens`: how many predictions were scored."""

    perplexity: float
    kl: float | None
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, chunks: Tensor, reference: nn.Module | None = None, batch_size: int = 4) -> Evaluation:
    """Score `model` on `chunks` [n, L] of token ids.

    Raises:
        CalibrationError: there is no chunk of at least two tokens.
    """
    if chunks.dim() != 2 or chunks.shape[0] == 0 or chunks.shape[1] < 2:
        raise CalibrationError(f"chunks has shape {tuple(chunks.shape)}: nothing to predict")
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    divergence = torch.zeros_like(loss)
    modules = [m for m in (model, reference) if m is not None]
    training = [m.training for m in modules]
    for m in modules:
        m.eval()
    for rows in tqdm(chunks.split(batch_size), desc="evaluate", unit="batch", disable=None):
        ids = rows.to(device)
        log_p = _log_probabilities(model, ids)
        loss += F.nll_loss(log_p.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        if reference is not None:
            log_q = _log_probabilities(reference, ids).to(device)
            divergence += F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    for m, was in zip(modules, training, strict=True):
        m.train(was)
    tokens = chunks.shape[0] * (chunks.shape[1] - 1)
    return Evaluation(
        torch.exp(loss / tokens).item(), None if reference is None else (divergence / tokens).item(), tokens
    )


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    output: Any = model(ids.to(next(model.parameters()).device))
    logits = output.logits if hasattr(output, "logits") else output
    return logits[:, :-1].float().log_softmax(-1)
