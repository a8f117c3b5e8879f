"""Bytes that are moved rather than multiplied: residual streams, and the rows that Engram reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

from mhc_jax.engram_config import EngramConfig
from mhc_jax.engram_layout import table_rows


def stream_traffic(n: int) -> dict[str, int]:
    """Reads and writes of n streams a token and sublayer, forward, in units of one stream's width C; coefficients left out.

    plain     x + F(x): 2 C read, C written
    unfused   HC as separate operations (arXiv 2512.24880, Table 2): (5n+1) C read, (3n+1) C written; 34 C for n = 4
    fused     mHC's published kernels, a sublayer's mapping, read and write-with-merge: (3n+1) C and (n+1) C; 18 C
    seam      one pass that writes a sublayer's output and reads the next one's input, as `pallas_kernels.mhc` does: (n+1) C each; 10 C
    """
    return {"plain": 3, "unfused": (5 * n + 1) + (3 * n + 1), "fused": (3 * n + 1) + (n + 1), "seam": 2 * (n + 1)}


def kept_streams(n: int, sublayers: int, block: int) -> int:
    """Activations in units of C a token when streams are kept each `block` sublayers and the rest is computed anew.

    Source: arXiv 2512.24880, Eq. 20. What F itself returns, C a sublayer, is kept besides.
    """
    return n * ceil(sublayers / block) + (n + 2) * block


def best_block(n: int, sublayers: int) -> int:
    """The block at which `kept_streams` is least; near sqrt(n sublayers / (n + 2))."""
    return min(range(1, sublayers + 1), key=lambda block: kept_streams(n, sublayers, block))


@dataclass(frozen=True)
class Rows:
    """What one token reads from Engram's tables, and how large these are."""

    rows: int  # of all layers
    row_bytes: float
    table_bytes: float

    @property
    def bytes(self) -> float:
        return self.rows * self.row_bytes


def engram_rows(engram: EngramConfig, *, number_bytes: float = 2, scale_every: int | None = None) -> Rows:
    """Rows of one token.

    Args:
      number_bytes: of a number; 2 is bfloat16, 1 is DeepSeek-V4.1's float8.
      scale_every: numbers that share a scale of one byte; None: there are no scales.
    """
    row = engram.head_dim * number_bytes + (0 if scale_every is None else engram.head_dim / scale_every)
    return Rows(len(engram.layers) * engram.all_heads, row, sum(table_rows(engram)) * row)


@dataclass(frozen=True)
class Level:
    """A memory that tables may lie in, as one chip reaches it."""

    name: str
    bytes_per_second: float
    grain: int  # bytes that a read moves at least
    reads_per_second: float | None = None  # where that is the limit

    def tokens_per_second(self, rows: Rows) -> float:
        """Tokens whose rows it delivers, every row read alone and none twice."""
        moved = ceil(rows.row_bytes / self.grain) * self.grain * rows.rows
        limit = self.bytes_per_second / moved
        return limit if self.reads_per_second is None else min(limit, self.reads_per_second / rows.rows)


# Figures of data sheets, for one chip: HBM of an H800; PCIe 5 of 16 lanes, one direction; a network card of 400 Gbit/s; an NVMe drive on
# PCIe 5 (14 GB/s, 2.5 million random reads of 4 KiB a second). Latency is not in them: rows are known long before their layer needs them.
LEVELS: Sequence[Level] = (
    Level("HBM", 3.35e12, 64),
    Level("host memory, PCIe 5", 64e9, 64),
    Level("another host, 400 Gbit/s", 50e9, 64),
    Level("NVMe, PCIe 5", 14e9, 4096, 2.5e6),
)


def zipf_misses(cached: float, rows: float, exponent: float) -> float:
    """Share of reads that miss a cache of the hottest rows, where the k-th hottest row is read in proportion to k^-exponent.

    Args:
      cached: share of the rows that is cached, in (0, 1].
      rows: how many there are.
      exponent: of Zipf's law.
    """
    return 1 - _harmonic(max(1.0, cached * rows), exponent) / _harmonic(rows, exponent)


def _harmonic(n: float, s: float) -> float:
    """The sum of k^-s for k up to n, beyond the first thousand terms by the integral."""
    head = int(min(n, 1000))
    total = sum(k**-s for k in range(1, head + 1))
    if n > head:
        a, b = head + 0.5, n + 0.5
        total += (b ** (1 - s) - a ** (1 - s)) / (1 - s) if s != 1 else log(b / a)
    return total
