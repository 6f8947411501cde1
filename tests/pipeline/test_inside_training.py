"""quantize_ where training code has been: the same codes as of the plain model, or an error before anything changes."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import gptq_ao
from gptq_ao import GPTQConfig, gptq_config, load_quantized, plan, quantize_, save_quantized
from gptq_ao.errors import CheckpointError, ConfigError, TrainingWarning
from gptq_ao.evaluate import evaluate
from gptq_ao.tensor import GroupTensor
from tests.ranks import some

from ..models import tiny_llama, token_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP is now backed by:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*`NO_SHARD` sharding:FutureWarning"),
    # Its new name is not known to the oldest transformers that works.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    # PEFT asks transformers for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def config(method: str = "gptq", **settings: Any) -> GPTQConfig:
    if method == "rtn":
        return gptq_config(bits=4, group_size=32, method="rtn", **settings)
    return gptq_config(bits=4, group_size=32, effort="fast", calibration=token_batches(2), **settings)


def codes(model: nn.Module) -> list[Tensor]:
    weights = [p for p in model.parameters() if isinstance(p, GroupTensor)]
    return [t for w in weights for t in (w.qdata, w.scale_zero)]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    """Of the plain model, by method."""
    found = {}
    for method in ("gptq", "rtn"):
        model = tiny_llama(layers=1)
        quantize_(model, config(method))
        found[method] = codes(model)
    return found


def layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return wrapped


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model.train()


def with_dropout(model: Any) -> Any:
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model.train()


def prepared(model: Any) -> Any:
    """Under accelerate's mixed precision, which replaces `forward`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


