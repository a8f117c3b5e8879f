"""How many parameters a config has, by shape alone: nothing is allocated."""

from dataclasses import dataclass

import jax
import numpy as np

from mhc_jax.config import ModelConfig
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import named_parameters


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int  # used for one token: without the input embedding and the experts that it does not visit
    connection: int  # of the residual connections, the learned collapse included


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a config, any size, in a moment."""
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    sizes = {name: int(np.prod(leaf.shape)) for name, leaf in named_parameters(model)}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if name in ("moe_layers.ffn.inner", "moe_layers.ffn.out"))
    idle = routed - routed * config.moe.top_k // config.moe.num_experts
    connection = sum(size for name, size in sizes.items() if "connection." in name or name.startswith("head."))
    return ParameterCount(total=total, active=total - sizes["embedding"] - idle, connection=connection)
