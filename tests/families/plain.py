"""Models written in plain torch, the way people write them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn
from torch.utils.checkpoint import checkpoint

from ..models import Attention, seeded
from .entry import Entry

__all__ = ["plain_entries"]

WIDTH = 32
Batches = list[Any]


def noise(*shape: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def together(**inputs: list[Tensor]) -> Batches:
    return [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def time_embedding(t: Tensor, width: int = WIDTH) -> Tensor:
    frequencies = torch.exp(torch.arange(width // 2) * (-math.log(1e4) / (width // 2)))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class UNetBlock(nn.Module):
    """Diffusion: residual convolutions with a time embedding, self-attention over pixels, cross-attention to text."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, WIDTH) for _ in range(3))
        self.conv_in = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.attention = Attention(WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, 4, kdim=48, vdim=48, batch_first=True)
        self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)
        self.out = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = self.conv_in(x)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time_embedding(t))[:, :, None, None]
        x = x + self.conv2(F.silu(self.norm2(h)))
        low = self.down(x)
        pixels = self.norm3(low).flatten(2).transpose(1, 2)
        pixels = pixels + self.attention(pixels)
        pixels = pixels + self.cross(pixels, text, text, need_weights=False)[0]
        low = pixels.transpose(1, 2).reshape(low.shape)
        return self.out(x + self.up(low))


class DiTBlock(nn.Module):
    """adaLN-Zero: shift, scale and gate from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.attention = Attention(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time_embedding(t)).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ActionPolicy(nn.Module):
    """Robotics: a small image encoder and the robot's state make a chunk of actions."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, WIDTH, 3, stride=2), nn.ReLU()
        )
        self.state = nn.Sequential(nn.Linear(7, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.queries = nn.Parameter(torch.zeros(8, WIDTH))
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True, dropout=0.0)
        self.action = nn.Linear(WIDTH, 7)

    def forward(self, image: Tensor, state: Tensor) -> Tensor:
        seen = self.vision(image).flatten(2).transpose(1, 2)
        memory = torch.cat([seen, self.state(state)[:, None]], 1)
        return self.action(self.decoder(self.queries.expand(image.shape[0], -1, -1), memory))


@dataclass
class Prediction:  # not registered with pytree
    mean: Tensor
    scale: Tensor


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(WIDTH, 48), nn.Linear(48, 8), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Prediction:
        h = self.body(x).relu()
        return Prediction(self.mean(h), F.softplus(self.scale(h)))


class StochasticPolicy(nn.Module):
    """Reinforcement learning: the actions' distribution, squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(WIDTH, 48), nn.Linear(48, 8), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> distributions.Distribution:
        h = self.body(x).relu()
        actions = distributions.Independent(distributions.Normal(self.mean(h), self.scale(h).exp()), 1)
        return distributions.TransformedDistribution(actions, [distributions.TanhTransform()])


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # No bias: in bf16 a quantized layer rounds the product before it adds the bias, a dense one afterwards.
        self.inside, self.outside = nn.Linear(WIDTH, 48, bias=False), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            h = self.inside(x)
        return self.outside(h.float())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(50, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


class LoopExperts(nn.Module):
    """The mixture of experts of the first Mixtral: a Python loop, rows picked by index."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, expert(rows[row]) * weight[row, slot, None])
        return out.view_as(x)


class DenseExperts(nn.Module):
    """Stacked experts, all of them applied to every row: by bmm, or by einsum."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.einsum = einsum
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Parameter(torch.zeros(4, WIDTH, 48))
        self.down = nn.Parameter(torch.zeros(4, 48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, chosen = self.gate(rows).softmax(-1).topk(2)
        share = torch.zeros(rows.shape[0], 4).scatter(1, chosen, weight)
        if self.einsum:
            h = torch.einsum("nd,edf->enf", rows, self.up).relu()
            y = torch.einsum("enf,efd->end", h, self.down)
        else:
            y = torch.bmm(torch.bmm(rows.expand(4, -1, -1), self.up).relu(), self.down)
        return (y * share.T[..., None]).sum(0).view_as(x)


class ChunkedQKV(nn.Module):
    """One parameter, cut into three where it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(3 * WIDTH, WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w).unflatten(-1, (4, -1)).transpose(1, 2) for w in self.qkv.chunk(3))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AppliedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.shared(self.shared(x).tanh()))


class Translator(nn.Module):
    """nn.Transformer, encoder and decoder, between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(WIDTH, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))


def tokens(length: int = 20) -> list[Tensor]:
    return [torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def steps() -> list[Tensor]:
    return [torch.tensor([1 + i, 40 + i]) for i in range(3)]


def sequences() -> Batches:
    return list(noise(2, 24, WIDTH))


_TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches]]] = {
    "nn.Sequential": (sequential, lambda: list(noise(16, WIDTH))),
    "nn.Transformer": (Translator, lambda: together(source=tokens(), target=tokens(12))),
    "vision transformer": (VisionTransformer, lambda: list(noise(2, 3, 16, 16))),
    "diffusion UNet block": (
        UNetBlock,
        lambda: together(x=noise(2, 3, 16, 16), t=steps(), text=noise(2, 6, 48)),
    ),
    "diffusion transformer (DiT) block": (DiTBlock, lambda: together(x=noise(2, 24, WIDTH), t=steps())),
    "robot policy, action chunks": (ActionPolicy, lambda: together(image=noise(2, 3, 32, 32), state=noise(2, 7))),
    "distribution as output": (StochasticPolicy, sequences),
    "dataclass as output": (DataclassOutput, sequences),
    # More rows than the CPU's int4 kernel takes, which rounds its scales to bf16.
    "autocast inside": (Autocast, lambda: noise(8, 40, WIDTH)),
    "activation checkpointing": (Checkpointed, sequences),
    "LSTM": (Recurrent, lambda: list(tokens())),
    "experts in a Python loop": (LoopExperts, sequences),
    "stacked experts, bmm": (lambda: DenseExperts(einsum=False), sequences),
    "stacked experts, einsum": (lambda: DenseExperts(einsum=True), sequences),
    "one parameter in three chunks": (ChunkedQKV, sequences),
    "a weight applied twice": (AppliedTwice, sequences),
}


def plain_entries() -> list[Entry]:
    def entry(name: str) -> Entry:
        make, batches = _TABLE[name]
        return Entry(name, "plain PyTorch", lambda: (seeded(make()), batches()))

    return [entry(name) for name in _TABLE]
