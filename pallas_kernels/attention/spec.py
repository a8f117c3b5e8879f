"""What dense attention returns. The functions stand in `api`."""

from typing import NamedTuple

import jax


class Attended(NamedTuple):
    """The attended values, and two numbers a query that have no gradient."""

    out: jax.Array  # [B, H, S, V], in the type of the values
    log_total: jax.Array  # [B, H, S] float32 or wider: logarithm of the sum of exponentials of a query's scaled logits
    top: jax.Array  # [B, H, S] float32 or wider: its largest scaled logit
