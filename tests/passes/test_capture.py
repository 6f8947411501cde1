import copy
import dataclasses
import gc
import linecache
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.calibration.batches import as_batch
from gptq_ao.errors import CalibrationError, CaptureError
from gptq_ao.passes.capture import calibration_mode, capture

from ..models import seeded, tiny_llama, token_batches


def snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    """Everything of the modules that a capture could leave changed, by identity."""
    rows: list[tuple[object, ...]] = []
    for name, m in model.named_modules():
        own = {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_") and k != "training"}
        tensors = {k: id(v) for table in (m._parameters, m._buffers) for k, v in table.items()}
        rows.append((name, m.training, own, tensors))
    return rows


def test_every_tensor_is_a_placeholder_with_its_name_in_the_model() -> None:
    model = tiny_llama()
    program = capture(model, as_batch(token_batches()[0]))
    named = dict(model.named_parameters())
    assert set(program.parameters.values()) == set(named)
    for placeholder, name in program.parameters.items():
        assert program.placeholders[placeholder].meta["val"].shape == named[name].shape
    assert set(program.buffers.values()) <= {n for n, _ in model.named_buffers()}
    assert program.inputs == ("input_ids",)
    assert not any(n.op == "get_attr" for n in program.graph.nodes)


def test_batch_and_length_stay_free() -> None:
    program = capture(tiny_llama(), as_batch({"input_ids": torch.zeros(1, 9, dtype=torch.long)}))
    for shape in ((1, 9), (3, 9), (2, 31)):
        bound = program.bind(as_batch({"input_ids": torch.zeros(*shape, dtype=torch.long)}), "batch")
        assert bound["input_ids"].shape == shape


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before, cache = snapshot(model), model.config.use_cache
    fast_path, rng = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    capture(model, as_batch(token_batches()[0]))
    assert snapshot(model) == before
    assert model.config.use_cache is cache
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.equal(torch.get_rng_state(), rng)
    assert "forward" not in vars(model)
    assert torch.is_grad_enabled()


class Remembers(nn.Module):
    """Stores a tensor on itself in its forward, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


def test_tensors_that_a_forward_stores_are_taken_back() -> None:
    model = Remembers()
    capture(model, as_batch(torch.ones(2, 8)))
    assert model.last is None


def test_state_is_restored_when_the_capture_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such branch")

    model = Fails()
    before = snapshot(model)
    assert gc.isenabled()
    message = r"(?s)could not capture the model.*test_capture.py:\d+, in forward\n +raise KeyError.*First check.*no"
    with pytest.raises(CaptureError, match=message):
        capture(model, as_batch(torch.ones(2, 4)))
    assert snapshot(model) == before
    assert model.training
    assert gc.isenabled()


def test_collection_of_garbage_stays_off_if_the_user_has_turned_it_off() -> None:
    gc.disable()
    try:
        capture(nn.Linear(8, 8), as_batch(torch.ones(2, 8)))
        assert not gc.isenabled()
    finally:
        gc.enable()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Branches(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x  # deepest line of the model


class Loops(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        hit = (y > 0).nonzero()
        for row in hit:
            y = y + row.sum()
        return y


class Items(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[: int(x.max().item())]


class LeavesTorch(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.from_numpy(x.numpy() * 2))


class Positions(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.get_rope_index(x)

    def get_rope_index(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.tolist()[0][0] > 0 else x


class FlashAttention(Linear):
    def forward(self, x: Tensor) -> Tensor:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found]

        return flash_attn_func(self.linear(x))


LIBRARY = torch.library.Library("gptq_ao_test_capture", "DEF")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", lambda x: x * 2, "CPU")


class Opaque(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptq_ao_test_capture.opaque(self.linear(x))


class Unknown:
    __slots__ = ("x",)


class ReturnsUnknown(Linear):
    def forward(self, x: Tensor) -> Unknown:
        out = Unknown()
        out.x = self.linear(x)  # type: ignore[attr-defined]
        return out


class TwoInputs(Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) * mask


@pytest.mark.parametrize(
    ("model", "line", "message"),
    [
        (Branches(), "return self.linear(x) if x.sum() > 0", "branches on, .* values .*torch.where"),
        (Loops(), "for row in hit", "the elements that the data selects.*for all elements"),
        (Items(), "int(x.max().item())", "sizes a tensor by, the values .*sizes from shapes"),
        (LeavesTorch(), "torch.from_numpy", r"outside torch .*custom_op"),
        (Positions(), "x.tolist()", "looping over the token ids.*put position_ids into every batch"),
        (FlashAttention(), "from flash_attn import", "flash attention .*attn_implementation='sdpa'"),
        (Opaque(), "gptq_ao_test_capture.opaque", "no implementation for tensors without data.*register_fake"),
        (ReturnsUnknown(), "", "a type that torch.export does not know.*tuples, lists or dicts, and return"),
        (TwoInputs(), "", "does not fit the model's signature.*It said: TypeError: .*'mask'"),
    ],
)
def test_what_cannot_be_captured(model: nn.Module, line: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(model)
    with pytest.raises(CaptureError, match=f"(?s)could not capture the model: .*{message}") as raised:
        capture(model, as_batch(torch.ones(3, 4)))
    where = re.search(r"at (.*):(\d+), in \w+\n(.*)\n", str(raised.value))
    assert bool(where) == bool(line)
    if where:
        assert where[1] == __file__
        assert line in where[3]
        assert line in linecache.getline(__file__, int(where[2]))
    assert snapshot(model) == before
    assert "def forward" not in capfd.readouterr().err  # torch prints the graph it had until then


def test_lazy_parameters_are_named() -> None:
    with pytest.raises(CaptureError, match=r"'weight' is lazy and has no shape yet: run the model once"):
        capture(nn.LazyLinear(4), as_batch(torch.ones(2, 4)))


def test_inputs_of_unknown_types() -> None:
    with pytest.raises(CaptureError, match=r"a type that torch.export does not know"):
        capture(TwoInputs(), as_batch((torch.ones(2, 4), object())))


def test_in_place_operations_become_functional() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y += 1
            return y.relu_()

    program = capture(InPlace(), as_batch(torch.ones(2, 4)))
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in program.graph.nodes)


def test_outputs_of_an_unknown_dataclass() -> None:
    @dataclasses.dataclass
    class Out:
        value: Tensor

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Out:
            return Out(self.linear(x))

    program = capture(Wraps(), as_batch(torch.ones(2, 4)))
    assert len(program.inputs) == 1


def test_a_distribution_as_output() -> None:
    """Of a policy that squashes its actions. The checks of a distribution's parameters, which read values, are off."""
    from torch.distributions import Distribution, Independent, Normal, TanhTransform, TransformedDistribution

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            actions = Normal(self.linear(x), self.scale(x).exp())
            return TransformedDistribution(Independent(actions, 1), [TanhTransform()])

    before = Distribution._validate_args
    program = capture(Policy(), as_batch(torch.ones(2, 4)))
    assert Distribution._validate_args is before
    (output,) = program.graph.find_nodes(op="output")
    assert sum(str(n.target) == "aten.linear.default" for n in program.graph.nodes) == 2
    tensors = [n for n in output.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    assert len(tensors) == 2  # loc and scale; the others are sizes


def test_calibration_mode_restores_when_the_body_raises() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.Dropout())).train()

    def body() -> None:
        with calibration_mode(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        body()
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": torch.zeros(2, 9, dtype=torch.long)}, r"batch 3 has the inputs \['ids'\], .* with \['input_ids'\]"),
        ({"input_ids": (torch.zeros(2, 9),)}, r"batch 3 has the structure"),
        ({"input_ids": torch.zeros(2, 9, 1, dtype=torch.long)}, r"'input_ids' is torch.int64 \(2, 9, 1\)"),
        ({"input_ids": torch.zeros(2, 9)}, r"'input_ids' is torch.float32 \(2, 9\).*captured with torch.int64"),
    ],
)
def test_a_batch_of_another_structure(batch: dict[str, object], message: str) -> None:
    program = capture(tiny_llama(layers=1), as_batch(token_batches()[0]))
    with pytest.raises(CalibrationError, match=message):
        program.bind(as_batch(batch), "batch 3")


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


