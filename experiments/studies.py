"""The studies that have a name: `mhc-jax study NAME`."""

from mhc_jax.experiments import economics, needle, scaling_refit, sparse_attention_cost
from mhc_jax.experiments.study import Study

STUDIES: dict[str, Study] = {module.NAME: module.run for module in (sparse_attention_cost, needle, economics, scaling_refit)}
