import pytest
import torch
from torch import nn

from gptq_ao.errors import PassError
from gptq_ao.model.weights import replace_parameter


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.again = self.a


def test_all_names_lead_to_the_new_parameter() -> None:
    model = Shared()
    bias = model.a.bias
    new = torch.ones(4, 4)
    assert set(replace_parameter(model, "a.weight", new)) == {"a.weight", "b.weight", "again.weight"}
    assert model.a.weight is model.b.weight is model.again.weight
    assert torch.equal(model.a.weight, new)
    assert not model.a.weight.requires_grad
    assert model.a.bias is bias


def test_a_value_of_another_shape_or_dtype_is_a_defect() -> None:
    with pytest.raises(PassError, match=r"a.weight: torch.float32 \(4, 4\) became torch.float32 \(4, 5\)"):
        replace_parameter(Shared(), "a.weight", torch.ones(4, 5))
    with pytest.raises(PassError, match="became torch"):
        replace_parameter(Shared(), "a.weight", torch.ones(4, 4, dtype=torch.float64))
