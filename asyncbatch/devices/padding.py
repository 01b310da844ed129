"""How many rows a step must have on this CPU, so that a row's result does not depend on where it stands.

"The same tokens, whoever shares the batch" needs matrix products whose rows are bitwise the same at every place. On
most machines they are. But where a product is cut among threads, the pieces can fall to different kernels: with two
threads, float32 products of 5, 6, 7, 9 and 10 rows gave a row other last bits at another place, and those of 8, 12 and
16 rows did not. So nothing is assumed: each size of product that the model has is tried with the numbers of rows that
its steps have, and where a row's bits depend on its place, the step gets more rows of padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..runner import Runner

TRIES = 3  # random rows; one alone may come out the same by chance
MOST = 4  # times as many rows: beyond that, none was ever needed


class PaddedRunner(Runner):
    """A runner on a CPU. `padding`: for each number of rows of a product in its steps, how many it really has."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        counts = {*(kind.rows for kind in self.shape.kinds), self.shape.prefill_tokens}
        self.padding = padding_for(self.model, counts)

    def _padded(self, of_rows: torch.Tensor) -> torch.Tensor:
        more = self.padding[len(of_rows)] - len(of_rows)
        return torch.cat([of_rows, of_rows.new_zeros(more)]) if more else of_rows


def padding_for(model: nn.Module, counts: Iterable[int]) -> dict[int, int]:
    """For each number of rows the smallest one from it on with which all products of the model keep a row's bits at
    every place; the number itself where there is none (it is then as good as any)."""
    products = list(products_of(model))
    with torch.inference_mode():
        return {
            count: next((rows for rows in range(count, MOST * count + 8) if all_keep(products, rows)), count)
            for count in counts
        }


def products_of(model: nn.Module) -> Iterator[nn.Module]:
    """One layer of each size and kind that multiplies rows by a matrix (transformers' Conv1D is one too)."""
    sizes = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            size = type(module), tuple(weight.shape), weight.dtype
            if size not in sizes:
                sizes.add(size)
                yield module


def all_keep(products: Iterable[nn.Module], rows: int) -> bool:
    return all(keeps_rows(product, rows) for product in products)


def keeps_rows(product: nn.Module, rows: int) -> bool:
    """Whether the same row has the same result at each of `rows` places."""
    weight: torch.Tensor = product.weight  # type: ignore[assignment]
    inputs = weight.shape[1] if isinstance(product, nn.Linear) else weight.shape[0]
    generator = torch.Generator().manual_seed(rows)
    for _ in range(TRIES):
        row = torch.randn(1, 1, inputs, generator=generator).to(weight.dtype)
        results = product(row.repeat(1, rows, 1))[0]
        if not torch.equal(results, results[:1].expand_as(results)):
            return False
    return True
