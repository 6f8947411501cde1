"""What several tests need."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def loaders() -> Iterator[None]:
    """Who loads which checkpoints in transformers is, afterwards, as it was."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from gptq_ao.integrations.hf_quantizer import GptqAoQuantizer
    from gptq_ao.integrations.transformers import load_with_gptq_ao, load_with_transformers

    before = {m: AUTO_QUANTIZER_MAPPING[m] for m in ("gptq", "compressed-tensors")}
    yield
    for method, quantizer in before.items():
        (load_with_gptq_ao if quantizer is GptqAoQuantizer else load_with_transformers)(method)
