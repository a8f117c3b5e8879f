"""The studies that have a name: `mhc-jax study NAME`. Those in SOURCES read the runs of a list, by default the one that is named there."""

from mhc_jax.experiments import economics, needle, scaling_refit, sparse_attention_cost, stability, stability_at_depth
from mhc_jax.experiments.study import Study

STUDIES: dict[str, Study] = {
    module.NAME: module.run for module in (sparse_attention_cost, needle, economics, scaling_refit, stability_at_depth)
}
SOURCES = {stability_at_depth.NAME: stability.NAME}
