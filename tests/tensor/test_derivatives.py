"""Derivatives with respect to the input, in every direction and order, are those of the dense weight."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp
from torch.utils.checkpoint import checkpoint

from gptq_ao.tensor import GroupTensor
from tests.tensor import test_expert_products as experts
from tests.tensor.test_tensor import CLASSES, ON_DENSE, PRODUCTS, K, N, linear_of, make, product, random, weight_of

Function = Callable[[Any], Tensor]


def dual(f: Function, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    assert tangent is not None
    return tangent


def without_grad(f: Function, x: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return dual(f, x, v)


def loss(f: Function) -> Function:
    """Not linear, so that its derivatives of any order are numbers that depend on x."""
    return lambda x: f(x / 8).sin().sum()


def twice(f: Function, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad((first * v).sum(), x)[0]


# What each makes of f, at x, in the direction v.
TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "dual number": dual,
    "dual number without grad": without_grad,
    "grad": lambda f, x, v: grad(loss(f))(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "forward over backward": lambda f, x, v: jvp(grad(loss(f)), (x,), (v,))[1],
    "backward over forward": lambda f, x, v: grad(lambda t: jvp(loss(f), (t,), (v,))[1])(x),
    "backward over backward": lambda f, x, v: vjp(grad(loss(f)), x)[1](v)[0],
    "autograd twice": twice,
    "autograd.functional.jvp": lambda f, x, v: torch.autograd.functional.jvp(f, x, v)[1],
    "vmap": lambda f, x, v: torch.vmap(f)(torch.stack([x, v, x + v])),
    "vmap of another dimension": lambda f, x, v: torch.vmap(f, in_dims=-1)(torch.stack([x, v], -1)),
    "vmap of grad": lambda f, x, v: torch.vmap(grad(loss(f)))(torch.stack([x, v])),
    "vmap of jvp": lambda f, x, v: torch.vmap(lambda t: jvp(f, (x,), (t,))[1])(torch.stack([x, v])),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def same(actual: Tensor, exact: Tensor) -> None:
    assert exact.detach().abs().max() > 1e-3  # a derivative of zero would prove nothing
    # At most two fp32 sums of some hundred products each, of terms about as large as the result.
    assert torch.allclose(actual, exact, rtol=1e-4, atol=1e-4 * exact.detach().abs().max().item())


@every_transform
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, transform: str) -> None:
    function, x, weight = product(name, bits=3)
    v, dense = random(*x.shape, seed=5), weight.dequantize()
    apply = TRANSFORMS[transform]
    same(apply(lambda t: function(t, weight), x, v), apply(lambda t: function(t, dense), x, v))


@every_transform
@pytest.mark.parametrize("name", ON_DENSE)
def test_operators_that_have_no_kernel(name: str, transform: str) -> None:
    options, function, shape = ON_DENSE[name]
    weight, x, v = make(**options), random(*shape), random(*shape, seed=5)
    dense, apply = weight.dequantize(), TRANSFORMS[transform]
    same(apply(lambda t: function(t, weight), x, v), apply(lambda t: function(t, dense), x, v))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["linear", *experts.FUNCTIONS])
def test_activations_that_are_computed_again(name: str, reentrant: bool) -> None:
    """As in training with `gradient_checkpointing`, which gives what was saved for backward only once."""
    weight, x = experts.stack(True), experts.rows()
    if name == "linear":
        weight, x = make(N, K), random(3, K)

    def f(t: Tensor) -> Tensor:
        return F.linear(t, weight) if name == "linear" else experts.FUNCTIONS[name](t, weight, experts.OFFSETS)

    found = []
    for again in (False, True):
        leaf = x.clone().requires_grad_()
        out = checkpoint(f, leaf, use_reentrant=reentrant) if again else f(leaf)
        out.sin().sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert torch.equal(*found)


@every_transform
@pytest.mark.parametrize("name", experts.FUNCTIONS)
@pytest.mark.parametrize("transposed", [True, False], ids=["stored", "view"])
def test_experts(transposed: bool, name: str, transform: str) -> None:
    weight, x = experts.stack(transposed), experts.rows()
    v, dense = random(*x.shape, seed=5), weight.dequantize()
    expert = torch.bucketize(torch.arange(len(x)), experts.OFFSETS, right=True)

    # torch's own has no forward mode, and transformers' gives a tangent of zero.
    def by_einsum(rows: Tensor) -> Tensor:
        return torch.einsum("rk,rkn->rn", rows, dense[expert])

    apply = TRANSFORMS[transform]
    same(apply(lambda t: experts.FUNCTIONS[name](t, weight, experts.OFFSETS), x, v), apply(by_einsum, x, v))


@pytest.mark.parametrize("bits", CLASSES)
@pytest.mark.parametrize("permuted", [False, True], ids=["", "perm"])
def test_against_finite_differences(permuted: bool, bits: int) -> None:
    weight = make(17, 32, bits=bits, permuted=permuted, dtype=torch.float64)
    x, bias = random(2, 32, dtype=torch.float64).requires_grad_(), random(17, dtype=torch.float64).requires_grad_()

    def linear(x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(linear, (x, bias), check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(lambda x, b: linear(x, b).sin(), (x, bias), check_fwd_over_rev=True)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_hessian(inner: Any, outer: Any) -> None:
    quantized = nn.Sequential(linear_of(make(32, 32)), nn.Tanh(), linear_of(make(16, 32, seed=1)))
    dense = copy.deepcopy(quantized)
    for layer in (dense[0], dense[2]):
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(weight_of(layer).dequantize())
    x = random(32)
    same(outer(inner(loss(quantized)))(x), outer(inner(loss(dense)))(x))


def test_linearize() -> None:
    weight, x, v = make(), random(5, K), random(5, K, seed=5)
    with pytest.warns(UserWarning, match="insert a get_attr Node"):  # torch's, for any function
        tangent = linearize(lambda t: F.linear(t, weight), x)[1](v)
    same(tangent, v @ weight.dequantize().T)


def test_of_the_bias() -> None:
    module, x, v = linear_of(make()), random(5, K), random(5, K, seed=5)
    change = random(N, seed=6)

    def of(bias: Tensor, x: Tensor = x) -> Tensor:
        return functional_call(module, {"bias": bias}, (x,))

    bias = module.bias.detach()
    assert torch.equal(jvp(of, (bias,), (change,))[1], change.expand(5, N))
    same(jvp(of, (bias, x), (change, v))[1], v @ module.weight.dequantize().T + change)
    same(torch.vmap(of)(torch.stack([bias, change])), torch.stack([of(bias), of(change)]))


def test_an_ensemble() -> None:
    modules, x = [linear_of(make(48, K, seed=i)) for i in range(3)], random(5, K)
    parameters, _ = stack_module_state(modules)
    assert isinstance(parameters["weight"], GroupTensor)
    y = torch.vmap(lambda p, x: functional_call(modules[0], p, (x,)), in_dims=(0, None))(parameters, x)
    same(y, torch.stack([m(x) for m in modules]))


@pytest.mark.parametrize("transform", ["jvp", "grad", "forward over backward", "vmap"])
def test_compiled(transform: str) -> None:
    torch.compiler.reset()
    module, x, v = linear_of(make()), random(5, K), random(5, K, seed=5)
    apply = TRANSFORMS[transform]
    compiled = torch.compile(lambda x, v: apply(module, x, v), backend="aot_eager")
    same(compiled(x, v), apply(module, x, v))


def test_a_saved_program_has_them_too() -> None:
    """Exported graphs call the operator itself."""
    module, x, v = linear_of(make()), random(5, K), random(5, K, seed=5)
    program = torch.export.export(module, (x,)).module()
    same(dual(program, x, v), v @ module.weight.dequantize().T)


def near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """A handful of roundings to `dtype`, of numbers about as large as the largest."""
    largest = exact.detach().abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(actual.float().cpu(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * largest)


@pytest.mark.gpu
@every_transform
@pytest.mark.parametrize("permuted", [False, True], ids=["", "perm"])
@pytest.mark.parametrize("bits", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_kernels(dtype: torch.dtype, bits: int, permuted: bool, transform: str) -> None:
    weight = make(256, 512, bits=bits, permuted=permuted, dtype=dtype)
    # Small, so that the sine is not of numbers whose rounding is a whole turn.
    x, v = ((random(5, 512, seed=i) / 256).to(dtype) for i in (1, 2))
    placed, dense, apply = weight.cuda(), weight.dequantize().float(), TRANSFORMS[transform]
    exact = apply(lambda t: F.linear(t, dense), x.float(), v.float())
    near(apply(lambda t: F.linear(t, placed), x.cuda(), v.cuda()), exact, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("transform", ["jvp", "grad", "vjp", "forward over backward", "autograd twice"])
@pytest.mark.parametrize("name", experts.FUNCTIONS)
def test_experts_of_kernels(name: str, transform: str) -> None:
    weight, x = experts.stack(True), experts.rows() / 256
    v, dense, apply = random(*x.shape, seed=5) / 256, weight.dequantize(), TRANSFORMS[transform]
    expert = torch.bucketize(torch.arange(len(x)), experts.OFFSETS, right=True)
    exact = apply(lambda rows: torch.einsum("rk,rkn->rn", rows, dense[expert]), x, v)
    placed, offsets = weight.to(torch.bfloat16).cuda(), experts.OFFSETS.cuda()
    function = experts.FUNCTIONS[name]
    near(apply(lambda t: function(t, placed, offsets), x.bfloat16().cuda(), v.bfloat16().cuda()), exact, torch.bfloat16)
