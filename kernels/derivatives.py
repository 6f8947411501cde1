"""Derivatives of an operator: backwards, forwards, under the transforms of `torch.func`, and of any order.

In place of `torch.library.register_autograd`, which knows backward mode only: forward mode would pass it by and find a
tangent of zero, and `torch.func` would refuse it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

__all__ = ["register_derivatives"]


class _Call(NamedTuple):
    """The dispatcher's keys, and which gradients are enabled."""

    keys: Any
    backwards: bool
    forwards: bool


def register_derivatives(
    library: torch.library.Library,
    name: str,
    *,
    setup_context: Callable[[Any, tuple[Any, ...]], None],
    gradient: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
    tangent: Callable[..., Tensor],
) -> None:
    """Define the derivatives of `name`, an operator of `library`, by others that have derivatives themselves.

    Args:
        setup_context: given a context and the operator's arguments, keeps there what the other two need.
        gradient: of the arguments, from that of the result.
        tangent: of the result, from those of the arguments (None: it has none); at least one is given.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default

    # Of one level: torch's dispatcher comes here once for each transform that is active, and redispatching leads to the
    # next one.
    class Derivatives(_SingleLevelFunction):
        @staticmethod
        def forward(call: _Call, *arguments: Any) -> Tensor:
            # A function's forward runs without gradients. The levels below have theirs, if they had them before.
            with torch.set_grad_enabled(call.backwards), forward_ad._set_fwd_grad_enabled(call.forwards):
                return below(call.keys, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.call, *arguments = inputs
            setup_context(ctx, tuple(arguments))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return None, *gradient(ctx, grad)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
            # Nor does its tangent have one. Without this, forward mode in forward mode would miss a part.
            with forward_ad._set_fwd_grad_enabled(ctx.call.forwards):
                return tangent(ctx, *tangents)

    Derivatives.__name__ = f"{name}_derivatives"  # what a result's `grad_fn` is called

    def below(keys: Any, *arguments: Any) -> Tensor:
        with _C._AutoDispatchBelowAutograd():
            result: Tensor = operator.redispatch(keys & _C._after_autograd_keyset, *arguments)
            return result

    def differentiated(keys: Any, *arguments: Any) -> Tensor:
        backwards, transformed = torch.is_grad_enabled(), _C._are_functorch_transforms_active()
        needed = transformed or (backwards and _C._any_requires_grad(*arguments))
        # The level of dual numbers is −1 outside of all.
        if not needed and forward_ad._current_level < 0:
            return below(keys, *arguments)
        allowed = enable_single_level_autograd_function() if transformed else nullcontext()
        with allowed:
            call = _Call(keys, backwards, _C._is_fwd_grad_enabled())
            return Derivatives.apply(call, *arguments)  # type: ignore[attr-defined]

    library.impl(name, differentiated, "Autograd", with_keyset=True)
