"""Every causal language model of transformers."""

from functools import partial
from typing import Any

import torch
from torch import nn

from .entry import Entry
from .tiny import FIRST_SPECIAL, seeded_model, tiny_config

__all__ = ["causal_lm_entries", "causal_lm_of"]


def causal_lm_entries() -> list[Entry]:
    """One per configuration class of transformers' own mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    classes = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING.keys()), key=lambda c: c.__name__.lower())
    return [Entry(c.__name__, "causal language models", partial(causal_lm_of, c)) for c in classes]


def causal_lm_of(config_class: Any) -> tuple[nn.Module, list[Any]]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model = seeded_model(model_class, tiny_config(config_class))
    return model, token_batches()


def token_batches(count: int = 3, rows: int = 2, length: int = 32) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, FIRST_SPECIAL, (rows, length), generator=g)} for _ in range(count)]
