"""What several tests need."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def loaders() -> Iterator[None]:
    """Who loads which checkpoints in transformers is, afterwards, as it was."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from gptq_ao.integrations.hf_quantizer import GptqAoQuantizer
    from gptq_ao.integrations.transformers import load_with_gptq_ao, load_with_transformers

    before = {m: AUTO_QUANTIZER_MAPPING[m] for m in ("gptq", "compressed-tensors", "awq")}
    yield
    for method, quantizer in before.items():
        (load_with_gptq_ao if quantizer is GptqAoQuantizer else load_with_transformers)(method)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Column by column there is too little to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_process() -> Iterator[None]:
    """torch.distributed, with this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
