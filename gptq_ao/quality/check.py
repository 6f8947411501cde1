"""What a quantized model has to keep to, and the comparison with the original, which need not be in memory any more."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from shutil import disk_usage

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao.calibration.activation_store import ActivationStore, Budget
from gptq_ao.errors import ConfigError, QualityError
from gptq_ao.evaluate import next_tokens
from gptq_ao.model.weights import Weights
from gptq_ao.passes.tracing.calibration_mode import calibration_mode
from gptq_ao.quality.piecewise import in_pieces
from gptq_ao.report import Quality

__all__ = ["QualityCheck", "compared"]

_LOGITS = 2**31  # bytes of one forward; of a model in files, each forward reads all of it
_VALUE = "log_q"


@dataclass(frozen=True)
class QualityCheck:
    """To be given to `quantize_` or `quantize_checkpoint`: a quantized model is compared with the original, in the same
    run, and must not differ more from it than this.

    Attributes:
        chunks: [n, L] int64, token ids that the model is not calibrated with; see `gptq_ao.data.token_chunks`.
        max_kl: the most that KL(original ‖ quantized) may be, in nats per token; None: whatever it is.
        max_perplexity_ratio: the most that perplexity may be, divided by that of the original; None: whatever it is.
        required: whether to raise a QualityError if it is more; if not, only `report.quality` says so.
        text: what the chunks are of, for the report.

    Raises:
        ConfigError: a limit is not a positive number, or the chunks are not at least one of two tokens.
    """

    chunks: Tensor
    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    required: bool = True
    text: str = ""

    def __post_init__(self) -> None:
        for name in ("max_kl", "max_perplexity_ratio"):
            limit = getattr(self, name)
            if limit is not None and (type(limit) not in (int, float) or not 0 < limit < math.inf):
                raise ConfigError(f"{name} is {limit!r}: give a positive number, or None for no limit")
        ids = self.chunks
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
            raise ConfigError(
                "the chunks to check with are token ids, an int64 tensor [n, L]: gptq_ao.data.token_chunks makes them"
            )
        if ids.shape[0] == 0 or ids.shape[1] < 2:
            raise ConfigError(f"the chunks to check with have shape {tuple(ids.shape)}: nothing to predict")


@contextlib.contextmanager
def compared(
    check: QualityCheck, weights: Weights, device: torch.device, host: int | None
) -> Iterator[Callable[[], Quality]]:
    """On entry, the original predicts; what is yielded compares what the model has become with that.

    The original's log-probabilities wait as fp32, 4 bytes for each token and each word of the vocabulary: in memory, as
    far as `host` bytes go (None: all), then in files.

    Raises:
        ConfigError: the model does not predict tokens from tokens alone, or there is no room to keep what it predicts.
        QualityError: from what is yielded: a limit is exceeded, and the check is required.
    """
    model = weights.model
    with in_pieces(weights, device), calibration_mode(model):
        _check_vocabulary(check, model)
        try:
            first = next_tokens(model, check.chunks[:1, :2])
        # Of any model, whose own code may raise anything.
        except Exception as e:
            raise _no_predictions(model, f"{type(e).__name__}: {str(e).strip().splitlines()[:1]}") from e
        if first.dim() != 3 or first.shape[:2] != (1, 1) or not first.is_floating_point():
            raise _no_predictions(model, f"its outputs have shape {tuple(first.shape)}")
        words, rows = first.shape[2], check.chunks.shape[0] * (check.chunks.shape[1] - 1)
        _check_disk(rows * words * 4 - (rows * words * 4 if host is None else host), check)
        at_once = max(1, _LOGITS // (check.chunks.shape[1] * words * first.element_size()))
        kept = ({_VALUE: log_q.cpu()} for log_q, _ in _predicted(model, check.chunks, at_once))
        store = ActivationStore(kept, torch.device("cpu"), Budget(device=host))
    with store:

        def compare() -> Quality:
            loss, original_loss, divergence = 0.0, 0.0, 0.0
            with in_pieces(weights, device), calibration_mode(model):
                waiting = store.read([_VALUE])
                for (log_p, target), values in zip(_predicted(model, check.chunks, at_once), waiting, strict=True):
                    log_q = values[_VALUE].to(log_p.device)
                    loss += F.nll_loss(log_p, target, reduction="sum").item()
                    original_loss += F.nll_loss(log_q, target, reduction="sum").item()
                    divergence += F.kl_div(log_p, log_q, log_target=True, reduction="sum").item()
            found = Quality(
                kl=divergence / rows,
                perplexity=_perplexity(loss / rows),
                original_perplexity=_perplexity(original_loss / rows),
                tokens=rows,
                max_kl=check.max_kl,
                max_perplexity_ratio=check.max_perplexity_ratio,
                text=check.text,
            )
            if check.required and found.missed:
                raise QualityError(f"the quantized model is not as good as it has to be: {'; '.join(found.missed)}")
            return found

        yield compare


def _predicted(model: nn.Module, chunks: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each chunk the log-probabilities [L − 1, vocabulary] fp32, and the tokens [L − 1] that came."""
    for ids in chunks.split(at_once):
        for logits, row in zip(next_tokens(model, ids), ids, strict=True):
            yield logits.float().log_softmax(-1), row[1:].to(logits.device)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _check_vocabulary(check: QualityCheck, model: nn.Module) -> None:
    most, least = int(check.chunks.max()), int(check.chunks.min())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    if least < 0 or (size is not None and most >= size):
        raise ConfigError(
            f"the chunks to check with have token ids from {least} to {most}, and the model's vocabulary has {size}: "
            "give chunks that its own tokenizer has made"
        )


def _no_predictions(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"the quality of this {type(model).__name__} cannot be checked, as it does not predict the next token from "
        f"token ids alone: {why}. Leave the check out, and evaluate it as suits its task"
    )


def _check_disk(need: int, check: QualityCheck) -> None:
    folder = tempfile.gettempdir()
    free = disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"to check quality, what the original predicts for {check.chunks.numel()} tokens has to wait, of which "
            f"{need} bytes in files in {folder}, where {free} are free: check with fewer or shorter chunks, or set "
            "TMPDIR to a larger disk"
        )