def test_a_size_that_the_model_fixes() -> None:
    program = capture(FixedLength(), as_batch((torch.ones(2, 6), 2.0)))
    program.bind(as_batch((torch.ones(5, 6), 2.0)), "batch 1")
    with pytest.raises(CalibrationError, match=r"batch 1: input .* has 12 elements along axis 1; .* at capture, to 6"):
        program.bind(as_batch((torch.ones(5, 12), 2.0)), "batch 1")


def test_sizes_of_images_are_free_only_if_batches_differ_in_them() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2)))
    small, large = (as_batch(torch.ones(2, 3, n, 12)) for n in (12, 20))
    program = capture(model, small, others=[small])
    program.bind(as_batch(torch.ones(5, 3, 12, 12)), "batch 1")
    with pytest.raises(CalibrationError, match=r"batch 1: input 'arg0' has 20 elements along axis 2; .* to 12"):
        program.bind(large, "batch 1")
    program = capture(model, small, others=[small, large])
    program.bind(large, "batch 1")
    with pytest.raises(CalibrationError, match=r"batch 1: input 'arg0' has 20 elements along axis 3; .* to 12"):
        program.bind(as_batch(torch.ones(2, 3, 12, 20)), "batch 1")


def test_a_literal_that_differs() -> None:
    program = capture(FixedLength(), as_batch((torch.ones(2, 6), 2.0)))
    with pytest.raises(CalibrationError, match=r"input 1 is 3.0, the model was captured with 2.0"):
        program.bind(as_batch((torch.ones(2, 6), 3.0)), "batch 1")


