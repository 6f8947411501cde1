"""Models that are sharded over processes are quantized as they are: to the codes of the whole model, in the parts that
they were in, ready to run, to train and to be saved."""

import copy
import re
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.errors import RankError
from gptq_ao.tensor import GroupTensor
from tests.models import seeded, tiny_llama, token_batches
from tests.ranks import device, on_ranks, outcomes, some


class Experts(nn.Module):
    """Matrices in a stack, a convolution, a bias, and a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(128, 128, 3, padding=1)
        self.up = nn.Parameter(torch.empty(4, 128, 256))
        self.out = nn.Linear(256, 32)
        self.register_buffer("shift", torch.ones(128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x + self.shift).mT).mT.flatten(0, 1)
        return self.out(torch.relu(torch.bmm(x.expand(4, -1, -1), self.up)).sum(0))


class Stack(Experts):
    """The stack as [experts, out_features, in_features], which FSDP2 can cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(4, 256, 128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x + self.shift).mT).mT.flatten(0, 1)
        return self.out(torch.relu(torch.bmm(x.expand(4, -1, -1), self.up.mT)).sum(0))


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_llama(width=128, layers=2, dtype=dtype).to(device())


def tied() -> Any:
    """The head and the embeddings, which stay as they are, and two layers' projections."""
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    return model


def mixture() -> Any:
    """Its experts' gates and ups are one stack."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
    experts = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **experts, num_attention_heads=4, num_key_value_heads=2)
    return seeded(Qwen3MoeForCausalLM(config)).eval()


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def layers_of(model: Any) -> nn.ModuleList:
    return next(m.layers for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))


def fsdp(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def after_forward(model: Any, **options: Any) -> Any:
    """Then FSDP2 keeps some parameters whole, until a backward."""
    fsdp(model, **options)(ids())
    return model


def after_training(model: Any) -> Any:
    fsdp(model)
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return model


def checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = layers_of(model)
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1].compile(backend="aot_eager")
    return fsdp(model)


def grouped(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    fully_shard(list(layers_of(model)))
    return fully_shard([model.model.norm, model.lm_head]) and fully_shard(model)


def mesh(shape: tuple[int, ...], *names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device(), shape, mesh_dim_names=names)


def tensor_parallel(model: Any, on: Any = None) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in layers_of(model):
        plan: dict[str, Any] = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(layer, on or mesh((2,), "tp"), plan)
    return model


def both(model: Any) -> Any:
    """Each parameter on four ranks, or on the two of the first dimension alone."""
    both = mesh((2, 2), "dp", "tp")
    return fsdp(tensor_parallel(model, both["tp"]), mesh=both["dp"])


def with_options(name: str) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options: Any = {
        "stays gathered": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "hybrid": {"mesh": mesh((1, 2), "replicate", "shard")},
    }[name]
    return lambda model: after_forward(model, **options) if name == "stays gathered" else fsdp(model, **options)


def root_only(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def by_transformers(how: str) -> Any:
    """Loaded by transformers onto several processes."""

    def load(model: Any) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        given = {"tp_plan": "auto"} if how == "tp_plan" else {"distributed_config": DistributedConfig(**{how: 2})}
        with tempfile.TemporaryDirectory() as folder:
            place = [folder]
            torch.distributed.broadcast_object_list(place, 0)
            model.save_pretrained(place[0])  # which rank 0 writes
            torch.distributed.barrier()
            loaded = AutoModelForCausalLM.from_pretrained(place[0], **given)
            torch.distributed.barrier()
            return loaded

    return load


def stack_in_parts(dim: int) -> Any:
    """Of a stack, experts or rows or columns; of a convolution, output channels."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def shard(model: Any) -> Any:
        for module, name, along in ((model, "up", dim), (model.conv, "weight", 0)):
            value = distribute_tensor(module.get_parameter(name).detach(), mesh((2,), "ep"), [Shard(along)])
            setattr(module, name, nn.Parameter(value))
        return model

    return shard


def replicated(model: Any) -> Any:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model)


