"""The studies that have a name: `mhc-jax study NAME`."""

from mhc_jax.experiments import economics, needle, sparse_attention_cost
from mhc_jax.experiments.study import Study

STUDIES: dict[str, Study] = {sparse_attention_cost.NAME: sparse_attention_cost.run, needle.NAME: needle.run, economics.NAME: economics.run}
