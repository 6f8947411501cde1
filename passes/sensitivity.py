"""Program + batches → how much the model's outputs react to what the product with each weight returns.

For output feature n of a weight, over all rows t of its products, with a loss L that is summed over tokens:

    s_n = Σ_t (∂L / ∂y_tn)² / tokens

The loss is one of which the squared gradient is the curvature of what quantization should keep, so that ½·Σ_n s_n·δ_n²
is the harm, per token, of changes of mean square δ_n² in these features, to second order and as if changes in different
places did not know of each other:

* Class scores: −log p of classes drawn at every token from the model's own distribution, not the data's. s is then the
  diagonal of the true Fisher information, and the harm the KL divergence from the original model in nats.
* Any other outputs: their product with Gaussian noise, over their root mean square. The harm is then half the squared
  error of the outputs relative to their energy.

Class scores are an output called "logits" of two or more classes and at most three dimensions, or the only output,
without a name, of a model with integer inputs (tokens).

Source: the Fisher information in place of the Hessian is that of Kunstner et al., "Limitations of the empirical Fisher
approximation" (2019): the data's own labels would give something else.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gptq_ao.activation_rows import columns, experts_first, patches
from gptq_ao.errors import ConfigError, NonFiniteError
from gptq_ao.hessian import kept_rows
from gptq_ao.passes.records import LinearSite, Program, dim, static_size
from gptq_ao.passes.token_rows import TokenRows

__all__ = ["SEQUENCES", "sensitivity"]

SEQUENCES = 32


def sensitivity(
    program: Program,
    sites: Iterable[LinearSite],
    batches: Sequence[Mapping[str, Tensor]],
    static: Callable[[str], Any],
    device: torch.device,
) -> dict[str, Tensor]:
    """One forward and backward of the first batches, up to `SEQUENCES` rows of them but at least one batch. Neither the
    state of the global random number generators nor whether gradients are recorded is changed.

    Args:
        batches: by placeholder name.
        static: a parameter, buffer or constant by placeholder name, on `device`.

    Returns:
        For each weight of `sites`, s [rows of its layout] in fp32. Where an operator's output is not laid out by output
        feature, all of a product's rows get their mean.

    Raises:
        ConfigError: there are no gradients, or some weight has none.
        NonFiniteError: a gradient is NaN or infinite.
    """
    sites = list(sites)
    totals = {s.weight: torch.zeros(s.layout.rows, device=device) for s in sites}
    graph = _Watched(program, sites, totals)
    inputs = {name for name in program.inputs if name is not None}
    statics = {name: _detached(static(name)) for name in program.placeholders if name not in inputs}
    outputs = _Outputs(program)
    generator = torch.Generator(device).manual_seed(0)
    tokens = 0
    for batch in _first(batches):
        given = {**statics, **{name: t.to(device) for name, t in batch.items()}}
        try:
            with torch.inference_mode(False), torch.enable_grad():
                loss, count = outputs.loss(graph.run(*(given[n] for n in program.placeholders)), batch, generator)
                loss.backward()
        except torch.OutOfMemoryError as e:
            raise ConfigError(
                f"target_bits takes a backward of the model, for which there is no room on {device}: use calibration "
                f"batches of fewer or shorter sequences, or give bits instead. {e}"
            ) from e
        except RuntimeError as e:
            raise ConfigError(
                f"target_bits needs gradients of the model's outputs, which cannot be computed: {e}\nGive bits instead"
            ) from e
        tokens += count
    _check(graph.reached, totals)
    return {name: total / max(tokens, 1) for name, total in totals.items()}


def _first(batches: Sequence[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    taken = 0
    for batch in batches:
        taken += max((t.shape[0] for t in batch.values() if t.dim()), default=1)
        if taken > SEQUENCES and batch is not batches[0]:
            return
        yield batch


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _check(reached: set[str], totals: Mapping[str, Tensor]) -> None:
    missed = [name for name in totals if name not in reached]
    if missed:
        raise ConfigError(
            f"target_bits cannot tell how much {', '.join(missed[:3])}{' …' if len(missed) > 3 else ''} matters: no "
            "gradient of the model's outputs reaches its product. Give it bits by a rule: rules={name: {'bits': 4}}"
        )
    bad = next((name for name, total in totals.items() if not torch.isfinite(total).all()), None)
    if bad is not None:
        raise NonFiniteError(
            f"the gradient at the output of {bad} is NaN or infinite: run the model in bf16 or fp32, or give bits "
            "instead of target_bits"
        )


class _Watched(fx.Interpreter):
    """Runs the graph. In the backward that follows, `totals` grows by the squared gradients at the sites.

    The parameters require no gradient: what the first sites return does, and what is made of it.
    """

    def __init__(self, program: Program, sites: list[LinearSite], totals: dict[str, Tensor]) -> None:
        super().__init__(program.module)
        self._sites = {s.node: s for s in sites}
        self._nodes = {n.name: n for n in program.graph.nodes}
        self._totals = totals
        self.reached: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        site = self._sites.get(n.name)
        if site is None:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        sorted_by = site.rows[0].offsets
        offsets = self.env[self._nodes[sorted_by]] if sorted_by is not None else None

        def add(gradient: Tensor) -> None:
            self.reached.add(site.weight)
            self._totals[site.weight][slice(*site.part)] += _squares(gradient.detach(), site, offsets)

        value.register_hook(add)
        return value


def _squares(gradient: Tensor, site: LinearSite, offsets: Tensor | None) -> Tensor:
    """Σ_t g_tn² for the rows n of the weight that the site multiplies."""
    squares = gradient.float().square()
    function, arguments = site.rows[0].arrange or (None, ())
    found = squares.sum()
    if offsets is not None:
        expert = torch.searchsorted(offsets, torch.arange(len(squares), device=offsets.device), right=True)
        sums = squares.new_zeros(site.experts + 1, squares.shape[-1]).index_add_(0, expert, squares)
        found = sums[:-1]  # rows after the last offset belong to no expert
    elif function in (None, columns, experts_first):
        squares = squares if function is None else function(squares)
        found = squares.reshape(site.experts, -1, squares.shape[-1]).sum(1)
    elif function is patches:  # all groups' channels, one after the other
        found = squares.movedim(-1 - len(arguments[0]), -1).flatten(0, -2).sum(0)
    count = site.part[1] - site.part[0]
    return found.flatten() if found.numel() == count else squares.sum().expand(count) / count


class _Outputs:
    """What the graph returns, as a loss."""

    def __init__(self, program: Program) -> None:
        nodes = list(next(n for n in program.graph.nodes if n.op == "output").args[0])
        names = program.outputs or (None,) * len(nodes)
        tokens = TokenRows(program)
        self._floats = [i for i, n in enumerate(nodes) if dim(n) and n.meta["val"].is_floating_point()]
        if not self._floats:
            raise ConfigError("target_bits needs gradients, but the model returns no floating-point tensor")
        self._masks = {i: tokens.of(nodes[i]) for i in self._floats}
        places = program.placeholders
        inputs = [places[name].meta["val"] for name in program.inputs if name is not None]
        of_tokens = any(isinstance(v, Tensor) and v.dtype in (torch.int32, torch.int64) for v in inputs)
        self._scores = next(
            (
                i
                for i in self._floats
                if (names[i] == "logits" or (names[i] is None and len(self._floats) == 1 and of_tokens))
                and dim(nodes[i]) in (2, 3)
                and static_size(nodes[i].meta["val"].shape[-1]) not in (None, 1)
            ),
            None,
        )

    def loss(
        self, values: Sequence[Any], batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """The loss of one batch and the number of tokens (rows of the first output) that it sums over."""
        if self._scores is not None:
            return _drawn(self._rows(self._scores, values, batch), generator)
        return _projected([self._rows(i, values, batch) for i in self._floats], generator)

    def _rows(self, index: int, values: Sequence[Any], batch: Mapping[str, Tensor]) -> Tensor:
        """One output as [rows, features] fp32, without the rows that are padding."""
        value = values[index]
        mask, gathers = self._masks[index]
        keep = kept_rows(value, batch[mask].to(value.device)) if mask is not None and not gathers else None
        rows = value.reshape(-1, value.shape[-1])
        return (rows if keep is None else rows[keep.flatten()]).float()


def _drawn(scores: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """−log p of one class for each row of `scores` [T, V], drawn from their own distribution."""
    log_p = scores.log_softmax(-1)
    classes = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return -log_p.gather(1, classes).sum(), len(scores)


def _projected(outputs: list[Tensor], generator: torch.Generator) -> tuple[Tensor, int]:
    """Σ v·y with Gaussian v over all rows, and over the root of the mean energy of a row, for each output y [T, N].
    Those of another number of rows count as if they had that of the first."""
    count = len(outputs[0])
    loss = outputs[0].new_zeros(())
    for y in outputs:
        energy = y.detach().square().sum(-1).mean()
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        if energy > 0:
            loss = loss + (noise * y).sum() * (count / len(y) / energy).sqrt()
    return loss, count
