"""Where does unconstrained HC amplify? The search behind the config `depth30`: depth, learning rate, kind of HC, QK-norm.

Every run is `depth30` at the learning rate of `laptop`, with the fields changed that its name says, seed 0, 200 steps. Runs that do not
show the effect stay in the list.
"""

from typing import Any

from mhc_jax.config import override
from mhc_jax.configs.depth30 import depth30
from mhc_jax.experiments.runs import Run, RunList

BASELINE = "residual"
FIRST_RATE = 1.5e-3  # learning rate of the runs that name none: that of `laptop`, where the search began


def depth_search() -> RunList:
    """The list of `mhc-jax ablate depth30_search`."""
    rate, depth, norm = "optimizer.learning_rate", "model.num_layers", "model.attention.qk_norm"
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        BASELINE: ("residual", {}),
        "residual lr 7.5e-4": ("residual", {rate: 7.5e-4}),
        "residual lr 3e-3": ("residual", {rate: 3e-3}),
        "residual lr 6e-3": ("residual", {rate: 6e-3}),
        "residual qk-norm": ("residual", {norm: True}),
        "hc": ("hc", {}),
        "hc lr 1.9e-4": ("hc", {rate: 1.9e-4}),
        "hc lr 3.8e-4": ("hc", {rate: 3.8e-4}),
        "hc lr 7.5e-4": ("hc", {rate: 7.5e-4}),
        "hc lr 3e-3": ("hc", {rate: 3e-3}),
        "hc qk-norm": ("hc", {norm: True}),
        "hc lr 3e-3 qk-norm": ("hc", {rate: 3e-3, norm: True}),
        "hc 6 layers": ("hc", {depth: 6}),
        "hc 12 layers": ("hc", {depth: 12}),
        "static_hc": ("static_hc", {}),
        "mhc": ("mhc", {}),
        "mhc lr 3e-3": ("mhc", {rate: 3e-3}),
        "mhc qk-norm": ("mhc", {norm: True}),
    }
    base = override(depth30(), {"name": "depth30_search", rate: FIRST_RATE, "train.steps": 200, "train.checkpoint_every": 200})
    runs = tuple(
        Run(variant.replace(" ", "_"), variant, override(base, {"model.residual": kind, **changes}))
        for variant, (kind, changes) in settings.items()
    )
    question = (
        "At which depth, learning rate and form of hyper-connections does the residual path amplify, and what does QK-norm change? "
        "Each run is `depth30` at learning rate 1.5e-3, with the named fields changed, one seed, 200 steps."
    )
    return RunList("depth30_search", question, runs, BASELINE)