class Branching(nn.Module):
    """Valid for lengths above 5 that are multiples of 4; the second input is as long as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * 2 if x.shape[1] % 4 == 0 else x
        x = x + 1 if x.shape[1] > 5 else x
        return self.linear(x) * mask[..., None]


def sized(rows: int, length: int, mask: int | None = None) -> Any:
    return as_batch({"x": torch.ones(rows, length, 6), "mask": torch.ones(rows, mask or length)})


def test_sizes_for_which_the_model_takes_another_branch() -> None:
    program = capture(Branching(), sized(2, 12))
    for rows, length in ((2, 12), (1, 8), (7, 400)):
        program.bind(sized(rows, length), "batch 1")
    with pytest.raises(
        CalibrationError, match=r"batch 1: with x.shape\[1\] = 10 the model takes another path .* Eq\(Mod"
    ):
        program.bind(sized(2, 10), "batch 1")
    with pytest.raises(CalibrationError, match=r"batch 1: input 'x' has 4 elements along axis 1; .* to at least 6 "):
        program.bind(sized(2, 4), "batch 1")
    with pytest.raises(
        CalibrationError, match=r"batch 1: input 'mask' has 8 .* axis 1, but .* x.shape\[1\] = 12 there"
    ):
        program.bind(sized(2, 12, mask=8), "batch 1")


def test_one_row_is_an_exception_only_where_any_number_will_do() -> None:
    class Pairs(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (2 if x.shape[0] % 2 == 0 else 1)

    program = capture(Pairs(), as_batch(torch.ones(4, 4)))
    program.bind(as_batch(torch.ones(2, 4)), "batch 0")
    with pytest.raises(CalibrationError, match=r"with arg0.shape\[0\] = 1 the model takes another path"):
        program.bind(as_batch(torch.ones(1, 4)), "batch 0")


class Grid(nn.Module):
    """Loops over the values of an integer input, as vision models do over the sizes of images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        ends = (grid[:, 0] * grid[:, 1]).cumsum(0)
        order = torch.arange(int(ends[-1])).flip(0)
        pieces = pixels[order].split([int(n) for n in (grid[:, 0] * grid[:, 1]).tolist()])
        return torch.cat([self.linear(p) * len(p) for p in pieces])


