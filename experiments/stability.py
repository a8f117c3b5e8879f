"""How do composite gains grow with depth and width? The stability ablation of mHC's paper as far as two CPU cores go.

Every run is `depth30` with fewer steps, at the depth and width that its name says, one seed. What the trained mappings say of deeper models
is the part of stability_at_depth; what the paper reports stands in docs/stability.md.
"""

from mhc_jax.config import Config, override
from mhc_jax.configs.depth30 import depth30
from mhc_jax.experiments.runs import Run, RunList

NAME = "stability"
KINDS = ("residual", "hc", "mhc")
SETTINGS = ((15, 64), (30, 32), (30, 64), (30, 128), (61, 64))  # layers and width, the cheapest first; 61 layers are DeepSeek-V3's
STEPS = 120
EVERY = 40  # steps between evaluations


def variant(kind: str, layers: int, width: int) -> str:
    """Name of a kind at a setting."""
    return f"{kind} {layers} layers, width {width}"


def setting(kind: str, layers: int, width: int) -> Config:
    """`depth30` at another depth, and at another width with hidden widths in the same proportion."""
    base = depth30()
    scale = width / base.model.dim
    changes = {
        "name": NAME,
        "model.residual": kind,
        "model.num_layers": layers,
        "model.dim": width,
        "model.dense_dim": round(scale * base.model.dense_dim),
        "model.moe.expert_dim": round(scale * base.model.moe.expert_dim),
        "train.steps": STEPS,
        "train.eval_every": EVERY,
        "train.eval_sequences": 8,
        "train.checkpoint_every": STEPS,
    }
    return override(base, changes)


def stability() -> RunList:
    """The list of `mhc-jax ablate stability`: fifteen runs, setting by setting, so that a list that is cut holds whole comparisons."""
    runs = tuple(
        Run(f"{kind}-l{layers}-d{width}", variant(kind, layers, width), setting(kind, layers, width))
        for layers, width in SETTINGS
        for kind in KINDS
    )
    question = (
        "How do composite gains grow with depth and width, for unconstrained and for doubly stochastic mappings? Each run is `depth30` "
        f"with {STEPS} steps at the named depth and width, one seed. Losses of different settings are no comparison of kinds."
    )
    return RunList(NAME, question, runs, variant("residual", 30, 64))
