"""How many rows a step must have on this machine, so that a row's result does not depend on where it stands.

"The same tokens, whoever shares the batch" needs matrix products whose rows are bitwise the same at every place. On
most machines they are. But where a product is cut among threads, the pieces can fall to different kernels, and then a
row has other last bits at another place: on some machines it is so with 5 rows and two threads. So nothing is assumed:
each size of product that the model has is tried with the numbers of rows that its steps have, and where a row's bits
depend on its place, the step gets more rows of padding. GPUs are asked in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..runner import Runner

ENOUGH = 2048  # results of a product in which another order of its sums shows
MOST = 4  # times as many rows: beyond that, none was ever needed
Size = tuple[type, tuple[int, ...], torch.dtype, torch.device]


class Product(Protocol):
    """Rows times a matrix: a module, or what stands in its place."""

    weight: torch.Tensor
    __call__: Callable[..., Any]


class PaddedRunner(Runner):
    """A runner that gives its steps rows of padding where the machine's products need them.

    padding: for each number of rows of a product in its steps, how many it really has."""

    padding: dict[int, int]

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self._find_padding()

    def _find_padding(self) -> None:
        rows = {kind.rows for kind in self.shape.kinds}
        everything, output = list(products_of(self.model)), self.model.get_output_embeddings()
        layers = [product for product in everything if product is not output]  # it has rows only, no prompt tokens
        self.padding = padding_for(layers, self.shape.prefill_sizes) | padding_for(everything, rows)

    def _padded(self, of_rows: torch.Tensor) -> torch.Tensor:
        more = self.padding[len(of_rows)] - len(of_rows)
        return torch.cat([of_rows, of_rows.new_zeros(more)]) if more else of_rows


def padding_for(products: Sequence[Product], counts: Iterable[int]) -> dict[int, int]:
    """For each number of rows the smallest one from it on with which all products keep a row's bits at every place; the
    number itself where there is none (it is then as good as any)."""
    return {
        count: next(
            (rows for rows in range(count, MOST * count + 8) if all(keeps_rows(each, rows) for each in products)), count
        )
        for count in counts
    }


def products_of(model: nn.Module) -> Iterator[Product]:
    """One layer of each size and kind that multiplies rows by a matrix (transformers' Conv1D is one too)."""
    sizes = set()
    for module in model.modules():
        product: Any = getattr(module, "merged", module)  # on CUDA several layers may have become one product
        weight = getattr(product, "weight", None)
        is_product = isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(product, nn.Embedding)
        if is_product and size_of(product) not in sizes:
            sizes.add(size_of(product))
            yield product


def size_of(product: Product) -> Size:
    weight = product.weight
    return type(product), tuple(weight.shape), weight.dtype, weight.device


def _takes_rows(product: Product) -> bool:
    """Whether the product is all that the module does, of its input alone. A router of experts, for instance, takes
    more, and goes on to choose. (Quantized weights are of no use without their module.)"""
    linear = isinstance(product, nn.Linear) or type(product).__name__ == "Conv1D"
    return linear or not isinstance(product, nn.Module) or not product.weight.is_floating_point()


_known: dict[tuple[Size, torch.dtype, int, int], bool] = {}  # by size, rows and threads: tried once in a process


def keeps_rows(product: Product, rows: int) -> bool:
    """Whether the same row has the same result at each of `rows` places."""
    key = size_of(product), _dtype_of_rows(product), rows, torch.get_num_threads()
    if key not in _known:
        _known[key] = _keeps_rows(product, rows)
    return _known[key]


@torch.inference_mode()
def _keeps_rows(product: Product, rows: int) -> bool:
    _, (first, second), _, device = size_of(product)
    dtype = _dtype_of_rows(product)
    # (Conv1D has its weight the other way round.)
    outputs, inputs = (second, first) if type(product).__name__ == "Conv1D" else (first, second)
    multiply = product if _takes_rows(product) else functools.partial(nn.functional.linear, weight=product.weight)
    generator = torch.Generator().manual_seed(rows)
    for _ in range(-(-ENOUGH // outputs)):
        row = torch.randn(1, 1, inputs, generator=generator).to(device, dtype)
        results = multiply(row.repeat(1, rows, 1))[0]
        if not torch.equal(results, results[:1].expand_as(results)):
            return False
    return True


def _dtype_of_rows(product: Product) -> torch.dtype:
    """In which a product takes its rows: that of its weights, or, where these are quantized, that of their scales."""
    tensors = [product.weight]
    if isinstance(product, nn.Module):
        tensors += [*product.parameters(), *product.buffers()]
    wide = (tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.element_size() > 1)
    return next(wide, torch.get_default_dtype())
