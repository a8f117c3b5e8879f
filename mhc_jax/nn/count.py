"""How many parameters a config has, by shape alone: nothing is allocated."""

from dataclasses import dataclass

import jax
import numpy as np

from mhc_jax.config import ModelConfig
from mhc_jax.engram_layout import table_rows
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import named_parameters


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int  # used for one token: without the input embedding and the experts that it does not visit
    connection: int  # of the residual connections, the learned collapse included
    table: int = 0  # rows that n-grams look up, padding not counted; a part of the total and not active


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a config, any size, in a moment."""
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    sizes = {name: int(np.prod(leaf.shape)) for name, leaf in named_parameters(model)}
    table = 0 if config.engram is None else sum(table_rows(config.engram)) * config.engram.head_dim
    total = sum(sizes.values()) + table
    connection = sum(size for name, size in sizes.items() if "connection." in name or name.startswith("head."))
    active = total - sizes["embedding"] - idle_experts(config) - table
    return ParameterCount(total=total, active=active, connection=connection, table=table)


def idle_experts(config: ModelConfig) -> int:
    """Parameters of the routed experts that one token does not visit, over all layers: three matrices an expert."""
    idle = config.moe.num_experts - config.moe.top_k
    return 3 * config.dim * config.moe.expert_dim * idle * (config.num_layers - config.dense_layers)
