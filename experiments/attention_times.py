"""Longer sequences from the programs that were modelled or measured: how each part's time follows from its size. Arithmetic alone.

Dense attention and the choice of pages over a whole sequence of S tokens take a S + b S^2 (heads are independent, so dense attention is
modelled for two of them). The choice of tokens takes a + b T for a chunk of queries that looks at T keys, those up
to the next of a few ends. Attention to what was chosen takes the same for every query.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhc_jax.experiments.attention_modelled import CACHES, CHUNK, MODELLED, Program, Sizes
from mhc_jax.plan.attention import crossing
from pallas_kernels.indexer.select import ends_of

Total = Callable[[float], float | None]  # microseconds of a whole sequence of so many tokens


@dataclass(frozen=True)
class Times:
    """Microseconds of one layer, from what was found for one chip."""

    found: Mapping[str, Any]  # by `Program.key`
    sizes: Sizes = MODELLED
    heads: int = 128

    def us(self, program: Program) -> float | None:
        """Of one program, None where there is no valid figure."""
        record = self.found.get(program.key)
        return None if record is None or record["problems"] else record["us"]

    def dense(self, tokens: float) -> float | None:
        """Of a whole sequence with dense attention, forward."""
        found = self._whole([Program("dense", size, size, self.sizes.dense_heads) for size in self.sizes.whole], tokens)
        return None if found is None else found * self.heads / self.sizes.dense_heads

    def pages(self, tokens: float) -> float | None:
        """The same with attention to chosen pages, the choice included."""
        choice = self._whole([Program("select_pages", size, size) for size in self.sizes.whole], tokens)
        attention = self.us(Program("pages", CHUNK, CACHES[1]))
        return None if choice is None or attention is None else choice + attention * tokens / CHUNK

    def tokens(self, tokens: float) -> float | None:
        """The same with attention to chosen tokens, the choice included: each chunk's from the keys up to the next of a few ends."""
        number = len(ends_of(math.ceil(tokens)))
        seen = tokens * (number + 1) / (2 * number)  # by a chunk, on average
        choice, attention = self._chosen(seen), self._of_tokens()
        return None if choice is None or attention is None else (choice / CHUNK + attention) * tokens

    def break_even(self, granularity: str) -> float | None:
        """Tokens from which on prefill takes less with "pages" or "tokens" than with dense attention; None where they do not cross."""
        return self._crossing(granularity, lambda total: lambda tokens: total(tokens) or 0.0)

    def position(self, granularity: str) -> float | None:
        """The same of one more token: the position from which on it adds less to the sequence's time."""
        return self._crossing(granularity, lambda total: lambda tokens: (total(tokens + 1) or 0.0) - (total(tokens) or 0.0))

    def _crossing(self, granularity: str, what: Callable[[Total], Callable[[float], float]]) -> float | None:
        sparse: Total = getattr(self, granularity)
        if self.dense(1.0) is None or sparse(1.0) is None:
            return None
        try:
            return crossing(what(sparse), what(self.dense), first=float(CHUNK))
        except ValueError:
            return None

    def _whole(self, programs: list[Program], tokens: float) -> float | None:
        """a S + b S^2 through the modelled sizes, least squares of relative errors."""
        times = [self.us(program) for program in programs]
        if None in times:
            return None
        size, us = np.array([program.queries for program in programs], float), np.array(times, float)
        a, b = np.linalg.lstsq(np.stack([size, size**2], axis=1) / us[:, None], np.ones_like(us), rcond=None)[0]
        return float(a * tokens + b * tokens**2)

    def _of_tokens(self) -> float | None:
        """Attention of one query to its tokens. A model's few queries pay for what a chunk does once, such as reading the projections'
        weights: it is taken from attention to pages, which does the same around its kernel.
        """
        few, pages = self.sizes.tokens, Program("pages", CHUNK, CACHES[1])
        attention, of_pages = self.us(few), self.us(pages)
        if attention is None or few.queries == CHUNK:
            return attention and attention / few.queries
        if of_pages is None:
            return None
        around = of_pages - self.found[pages.key]["kernel_us"]
        return float(self.found[few.key]["kernel_us"] / few.queries + around / CHUNK)

    def _chosen(self, keys: float) -> float | None:
        """Of a chunk: a + b T through the modelled caches."""
        times = [self.us(Program("select_tokens", CHUNK, size)) for size in CACHES]
        if None in times:
            return None
        us = np.array(times, float)
        columns = np.stack([np.ones(len(CACHES)), np.array(CACHES, float)], axis=1)
        a, b = np.linalg.lstsq(columns / us[:, None], np.ones_like(us), rcond=None)[0]
        return float(a + b * keys)