def test_values_that_the_model_needs_for_its_sizes() -> None:
    model, grid = seeded(Grid()), torch.tensor([[2, 3], [1, 4]])
    pixels = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 7, dtype=torch.long)  # the largest integer input stays free

    class WithIds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid = model

        def forward(self, ids: Tensor, pixels: Tensor, grid: Tensor) -> Tensor:
            return self.grid(pixels, grid) + ids.sum()

    program = capture(WithIds(), as_batch({"ids": ids, "pixels": pixels, "grid": grid}))
    assert [n for n in program.inputs if n] == ["ids", "pixels"]
    assert len([n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]) == 2
    bound = program.bind(as_batch({"ids": ids + 1, "pixels": pixels, "grid": grid.clone()}), "batch 1")
    values = {**bound, **program.constants, **{p: model.get_parameter(n[5:]) for p, n in program.parameters.items()}}
    with torch.no_grad():
        (got,) = program.module(*(values[n] for n in program.placeholders))
        assert torch.equal(got, model(pixels, grid) + 7)
    with pytest.raises(
        CalibrationError, match=r"(?s)batch 1: input 2 is tensor\(.*fixed in the graph. Give every batch that"
    ):
        program.bind(as_batch({"ids": ids, "pixels": pixels, "grid": grid.flip(0)}), "batch 1")


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_weights_that_hooks_would_load(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    batch = as_batch(token_batches()[0])
    plain = capture(tiny_llama(tied=True), batch)
    model, cpu = tiny_llama(tied=True), torch.device("cpu")
    want = model(**token_batches()[0]).logits
    if kind == "cpu":
        accelerate.cpu_offload(model, cpu, offload_buffers=True)
    else:
        accelerate.disk_offload(model, str(tmp_path), cpu)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    before = snapshot(model)

    program = capture(model, batch)
    assert str(program.graph) == str(plain.graph)
    assert program.parameters == plain.parameters  # ties too
    assert {n.meta["val"].device for n in program.placeholders.values()} == {cpu}
    assert snapshot(model) == before
    assert torch.equal(model(**token_batches()[0]).logits, want)


def test_everything_is_on_the_device_that_will_run_it() -> None:
    class Constant(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.offsets = torch.arange(4.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.offsets + torch.arange(4, device=x.device)

    model = Constant()
    program = capture(model, as_batch(torch.ones(2, 4)), device="meta")
    assert {n.meta["val"].device.type for n in program.graph.nodes if n.op != "output"} == {"meta"}
    assert model.offsets.device.type == model.linear.weight.device.type == "cpu"


def test_weights_larger_than_any_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 1 << 20))  # 4 TiB each
    program = capture(model, as_batch(torch.ones(2, 1 << 20)))
    assert program.placeholders["p_1_weight"].meta["val"].shape == (1 << 20, 1 << 20)


def test_calibration_mode_settings_of_transformers() -> None:
    from transformers import Gemma3Config, MixtralConfig

    model: Any = nn.Module()
    model.moe, model.vision = nn.Module(), nn.Module()
    model.moe.config, model.vision.config = MixtralConfig(experts_implementation="eager"), Gemma3Config()
    text, vision = model.vision.config.text_config, model.vision.config.vision_config
    model.moe.config._attn_implementation_internal = "flex_attention"
    text._attn_implementation_internal, vision._attn_implementation_internal = "flash_attention_2", "eager"
    configs = [model.moe.config, model.vision.config, text, vision]
    before = [copy.deepcopy(vars(c)) for c in configs]
    with calibration_mode(model):
        assert model.moe.config._experts_implementation == "grouped_mm"
        assert [model.moe.config._attn_implementation, text._attn_implementation] == ["sdpa", "sdpa"]
        assert vision._attn_implementation == "eager"
        assert not text.use_cache
    for config, attributes in zip(configs, before, strict=True):
        assert {k: v for k, v in vars(config).items() if "config" not in k} == {
            k: v for k, v in attributes.items() if "config" not in k
        }


def test_experts_are_one_product() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4, vocab_size=96)
    model = seeded(MixtralForCausalLM._from_config(config, experts_implementation="eager"))
    batch = token_batches()[0]
    program = capture(model, as_batch(batch))
    assert sum("grouped_mm" in str(n.target) for n in program.graph.nodes) == 2
    assert model.config._experts_implementation == "eager"
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {**program.parameters, **program.buffers}
    arguments = [batch[n] if n in batch else state[names[n]] for n in program.placeholders]
    with torch.no_grad(), calibration_mode(model):
        assert torch.equal(program.module(*arguments)[0], model(**batch).logits)


