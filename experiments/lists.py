"""The run lists that have a name of their own: `mhc-jax sweep NAME`, or `ablate NAME`. Lists of residual kinds are ablation's."""

from collections.abc import Callable

from mhc_jax.experiments.depth_search import depth_search
from mhc_jax.experiments.engram_allocation import engram_allocation
from mhc_jax.experiments.learning_rates import laptop_learning_rates
from mhc_jax.experiments.runs import RunList
from mhc_jax.experiments.scaling import scaling_laptop
from mhc_jax.experiments.stability import stability

RUN_LISTS: dict[str, Callable[[], RunList]] = {
    "depth30_search": depth_search,
    "engram_allocation": engram_allocation,
    "laptop_learning_rates": laptop_learning_rates,
    "scaling_laptop": scaling_laptop,
    "stability": stability,
}
