import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao.errors import CalibrationError
from gptq_ao.evaluate import evaluate

from .models import tiny_llama


class Fixed(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


def test_perplexity_and_kl_by_hand() -> None:
    p, q = Fixed([0.5, 0.25, 0.25]), Fixed([0.2, 0.3, 0.5])
    chunks = torch.tensor([[2, 0, 1], [1, 0, 0], [0, 0, 2]])
    result = evaluate(p, chunks, q, batch_size=2)
    # Scored: 0 1, 0 0, 0 2: four zeros, one 1, one 2; the first token of a chunk is not.
    assert result.tokens == 6
    assert result.perplexity == pytest.approx(math.exp(-(4 * math.log(0.5) + 2 * math.log(0.25)) / 6), rel=1e-6)
    kl = sum(
        b * math.log(b / a) for a, b in zip([0.5, 0.25, 0.25], [0.2, 0.3, 0.5], strict=True)
    )  # KL(reference ‖ model)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert evaluate(p, chunks).kl is None


def test_models_are_left_as_they_were() -> None:
    model: Any = tiny_llama(layers=1).train()
    model.model.norm.eval()
    evaluate(model, torch.ones(2, 5, dtype=torch.long), model)
    assert model.training
    assert not model.model.norm.training
    assert model.config.use_cache is True


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (4,)])
def test_nothing_to_predict(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"nothing to predict"):
        evaluate(Fixed([1.0]), torch.zeros(shape, dtype=torch.long))