def test_the_graph_does_what_eager_does_where_an_export_would_differ() -> None:
    """The gated delta rule solves a triangular system; transformers exports a loop over the positions instead."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next as file

    sizes = {f"linear_{n}": 2 for n in ("num_key_heads", "num_value_heads", "conv_kernel_dim")}
    widths = {"hidden_size": 32, "intermediate_size": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = Qwen3NextConfig(**sizes, **widths, num_hidden_layers=1, mlp_only_layers=[0], vocab_size=96)
    model = seeded(file.Qwen3NextForCausalLM(config))
    asked = file.is_torchdynamo_exporting
    program = capture(model, as_batch(token_batches()[0]))
    assert file.is_torchdynamo_exporting is asked
    assert sum("solve_triangular" in str(n.target) for n in program.graph.nodes) == 2


def test_a_rotary_table_that_grows_with_the_sequence() -> None:
    from transformers import LlamaForCausalLM

    config = tiny_llama(layers=1).config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(config).eval()
    program = capture(model, as_batch(token_batches()[0]))
    assert model.model.rotary_emb.rope_type == "dynamic"
    program.bind(as_batch(token_batches(length=128)[0]), "batch 2")
    with pytest.raises(CalibrationError, match=r"batch 2: .* has 129 elements along axis 1; .* to at most 128 "):
        program.bind(as_batch(token_batches(length=129)[0]), "batch 2")
    with pytest.raises(CaptureError, match=r"(?s)its rotary table changes with the length.*no longer than"):
        capture(model, as_batch(token_batches(length=129)[0]))


def test_a_vision_language_model() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": 96, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    vision |= {"window_size": 56, "fullatt_block_indexes": []}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    model = seeded(Qwen2_5_VLForConditionalGeneration(config))
    ids = torch.tensor([[5, 92, *[90] * 16, 93], [6, 92, *[90] * 8, 93, *[7] * 8]])
    batch: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 90).long(),
        "pixel_values": torch.randn(96, 1176, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]]),
    }
    positions, _ = model.model.get_rope_index(ids, batch["mm_token_type_ids"], batch["image_grid_thw"])
    batch["position_ids"] = positions
    program = capture(model, as_batch(batch))
    assert list(program.literals.values()) == [batch["image_grid_thw"]]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {**program.parameters, **program.buffers}
    known = {**program.bind(as_batch(batch), "the batch"), **program.constants}
    arguments = [known[n] if n in known else state[names[n]] for n in program.placeholders]
    with torch.no_grad(), calibration_mode(model):
        assert torch.equal(program.module(*arguments)[0], model(**batch).logits)


@pytest.mark.parametrize("what", ["capture", "plan", "quantize_"])
def test_a_model_is_freed_with_its_last_reference(what: str) -> None:
    """torch.export leaves objects that refer to each other and to the model: without them it need not wait until Python
    looks for garbage, which with gigabytes on a GPU is too late."""
    model, batches = tiny_llama(), token_batches()
    alive, often = weakref.ref(model), gc.get_threshold()
    gc.set_threshold(10**9)  # Python itself does not look
    try:
        if what == "capture":
            capture(model, as_batch(batches[0]))
        elif what == "plan":
            plan(model, gptq_config(4, 32, calibration=batches))
        else:
            quantize_(model, gptq_config(4, 32, calibration=batches))
        del model
        assert alive() is None
    finally:
        gc.set_threshold(*often)
