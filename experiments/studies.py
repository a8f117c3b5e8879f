"""The studies that have a name: `mhc-jax study NAME`. Those in SOURCES read the runs of a list, by default the one that is named there."""

from mhc_jax.experiments import economics, needle, sparse_attention_cost, stability, stability_at_depth
from mhc_jax.experiments.study import Study

STUDIES: dict[str, Study] = {
    sparse_attention_cost.NAME: sparse_attention_cost.run,
    needle.NAME: needle.run,
    economics.NAME: economics.run,
    stability_at_depth.NAME: stability_at_depth.run,
}
SOURCES = {stability_at_depth.NAME: stability.NAME}
