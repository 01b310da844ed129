"""What `compile=True` does to the runner's copy of a model: fewer, larger kernels for the same formulas.

- Projections of the same input (queries, keys and values; gate and up) become one matrix product. A decode step waits
  for memory, and one large matrix is read nearer to full speed than three small ones. No weight is doubled: the
  model's own weights become views of the merged one, with the values that they had.
- Each decoder layer is compiled on its own. Layers are alike, so one compilation serves all of them: measured on an
  H200 with the 8B shape, 3 s instead of 26 s for the whole model, and the compiled step was no slower (5.65 against
  5.85 ms at context 64; both beside 8.35 ms without compiling).

Tried and left out (H200, 8B shape, 32 rows, context 33; by scripts that are not kept): programmatic dependent launch
(`triton.enable_pdl` of Inductor, and the same in the attention kernel) took 4.71 ms a step instead of 4.64; with a
matrix product of our own in Triton besides, 4.79.
"""

from __future__ import annotations

import torch
from torch import nn

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names that Llama and its relatives share
OPTIONS = {"combo_kernels": True}  # rotary embeddings of queries and keys in one kernel


def compile_model(model: nn.Module) -> None:
    """Merge projections and have every part of the decoder compiled at its first use. Changes `model`'s modules, so it
    must be a copy; its weights may be shared, and keep their values."""
    for module in model.modules():
        for names in SAME_INPUT:
            linears = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                merged = Merged(linears)
                for index, name in enumerate(names):
                    setattr(module, name, Part(merged, index))
    for part in model.get_decoder().children():
        for piece in part if isinstance(part, nn.ModuleList) else [part]:
            piece.compile(dynamic=False, options=OPTIONS)


class Merged:
    """Several linear layers of the same input as one. `result` holds the parts until the last one is taken."""

    def __init__(self, linears: list[nn.Linear]):
        self.sizes = [linear.out_features for linear in linears]
        self.weight = merged_weight([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.result: tuple[torch.Tensor, ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Part(nn.Module):
    """Stands where one of the linear layers was. The model calls the parts in order and with the same input."""

    def __init__(self, merged: Merged, index: int):
        super().__init__()
        self.merged, self.index = merged, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = self.merged
        if self.index == 0:
            merged.result = merged(x).split(merged.sizes, dim=-1)
        part = merged.result[self.index]
        if self.index == len(merged.sizes) - 1:
            merged.result = ()
        return part


def merged_weight(weights: list[torch.Tensor]) -> torch.Tensor:
    """One tensor [sum of rows, columns] of which `weights` are the parts, in order. The weights keep their values and
    become views of it; if they already are, from an earlier call, nothing is copied."""
    first, places = weights[0], []
    for weight in weights:
        places.append(weight.data_ptr())
    ends = [place + weight.numel() * weight.element_size() for place, weight in zip(places, weights, strict=True)]
    rows = sum(len(weight) for weight in weights)
    same = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(same) == 1 and places[1:] == ends[:-1]:
        return first.detach().as_strided((rows, first.shape[1]), first.stride())
    merged = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, merged.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return merged