LLAMA: list[Any] = ["default", "after a forward", "after a backward", "checkpointed and compiled", "groups of modules"]
LLAMA += ["stays gathered", "offloaded", "mixed precision", "hybrid", "tied", "adapters inside", "root only", "bf16"]
LLAMA += [
    "tensor parallel",
    "replicated",
    "rounded",
    "adapters made",
    "act_order group",
    "target_bits",
    "a scale per row",
]
CASES = [
    *LLAMA,
    *(f"by transformers, {how}" for how in ("tp_plan", "tp_size", "fsdp_size", "mixture, tp_plan")),
    "two dimensions",
    "stack",
    *(f"{kind} in parts, {d}" for kind in ("stack", "transposed") for d in range(3)),
]


def case(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, how it is sharded, settings."""
    makes: dict[str, Any] = {"tied": tied, "bf16": lambda: llama(torch.bfloat16), "stack": Stack, "transposed": Experts}
    makes["by transformers, mixture, tp_plan"] = mixture
    makes["adapters inside"] = lambda: with_lora(llama())
    ways: dict[str, Any] = {
        "after a forward": after_forward,
        "after a backward": after_training,
        "checkpointed and compiled": checkpointed,
        "groups of modules": grouped,
        "root only": root_only,
        "tied": root_only,
        "a scale per row": tensor_parallel,
        "tensor parallel": tensor_parallel,
        "replicated": replicated,
        "two dimensions": both,
        "stack": root_only,
    }
    way = with_options(name) if name in ("stays gathered", "offloaded", "mixed precision", "hybrid") else ways.get(name)
    settings: dict[str, Any] = {
        "a scale per row": {"group_size": -1},
        "rounded": {"method": "rtn"},
        "adapters made": {"bits": 3, "adapter_rank": 2},
        "act_order group": {"act_order": "group", "effort": "default"},
        "target_bits": {"target_bits": 5.2, "candidates": (3, 4, 8)},
    }
    model = makes.get(name.split(" in parts")[0], llama)()
    if name.startswith("by transformers"):
        way = by_transformers(name.split()[-1])
    if " in parts" in name:
        way = stack_in_parts(int(name[-1]))
    return seeded(model).to(device()) if isinstance(model, Experts) else model, way or fsdp, settings.get(name, {})


def ids() -> Tensor:
    return token_batches(1)[0]["input_ids"].to(device())


def sample(model: Any) -> Tensor:
    if not isinstance(model, Experts):
        return ids()
    return torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0)).to(device())


def output(model: Any, x: Tensor) -> Tensor:
    found = model(x)
    value: Tensor = whole(getattr(found, "logits", found))
    return value.detach()


def config(model: Any, **settings: Any) -> Any:
    data = token_batches(3) if not isinstance(model, Experts) else [sample(model) * i for i in (1, 2, 3)]
    return gptq_config(**{"bits": 4, "group_size": 32, "effort": "fast", "calibration": data, **settings})


def whole(p: Any) -> Tensor:
    value: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return value


def local(p: Any) -> Tensor:
    part: Tensor = getattr(p, "_local_tensor", p)
    return part


def dense(t: Tensor) -> Tensor:
    return t.dequantize() if isinstance(t, GroupTensor) else t


def same(a: Any, b: Any) -> bool:
    """The same codes and scales, or values, wherever they are."""
    if not isinstance(b, GroupTensor):
        return not isinstance(a, GroupTensor) and torch.equal(a.cpu(), b.cpu())
    return a.spec == b.spec and all(torch.equal(t.cpu(), b.parts()[n].cpu()) for n, t in a.parts().items())


def told(report: Any) -> Any:
    # Notes are of where the model came from, too.
    return {k: v for k, v in report.to_dict().items() if k not in ("seconds", "peak_bytes", "notes")}


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def as_the_whole_model(name: str) -> None:
    model, shard, settings = case(name)
    expected = copy.deepcopy(model)
    model = shard(model)
    before = {n: getattr(p, "placements", None) for n, p in model.named_parameters()}
    report: Any = quantize_(expected, config(model, **settings), distributed=True)
    found: Any = quantize_(model, config(model, **settings), distributed=True)
    assert told(found) == told(report)
    if name == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        first, second = model.model.layers
        assert second.mlp.up_proj.weight is first.mlp.up_proj.weight
    for n, p in model.named_parameters():
        ours, theirs = whole(p), expected.get_parameter(plain(n))
        assert isinstance(local(p), GroupTensor) == isinstance(theirs, GroupTensor), n
        # Of a row's only scale each part has a copy; and torch puts fused weights together dense.
        alike = name in ("a scale per row", "by transformers, mixture, tp_plan")
        assert torch.equal(dense(ours), dense(theirs)) if alike else same(ours, theirs), n
        if before[n] is not None:
            assert p.placements == before[n]
    if " in parts" in name:  # its forward mixes DTensors with others
        return
    wanted, x = output(expected, sample(expected)), sample(expected)
    close: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
    if "transformers" in name or name in ("mixed precision", "tensor parallel", "two dimensions", "a scale per row"):
        close = {"rtol": 2e-2, "atol": 2e-2} if name == "mixed precision" else {"rtol": 1e-4, "atol": 1e-5}
    for _ in range(2):
        torch.testing.assert_close(output(model, x).float(), wanted.float(), **close)


@pytest.mark.parametrize("name", some(CASES))
def test_the_codes_are_those_of_the_whole_model(name: str) -> None:
    on_ranks(as_the_whole_model, name, ranks=4 if name == "two dimensions" else 2)


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trains(trained_before: bool, options: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    models = [with_lora(llama()) for _ in range(2)]
    fsdp(models[1], **options)
    for model in models:
        if trained_before:
            train(model)
        # Adapters that are trained are part of the model: what is quantized compensates for nothing that they do.
        quantize_(model, config(model), distributed=True)
    losses = [train(model) for model in models]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]
    state = get_model_state_dict(models[1], options=StateDictOptions(full_state_dict=True))
    quantized = {n: p for n, p in models[0].state_dict().items() if isinstance(p, GroupTensor)}
    if not trained_before:  # training in parts adds up gradients in another order
        assert all(same(whole(state[n]), p) for n, p in quantized.items())
    assert all(isinstance(whole(state[n]), GroupTensor) for n in quantized)
    assert len(quantized) == 14


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=str)
@pytest.mark.parametrize("trained_before", [True, False])
def test_adapters_are_trained(trained_before: bool, options: dict[str, Any]) -> None:
    on_ranks(trains, trained_before, options)


class StopError(Exception):
    pass


def stopped(stage: int) -> Any:
    def progress(number: int, of: int, name: str, seconds: float) -> None:
        if number == stage:
            raise StopError

    return progress


def put_back(name: str) -> None:
    model, shard, settings = case(name)
    model = shard(model)
    expected = output(model, sample(model))
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    before = dict(model.named_parameters())
    kept = sum(local(p).nbytes for p in before.values())
    assert kept < sum(p.nbytes for p in before.values())
    for stage in (1, 4):
        with pytest.raises(StopError if torch.distributed.get_rank() == 0 else RankError):
            quantize_(model, config(model, **settings), distributed=True, progress=stopped(stage))
        assert all(p is before[n] for n, p in model.named_parameters())
        torch.testing.assert_close(output(model, sample(model)), expected, rtol=0, atol=0)
    as_usual = quantize_(model, config(model, **settings), distributed=True)
    assert as_usual is not None
    output(model, sample(model))


def let_go() -> None:
    """The parts that were replaced, as there is no room for them."""
    from gptq_ao.pipeline import restorable

    restorable.SHARE = 0.0
    model = fsdp(llama())
    parts = [weakref.ref(local(layer.mlp.up_proj.weight)) for layer in model.model.layers]
    alive = []

    def progress(number: int, of: int, name: str, seconds: float) -> None:
        alive.append(sum(part() is not None for part in parts))
        if number == of:
            raise StopError

    with pytest.raises((StopError, RankError)) as found:
        quantize_(model, config(model), distributed=True, progress=progress)
    if torch.distributed.get_rank() == 0:
        assert alive[-1] == 0
    assert "there was no room to keep the original ones" in " ".join(found.value.__notes__)


def test_parts_are_let_go_if_there_is_no_room() -> None:
    on_ranks(let_go)


@pytest.mark.long
@pytest.mark.parametrize("name", ["default", "tensor parallel", "offloaded", "stays gathered"])
def test_after_an_error_the_model_is_as_it_was(name: str) -> None:
    on_ranks(put_back, name)


def goes_on(journal: str, sharded: bool) -> None:
    expected, model = llama(), fsdp(llama())
    quantize_(expected, config(expected), distributed=True)
    with pytest.raises((StopError, RankError)):
        quantize_(model, config(model), distributed=True, journal=journal, progress=stopped(4))
    again = fsdp(llama()) if sharded else llama()
    report: Any = quantize_(again, config(again), distributed=True, journal=journal)
    assert "resumed" not in " ".join(report.notes)
    for n, p in again.named_parameters():
        assert same(whole(p), expected.get_parameter(n)), n


@pytest.mark.long
@pytest.mark.parametrize("sharded", [True, False])
def test_a_run_that_was_stopped_goes_on(sharded: bool, tmp_path: Path) -> None:
    """Sharded or not: the values are the same."""
    on_ranks(goes_on, f"{tmp_path / 'journal'}", sharded)


def refused(name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard

    rank = torch.distributed.get_rank()
    rows = 81 if name == "uneven" else 80
    model: Any = seeded(nn.Sequential(nn.Linear(64, rows), nn.ReLU(), nn.Linear(rows, 64)))
    together: dict[str, Any] = {"distributed": True}
    data: list[Any] = [torch.ones(4, 64)]
    settings: dict[str, Any] = {}
    if name == "not together":
        together = {}
        fully_shard(model)
    elif name == "FSDP1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif name == "replicate":
        from torch.distributed._composable.replicate import replicate

        replicate(model)
    elif name == "other ranks":
        fully_shard(model)
        groups = [torch.distributed.new_group([n]) for n in range(2)]
        together = {"process_group": groups[rank]}
    elif name == "another dimension":
        model = seeded(nn.Sequential(nn.Linear(128, 64)))
        data = [torch.ones(4, 128)]
        fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    elif name == "transposed":
        from transformers.pytorch_utils import Conv1D

        model = seeded(nn.Sequential(Conv1D(64, 64)))
        fully_shard(model)
    elif name == "columns in another order":
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        model = seeded(nn.Sequential(nn.Linear(128, 64)))
        data, settings = [torch.ones(4, 128)], {"act_order": "group"}
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": RowwiseParallel()})
    elif name == "NaN":
        model[0], model[2] = nn.Linear(64, 96), nn.Linear(96, 64)
        with torch.no_grad():
            model[0].weight[95, 0] = torch.nan  # of rank 1
        fully_shard(model)
    elif name == "on meta":
        fully_shard(model.to("meta"))
    elif name == "no graph":
        model = NoGraph()
        fully_shard(model)
    else:
        fully_shard(model)
    before = dict(model.named_parameters())
    try:
        quantize_(model, gptq_config(4, effort="fast", calibration=data, **settings), **together)
    finally:
        assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}


class NoGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else x


REFUSED = {
    "rows": r"'0.weight' cannot stay packed in the parts .*: codes lie in tiles of 16 output features, and a part "
    r"would have 40\. Of 1 weights \(0.weight\), leave each out, by a rule name: None, or keep it whole on each rank",
    "uneven": r"'0.weight' cannot stay packed .*: 81 is no multiple of 2",
    "not together": r"the model is a FSDPSequential, of which each process has a part\. .* pass distributed=True to",
    "FSDP1": "FullyShardedDataParallel, of which each process has a part. Only a model of fully_shard",
    "replicate": r"made by `replicate`, .* Only a model of fully_shard \(FSDP2\), or of DTensors",
    "other ranks": r"'0.weight' has parts on the ranks \[0, 1\], and those that quantize together are \[[01]\]: all",
    "another dimension": "FSDP2 gathers codes along dimension 0, and has cut it along dimension 1",
    "transposed": r"it is stored as \[in_features, out_features\], and such codes are not gathered from parts",
    "columns in another order": "its input features are in an order of their own",
    "NaN": r"1 elements of '0.weight' \(48, 64\) are NaN or infinite",
    "on meta": r"'0.weight' is on the meta device, it has no values",
    "no graph": "the model cannot be captured as one graph, and only a graph can be quantized on several ranks",
}


@pytest.mark.parametrize("name", some(REFUSED, 3))
def test_what_cannot_be_quantized_as_it_is(name: str) -> None:
    """On every rank, before the first weight is changed."""
    for found in outcomes(refused, name, seconds=60):
        assert found.error is not None
        assert re.search(REFUSED[name], found.error.replace("\n", " ")), found.error