class _FabricModule(nn.Module):
    """What `Fabric.setup` of Lightning returns: the model, under another name, and a forward of its own precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = model, model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self._forward_module(*args, **kwargs)


def eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: Any) -> Any:
    module.compile(backend="eager")
    return module


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": eager,
    "compiled layers": layers(eager),
    "layers compiled in place": layers(compiled_in_place),
    "checkpoint_wrapper": layers(checkpoint_wrapper),
    "offload_wrapper": layers(offload_wrapper),
    "compiled checkpoint_wrapper": layers(lambda m: eager(checkpoint_wrapper(m))),
    "gradient checkpointing": checkpointed,
    "dropout": with_dropout,
    "DataParallel": DataParallel,
    "accelerate": prepared,
    "Fabric": _FabricModule,
}
MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("method", some(["rtn", "gptq"]))
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_gets_the_codes_of_the_plain_one(
    wrapper: str, method: str, expected: dict[str, list[Tensor]], tmp_path: Path
) -> None:
    model = WRAPPERS[wrapper](tiny_llama(layers=1))
    planned = {w.name for w in plan(model, config("rtn")).weights}
    before = [type(m) for m in model.modules()]
    training = [m.training for m in model.modules()]
    # The rule has the name that the weight has in the plain model.
    only = config(method, rules={"model.layers.0.mlp.up_proj.weight": {"bits": 4}})
    report: Any = quantize_(model, only)
    assert {w.name for w in report.weights} == {n for n, p in tiny_llama(layers=1).named_parameters() if "proj" in n}
    assert planned == {w.name for w in report.weights}
    assert all(map(torch.equal, codes(model), expected[method]))
    assert len(codes(model)) == len(expected[method])
    assert report.capture == ("none" if method == "rtn" else "export")
    assert [type(m) for m in model.modules()] == before
    assert [m.training for m in model.modules()] == training
    save_quantized(model, tmp_path / "a")
    assert all(map(torch.equal, codes(load_quantized(tmp_path / "a")), expected[method]))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("mode", MODES)
def test_in_any_mode_the_codes_are_the_same_and_gradients_go_through(
    mode: str, method: str, expected: dict[str, list[Tensor]]
) -> None:
    model, ids = tiny_llama(layers=1), token_batches(1)[0]["input_ids"]
    perplexity = evaluate(model, ids).perplexity
    with MODES[mode]():
        assert evaluate(model, ids).perplexity == perplexity
        assert len(plan(model, config("rtn")).weights) == 7
        quantize_(model, config(method))
        assert torch.is_autocast_enabled("cpu") == (mode == "autocast")
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
    assert all(map(torch.equal, codes(model), expected[method]))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def fsdp1(model: Any, **settings: Any) -> Any:
    return FullyShardedDataParallel(model, None, ShardingStrategy.NO_SHARD, device_id=torch.device("cpu"), **settings)


def fsdp2(module: Any) -> Any:
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


def tensor_parallel(model: Any) -> Any:
    parallelize_module(model.model.layers[0], init_device_mesh("cpu", (1,)), {"mlp.up_proj": ColwiseParallel()})
    return model


def zero_3(model: Any) -> Any:
    """As DeepSpeed leaves it."""
    for p in model.parameters():
        p.ds_tensor, p.data = p.data, torch.empty(0)
    return model


SHARDED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "FSDP2": (fsdp2, "the model is a FSDPLlamaForCausalLM, of which each process has a part"),
    "FSDP2 of layers": (layers(fsdp2), r"'model\.layers\.0' is a FSDPLlamaDecoderLayer, of which"),
    "FSDP1": (fsdp1, "the model is a FullyShardedDataParallel, of which"),
    "FSDP1 with original parameters": (lambda m: fsdp1(m, use_orig_params=True), "is a FullyShardedDataParallel, of"),
    "tensor parallel": (tensor_parallel, r"'model\.layers\.0\.mlp\.up_proj\.weight' is a DTensor, of which"),
    "compiled FSDP2": (lambda m: eager(fsdp2(m)), "is a FSDPLlamaForCausalLM, of which"),
    "ZeRO-3": (zero_3, r"'model\.embed_tokens\.weight' is a parameter of ZeRO-3, of which"),
    "replicate": (replicate, "the model is a DDPLlamaForCausalLM, made by `replicate`, which keeps the parameters"),
}


@pytest.mark.parametrize("kind", SHARDED)
def test_what_is_sharded_is_refused_before_anything_changes(kind: str, tmp_path: Path, one_process: None) -> None:
    shard, found = SHARDED[kind]
    model = shard(tiny_llama(layers=1))
    before = {n: id(p) for n, p in model.named_parameters()}
    message = f"{found}.*Quantize the model first, then prepare it for several processes"
    for method in ("gptq", "rtn"):
        with pytest.raises(ConfigError, match=message):
            quantize_(model, config(method))
        with pytest.raises(ConfigError, match=message):
            plan(model, config(method))
    with pytest.raises(ConfigError, match=message):
        torchao.quantization.quantize_(model, config(), filter_fn=gptq_ao.whole_model)
    with pytest.raises(CheckpointError, match=f"{found}.*gather the values first"):
        save_quantized(model, tmp_path / "a")
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert codes(model) == []


@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1", "FSDP1 with original parameters", "tensor parallel", "ZeRO-3"])
def test_torchao_hands_over_a_layer_of_what_is_sharded(kind: str, one_process: None) -> None:
    """Layer by layer, only the layer's own parameters tell."""
    model = SHARDED[kind][0](tiny_llama(layers=1))
    message = "no parameter but computed from others" if kind == "FSDP1" else "of which each process has a part"
    with pytest.raises(ConfigError, match=f"^'weight' .*{message}"):
        torchao.quantization.quantize_(model, config("rtn"), filter_fn=lambda m, name: "layers.0.mlp.up" in name)
    assert codes(model) == []


def test_evaluating_a_sharded_model(one_process: None) -> None:
    ids, plain = token_batches(1)[0]["input_ids"], tiny_llama(layers=1)
    for shard in (fsdp2, layers(fsdp2), tensor_parallel):
        assert evaluate(shard(tiny_llama(layers=1)), ids, reference=plain) == evaluate(plain, ids, reference=plain)


