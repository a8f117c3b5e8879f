"""The roofline of serving: the least dollars a token can cost, were chips' peaks all that bounds them.

Matrix products and index scores run at the 8-bit peak, all else (`plan.flops.KINDS`) at that of bfloat16; weights take one byte a
parameter, the cache its published 8-bit form. Not in it: communication, imbalance of experts, kernels that miss the peak, idle chips,
limits of latency; nor speculative decoding, which reads weights and caches once for more than one token. What carries over is how cost
grows with the context.
"""

from dataclasses import dataclass
from functools import cache

from mhc_jax.config import Config, ModelConfig
from mhc_jax.nn.count import count_parameters, idle_experts
from mhc_jax.plan.cost import Accelerator
from mhc_jax.plan.flops import Flops, Kind, cache_bytes, cache_row, decode_flops, prefill_flops

NARROW: tuple[Kind, ...] = ("matrices", "index")
WIDE: tuple[Kind, ...] = ("wide", "attention", "streams")
USABLE = 0.9  # share of HBM that weights and caches may fill


def compute_seconds(flops: Flops, chip: Accelerator) -> float:
    """Of one chip at its peaks."""
    narrow, wide = (sum(flops.of(kind) for kind in kinds) for kinds in (NARROW, WIDE))
    return narrow / chip.narrow_flops_per_second + wide / chip.flops_per_second


@dataclass(frozen=True)
class Decoding:
    """A step that gives each of `batch` sequences one token, on all chips together."""

    batch: int  # as many sequences as fit beside the weights
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """What is longer; the other hides behind it."""
        return max(self.compute_seconds, self.memory_seconds)


@dataclass(frozen=True)
class Service:
    """A config that serves on so many chips of a kind, at so many dollars an hour each."""

    config: Config
    chip: Accelerator
    chips: int
    dollars_per_hour: float

    def prefill_dollars(self, length: int) -> float:
        """For a million tokens of prompts, each seeing `length` tokens; bound by compute, weights being read once for many of them."""
        return self._dollars(compute_seconds(prefill_flops(self.config, length - 1), self.chip))

    def decode(self, length: int) -> Decoding:
        """A step of sequences that are all `length` tokens long.

        Raises:
          ValueError: not one sequence fits beside the weights.
        """
        m, weights = self.config.model, _weights(self.config.model)
        room = self.chips * self.chip.hbm_bytes * USABLE - weights
        batch = int(room / cache_bytes(self.config, length, "float8"))
        if batch < 1:
            raise ValueError(f"not one sequence of {length} tokens fits on {self.chips} chips beside {weights / 1e9:.0f} GB of weights")
        missed = (1 - m.moe.top_k / m.moe.num_experts) ** (batch - 1)  # of the experts idle for one sequence, the share idle for all
        row, sparse = cache_row(self.config, "float8"), m.attention.sparse
        latents = length if sparse is None else min(length, sparse.top_k)
        kept = m.num_layers * (row.latent * latents + row.index_key * length)
        read = weights - missed * idle_experts(m) + batch * kept
        compute = batch * compute_seconds(decode_flops(self.config, length - 1), self.chip)
        return Decoding(batch, compute / self.chips, read / (self.chips * self.chip.hbm_bytes_per_second))

    def decode_dollars(self, length: int) -> float:
        """For a million tokens, each seeing `length` tokens.

        Raises:
          ValueError: as `decode`.
        """
        step = self.decode(length)
        return self._dollars(step.seconds * self.chips / step.batch)

    def _dollars(self, chip_seconds: float) -> float:
        return 1e6 * chip_seconds * self.dollars_per_hour / 3600


@cache
def _weights(model: ModelConfig) -> int:
    """Bytes of the weights on the chips; the rows of Engram's tables lie in host memory."""
    count = count_parameters(model)
    return count.total - count.table
