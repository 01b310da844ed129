"""A model changed in memory, as with adapters and with quantized weights. Written here, so that nothing more need be
installed; a worker process can import the classes."""

from __future__ import annotations

import torch


class WithAdapter(torch.nn.Module):
    """A linear layer and two small matrices beside it, as LoRA adds them."""

    def __init__(self, inner: torch.nn.Linear, rank: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(inner.in_features + inner.out_features)
        self.inner = inner
        self.down = torch.nn.Parameter(0.3 * torch.randn(rank, inner.in_features, generator=generator))
        self.up = torch.nn.Parameter(0.3 * torch.randn(inner.out_features, rank, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


class Quantized(torch.nn.Module):
    """A linear layer whose weights are int8 with one scale for each output."""

    def __init__(self, inner: torch.nn.Linear):
        super().__init__()
        scale = inner.weight.detach().abs().amax(1, keepdim=True)  # -1, 0 or 1: so coarse that tokens change
        self.register_buffer("weight", (inner.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def change(model: torch.nn.Module, kind: type[torch.nn.Module]) -> torch.nn.Module:
    """Put `kind` in the place of the linear layers of each block's feed-forward part."""
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name)))
    return model
