"""The run lists that have a name of their own: `mhc-jax ablate NAME`. Lists of one config's residual kinds are ablation's part."""

from collections.abc import Callable

from mhc_jax.experiments.depth_search import depth_search
from mhc_jax.experiments.engram_allocation import engram_allocation
from mhc_jax.experiments.runs import RunList
from mhc_jax.experiments.scaling import scaling_laptop

RUN_LISTS: dict[str, Callable[[], RunList]] = {
    "depth30_search": depth_search,
    "engram_allocation": engram_allocation,
    "scaling_laptop": scaling_laptop,
}
