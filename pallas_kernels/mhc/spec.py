"""What a connection between sublayers is made of, as the kernels see it: its options, its weights, and how its coefficients are packed."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax


@dataclass(frozen=True)
class Mapping:
    """How the coefficients of a sublayer are predicted from n streams.

    Coefficients are packed as `h` [rows, T] float32, tokens last: n rows of pre, n of post, then n*n of res, row-major. Row i of res says
    how stream i is made: x'_i = sum_j res_ij x_j + post_i y. Where res is the identity, its rows are left out.

    The defaults are the paper's (arXiv 2512.24880, Eq. 7-9 and Table 5). DeepSeek-V4's code has norm_eps, pre_eps and sinkhorn_eps 1e-6;
    V4.1 has norm_eps 1e-20 and reads with the previous sublayer's pre (arXiv 2609.19969, section 2.4.1).
    """

    n: int
    mixes: bool = True  # False: res is the identity
    sinkhorn_steps: int = 20
    norm_eps: float = 1e-20
    pre_eps: float = 0.0  # added to pre
    sinkhorn_eps: float = 0.0  # added to the entries after the first column step, and to every sum that follows
    reads: Literal["own", "previous"] = "own"  # whose pre reads the streams: this sublayer's, or the one before

    def __post_init__(self):
        if not 1 <= self.n <= 8:
            raise ValueError(f"n is {self.n}; 1 to 8 streams are supported")
        if self.sinkhorn_steps < 1:
            raise ValueError(f"sinkhorn_steps is {self.sinkhorn_steps}; at least 1 is needed")
        if self.reads not in ("own", "previous"):
            raise ValueError(f'reads is {self.reads!r}; it is "own" or "previous"')

    @property
    def groups(self) -> tuple[int, ...]:
        """Rows of pre, post and res."""
        return (self.n, self.n, self.n**2) if self.mixes else (self.n, self.n)

    @property
    def rows(self) -> int:
        """Rows of h: n * (n + 2), or 2 n where res is the identity."""
        return sum(self.groups)


class Weights(NamedTuple):
    """Parameters of one sublayer's mapping, float32 whatever the streams' type; K is `Mapping.rows`."""

    phi: jax.Array  # [K, n*C]
    alpha: jax.Array  # [3], or [2] where res is the identity: gates of pre, post, res
    bias: jax.Array  # [K]
