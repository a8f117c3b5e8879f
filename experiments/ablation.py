"""The stability ablation: one config trained with each residual connection. It changes that one field and the seed, nothing else."""

from collections.abc import Sequence

from mhc_jax.config import Config, override
from mhc_jax.errors import UserError
from mhc_jax.experiments.runs import Run, RunList

BASELINE = "residual"
MOST_SEEDS = 1000  # more is a slip of the hand, and would fill the run list's file


def ablation(config: Config, *, kinds: Sequence[str] = ("residual", "hc", "mhc", "identity_hc"), seeds: int = 1) -> RunList:
    """The list of `config` with each residual kind, each with the seeds `config.train.seed + 0 .. seeds - 1`.

    Runs are ordered by seed first, so that a list that is cut short still holds complete comparisons. Without the kind `residual` there is
    no baseline.

    Raises:
      UserError: `seeds` is not positive or absurd, a kind is unknown, or a kind is named twice.
    """
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; at least 1 is needed")
    if seeds > MOST_SEEDS:
        raise UserError(f"seeds is {seeds}; at most {MOST_SEEDS} are supported")
    runs = tuple(
        Run(f"{kind}-seed{seed}", kind, override(config, {"model.residual": kind, "train.seed": config.train.seed + seed}))
        for seed in range(seeds)
        for kind in kinds
    )
    question = (
        f"Does the way in which sublayers are joined change the held-out loss and the stability of `{config.name}`, with the same data, "
        "the same order of it and the same hyperparameters?"
    )
    return RunList(config.name, question, runs, BASELINE if BASELINE in kinds else None)
