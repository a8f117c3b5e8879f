"""Rows of Engram's tables for every token of a batch (arXiv 2601.07372, equations 1 and 2; the hash of the published code).

    mix_1(t) = x(t) m_0        mix_n(t) = mix_{n-1}(t) XOR x(t-n+1) m_{n-1}        row = offset + mix_n mod p

x are classes of tokens, m the layer's multipliers; all heads of one order share mix_n and differ in their prime p alone.

The remainder takes nearly all of the time. Processors divide 64-bit numbers slowly, and NumPy has no product of 128 bits to replace the
division with; `remainders` therefore takes the quotient from float64 arithmetic and proves that it is the right one or one too many.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64, UInt32

from mhc_jax.data.batch import Batch
from mhc_jax.data.ngrams.artifact import EngramArtifact
from mhc_jax.errors import UserError

ROWS = "engram_rows"  # name of the rows in a batch
CHUNK = 8192  # tokens at a time: enough work for a call of NumPy, while the temporary arrays stay in the second-level cache
SMALLEST_FAST = 8192  # smallest prime for which `remainders` is proved
_TO_INTEGER = 2.0**52  # float64 numbers from here to 2^53 are the whole numbers: adding it rounds, and leaves the number in the low bits


class Scratch:
    """Temporary arrays for `remainders`, made once: allocating them for every chunk costs as much as filling them."""

    def __init__(self, heads: int, count: int):
        self.quotients = np.empty((heads, count), np.float64)
        self.remainder = np.empty((heads, count), np.uint32)
        self.other = np.empty((heads, count), np.uint32)


class NgramHash:
    """Computes the rows of batches. Holds no state: equal batches give equal rows.

    Args:
      artifact: compression and layout.
      threads: how many share the work; default one for each core that this process may use.
    """

    def __init__(self, artifact: EngramArtifact, threads: int | None = None):
        self.artifact = artifact
        self._threads = threads or _cores()
        self._lookup = artifact.lookup.astype(np.int64)
        self._offsets = artifact.offsets.astype(np.uint32)

    def add_rows(self, batch: Batch) -> Batch:
        """The batch with `engram_rows`, int32 [batch, seq_len, layers, heads of all orders]."""
        return {**batch, ROWS: self.rows(batch["tokens"], batch["segment_ids"])}

    def rows(
        self, tokens: Int[np.ndarray, "batch seq_len"], segment_ids: Int[np.ndarray, "batch seq_len"]
    ) -> Int32[np.ndarray, "batch seq_len layers heads"]:
        """The row of each layer's table that each head of each token reads, offsets included; heads of the first order come first.

        What lies before a row of the batch, or (unless the config's `cross_documents` is set) where the segment id is another, counts as
        the padding token, and so does everything before it.

        Raises:
          UserError: a token id is not in the vocabulary.
        """
        artifact = self.artifact
        vocab = self._lookup.size
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
            wrong = tokens[(tokens < 0) | (tokens >= vocab)].flat[0]
            raise UserError(f"there is a token id {wrong} in a batch, but the tokenizer's ids are 0 to {vocab - 1}; was another one used?")
        joined = np.zeros(tokens.shape, bool)  # whether a token and the one before belong together
        joined[:, 1:] = True if artifact.config.cross_documents else segment_ids[:, 1:] == segment_ids[:, :-1]
        flat, flat_joined = tokens.reshape(-1), joined.reshape(-1)
        layers, orders, heads = artifact.primes.shape
        out = np.empty((flat.size, layers, orders * heads), np.int32)

        def work(first: int) -> None:
            scratch = Scratch(heads, min(CHUNK, flat.size))
            for start in range(first * CHUNK, flat.size, threads * CHUNK):
                self._chunk(flat, flat_joined, start, scratch, out[start : start + CHUNK])

        threads = min(self._threads, -(-flat.size // CHUNK))
        if threads == 1:
            work(0)
        elif threads:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
        return out.reshape(*tokens.shape, layers, orders * heads)

    def _chunk(
        self,
        tokens: Int[np.ndarray, " all"],
        joined: Bool[np.ndarray, " all"],
        start: int,
        scratch: Scratch,
        out: Int32[np.ndarray, "chunk layers heads"],
    ) -> None:
        """Fills the rows of the tokens from `start` on."""
        artifact = self.artifact
        longest = artifact.config.orders[-1]
        window = self._lookbacks(tokens, joined, start, len(out), longest)
        unsigned = out.view(np.uint32)
        for layer, (factors, primes) in enumerate(zip(artifact.multipliers, artifact.primes)):
            mix = window[0] * factors[0]
            column = 0
            for order in range(2, longest + 1):
                mix ^= window[order - 1] * factors[order - 1]
                if order not in artifact.config.orders:
                    continue
                for local in remainders(mix, primes[artifact.config.orders.index(order)], scratch):
                    np.add(local, self._offsets[layer, column], out=unsigned[:, layer, column])
                    column += 1

    def _lookbacks(
        self, tokens: Int[np.ndarray, " all"], joined: Bool[np.ndarray, " all"], start: int, count: int, longest: int
    ) -> Int64[np.ndarray, "lookback chunk"]:
        """The classes of the chunk's tokens, of those before them, and so on."""
        window = np.full((longest, count), self.artifact.pad, np.int64)
        window[0] = self._lookup[tokens[start : start + count]]
        reaches = np.ones(count, bool)
        for back in range(1, longest):
            skip = max(0, back - start)  # tokens of the chunk that have none so far back at all
            here = slice(max(start, back) - back, start + count - back)
            before = joined[here.start + 1 : here.stop + 1]
            reaches[skip:] &= before
            window[back, skip:] = np.where(reaches[skip:], self._lookup[tokens[here]], self.artifact.pad)
        return window


def remainders(mix: Int64[np.ndarray, " n"], primes: Int64[np.ndarray, " heads"], scratch: Scratch) -> UInt32[np.ndarray, "heads n"]:
    """mix mod p for each p, exactly. The result lies in `scratch`, and the next call overwrites it.

    With p at least 8192: let u = 2^-53. The float64 values of mix, of 1/p and of their product each have a relative error of at most u, so
    the product differs from mix/p, which is below 2^63/p, by less than 2^63/p x 3.01 u < 3083/p < 0.38. It is below 2^50, so adding 2^52
    rounds it to a whole number q, by at most 0.5 away: |mix/p - q| < 0.88, hence |mix - q p| < p. That difference is the remainder, or p
    less. The low 32 bits of mix and q give it modulo 2^32; of the two candidates the wrong one is negative, which as an unsigned number is
    above 2^31 and so above every p, or is the remainder plus p.

    Args:
      mix: 0 to 2^63 - 1.
      primes: 2 to 2^31 - 1; below 8192, where the proof fails, NumPy divides.
      scratch: of as many heads and at least as many columns.
    """
    heads, count = len(primes), len(mix)
    remainder, other = scratch.remainder[:heads, :count], scratch.other[:heads, :count]
    if primes.min() < SMALLEST_FAST:
        remainder[:] = mix[None] % primes[:, None]
        return remainder
    quotients: Float64[np.ndarray, "heads n"] = scratch.quotients[:heads, :count]
    divisors = primes[:, None].astype(np.uint32)
    np.multiply(mix.astype(np.float64)[None], (1.0 / primes)[:, None], out=quotients)
    np.add(quotients, _TO_INTEGER, out=quotients)
    np.copyto(remainder, quotients.view(np.uint64), casting="unsafe")  # the low 32 bits
    np.multiply(remainder, divisors, out=remainder)
    np.subtract(mix.astype(np.uint32)[None], remainder, out=remainder)
    np.add(remainder, divisors, out=other)
    return np.minimum(remainder, other, out=remainder)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
