"""Where should sparse parameters go, to experts or to n-gram memory? The allocation sweep of Engram's paper at laptop size.

P_sparse, the parameters that a token does not use, stays what it is; rho of it are experts and the rest tables (arXiv 2601.07372, section
3). All runs have the same active parameters: the dense first layer of those without a memory is wider by what Engram's projections have.
"""

from dataclasses import dataclass
from typing import Any

from mhc_jax.config import Config, override
from mhc_jax.configs.laptop import laptop
from mhc_jax.engram_config import EngramConfig
from mhc_jax.experiments.runs import Run, RunList
from mhc_jax.nn.count import idle_experts

NAME = "engram_allocation"
BASELINE = "rho 1"
SHARES = (0.85, 0.7, 0.5, 0.25)
SEEDS = 2
STEPS = 200
EXPERTS = 22  # of a layer at rho = 1, two of them active
LAYERS, HEADS, HEAD_DIM = (1, 3), 4, 16  # layers with a memory, counted from 0


@dataclass(frozen=True)
class Budget:
    """Parameters of a config, as the allocation counts them."""

    sparse: int  # experts that a token does not visit, and tables
    projections: int  # Engram's own dense parameters


def base() -> Config:
    """The run without memory and with all of the budget in experts."""
    changes = {
        "name": NAME,
        "model.moe.num_experts": EXPERTS,
        "train.steps": STEPS,
        "train.checkpoint_every": STEPS,
        "train.eval_every": 50,
    }
    return override(laptop(), changes)


def budget() -> Budget:
    """The sparse parameters of `base`, and what a memory in LAYERS adds to the active ones."""
    m = base().model
    n, width = m.connections.streams, 2 * HEADS * HEAD_DIM
    # keys and value, gains of queries and keys, convolution and its gain
    of_layer = width * (n + 1) * m.dim + 2 * n * m.dim + 5 * n * m.dim
    return Budget(idle_experts(m), of_layer * len(LAYERS))


def engram(share: float) -> EngramConfig:
    """A memory with this share of the sparse parameters."""
    rows = share * budget().sparse / HEAD_DIM / len(LAYERS) / (2 * HEADS)
    return EngramConfig(layers=LAYERS, table_sizes=(round(rows),) * 2, heads=HEADS, head_dim=HEAD_DIM)


def engram_allocation() -> RunList:
    """The list of `mhc-jax ablate engram_allocation`."""
    m = base().model
    wider = round(budget().projections / (3 * m.dim))
    variants: dict[str, dict[str, Any]] = {
        BASELINE: {"model.dense_dim": m.dense_dim + wider},
        "rho 1, not made up": {},
    }
    for rho in SHARES:
        active, idle = m.moe.top_k, m.moe.num_experts - m.moe.top_k
        experts = active + round(rho * idle)
        variants[f"rho {rho:g}"] = {"model.moe.num_experts": experts, "model.engram": engram(1 - (experts - active) / idle)}
    runs = tuple(
        Run(f"{variant.replace(', ', '_').replace(' ', '_')}-seed{seed}", variant, override(base(), {**changes, "train.seed": seed}))
        for seed in range(SEEDS)
        for variant, changes in variants.items()
    )
    question = (
        "At equal total and equal active parameters, what share rho of the sparse parameters should be experts, the rest being Engram's "
        f"tables? Each run is `laptop` with {EXPERTS} experts a layer at rho 1. `{BASELINE}` is the control without memory: its dense "
        "layer has the parameters that Engram's projections have. `rho 1, not made up` leaves them out."
    )
    return RunList(NAME, question, runs, BASELINE)