def test_a_weight_that_is_computed_from_others_is_left_as_it_is() -> None:
    model = tiny_llama(layers=1)
    weight_norm(model.model.layers[0].mlp.up_proj)
    for method in ("gptq", "rtn"):
        done = {w.name for w in plan(model, config(method)).weights}
        assert len(done) == 6
        assert not any("layers.0.mlp.up_proj" in name for name in done)
    report: Any = quantize_(model, config("rtn"))
    assert "model.layers.0.mlp.up_proj.parametrizations.weight.original1" in report.excluded
    with pytest.raises(ConfigError, match=r"'weight' of a ParametrizedLinear .*remove_parametrizations"):
        torchao.quantization.quantize_(model, config("rtn"), filter_fn=lambda m, name: "layers.0.mlp.up" in name)


def optimizer(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters())


def prepared_optimizer(model: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters()))


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "AdamW had been given 7 parameters": optimizer,
    "AcceleratedOptimizer and SGD had been given 7 parameters": prepared_optimizer,
    "DistributedDataParallel had been given 7 parameters": DistributedDataParallel,
    "Adagrad had been given 1 parameters": lambda m: torch.optim.Adagrad([m.model.layers[0].mlp.up_proj.weight]),
}


@pytest.mark.parametrize("method", some(["rtn", "gptq"]))
@pytest.mark.parametrize("message", HOLDERS)
def test_whoever_holds_replaced_parameters_is_named(message: str, method: str, one_process: None) -> None:
    model = tiny_llama(layers=1)
    holder = HOLDERS[message](model)
    with pytest.warns(TrainingWarning, match=f"{message} .* such as .*_proj.*then build the optimizer") as caught:
        report: Any = quantize_(model, config(method))
    assert caught[0].filename == __file__
    # What there is so little of here is said last.
    assert [w for w in report.warnings if not w.startswith("calibration data")] == [str(caught[0].message)]
    assert "had been given" in str(report)
    del holder


def test_no_word_of_an_optimizer_that_trains_what_it_did() -> None:
    """One of adapters; one of what is not quantized; one of a frozen model; one that is gone."""
    adapted = get_peft_model(tiny_llama(layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    gone = optimizer(adapted)
    kept = [
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad]),
        optimizer(adapted.requires_grad_(False)),
    ]
    del gone
    gc.collect()
    quantize_(adapted, config("rtn", rules={"re:.*lora_.*": None}))
    model = tiny_llama(layers=1)
    kept.append(torch.optim.SGD([model.model.norm.weight]))
    quantize_(model, config("rtn"))
    assert len(kept) == 3


@pytest.fixture
def two_processes() -> Iterator[None]:
    """The other one is not there: a message to it would be lost, and none may be needed."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_ranks_that_calibrate_apart_are_told(expected: dict[str, list[Tensor]], two_processes: None) -> None:
    model = tiny_llama(layers=1)
    with pytest.warns(
        TrainingWarning, match="has 2 processes, and each .* distributed=True .* load that on all"
    ) as caught:
        report: Any = quantize_(model, config())
    assert caught[0].filename == __file__
    # What there is so little of here is said last.
    assert [w for w in report.warnings if not w.startswith("calibration data")] == [str(caught[0].message)]
    assert all(map(torch.equal, codes(model), expected["gptq"]))
    quantize_(tiny_llama(layers=1), config("rtn"))  # the same everywhere


def test_one_process_of_torch_distributed_is_as_none(one_process: None) -> None:
    quantize_(tiny_llama(layers=1), config())


def test_the_second_stage_of_a_recipe() -> None:
    model = tiny_llama(layers=1)
    quantize_(model, config(rules={"re:.*mlp.*": None}))
    before = codes(model)
    message = (
        "already quantized: 4 of its weights, such as 'model.layers.0.self_attn.q_proj.weight' .* or leave these out"
    )
    with pytest.raises(ConfigError, match=message):
        quantize_(model, config("rtn"))
    quantize_(model, config("rtn", rules={"re:.*self_attn.*": None}))
    assert len(codes(model)) == 14
    assert all(any(t is b for t in codes(model)) for b in before)
