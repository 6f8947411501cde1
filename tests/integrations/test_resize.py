"""`resize_token_embeddings` of a model whose head is quantized."""

import pytest
import torch

from gptq_ao import gptq_config, quantize_

from ..models import tiny_llama, token_batches


@pytest.mark.filterwarnings("ignore:The new (embeddings|lm_head)")  # transformers' own
def test_the_head_becomes_dense_and_says_so() -> None:
    model, ids = tiny_llama(), token_batches(1)[0]["input_ids"]
    quantize_(model, gptq_config(4, 32, method="rtn", rules={"lm_head": {"bits": 8}}))
    head, expected = model.lm_head.weight.dequantize(), model(ids).logits
    with pytest.warns(UserWarning, match=r"Int8GroupTensor\(.* are copied into a dense tensor: if that takes"):
        model.resize_token_embeddings(len(head) + 8)
    assert torch.equal(model.lm_head.weight[: len(head)], head)
    assert torch.allclose(model(ids).logits[..., : len(head)], expected, atol=1e-5)
