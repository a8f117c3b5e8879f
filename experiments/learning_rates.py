"""Learning-rate grids: each residual kind at each rate with the same seeds. How their results are read is the part of rates."""

from collections.abc import Sequence

from mhc_jax.config import Config, override
from mhc_jax.configs.laptop import laptop
from mhc_jax.errors import UserError
from mhc_jax.experiments.runs import RunList
from mhc_jax.experiments.sweeps import SEED, field, product, sweep

RATE = "optimizer.learning_rate"
KINDS = ("residual", "hc", "mhc")
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
STEPS = 200


def learning_rates(config: Config, kinds: Sequence[str], rates: Sequence[float], seeds: Sequence[int] = (0, 1)) -> RunList:
    """The list of `config` with each residual kind at each learning rate, each with the same seeds.

    A comparison at one rate measures which kind that rate suits; here each is also compared at its own best. Runs are ordered by seed
    first, so that a list that is cut short holds whole grids. The baseline is the first kind at the config's own rate, or at the middle one
    where that is not among `rates`.

    Raises:
      UserError: fewer than three rates, which could not tell a best rate from the edge of the grid; or as `sweep`.
    """
    if len(rates) < 3:
        raise UserError(f"a learning-rate grid of {len(rates)} rates has no inside; give at least 3")
    rates = sorted(rates)
    points = product(field(SEED, *seeds), field("model.residual", *kinds), field(RATE, *rates))
    own = config.optimizer.learning_rate
    baseline = {"model.residual": kinds[0], RATE: own if own in rates else rates[len(rates) // 2]}
    question = (
        f"At which learning rate is each way of joining sublayers best in `{config.name}`, and how do they compare there? All else is "
        "equal, the order of the data for equal seeds included."
    )
    return sweep(config.name, question, config, points, baseline=baseline)


def laptop_learning_rates() -> RunList:
    """The list of `mhc-jax sweep laptop_learning_rates`: three kinds, four rates, two seeds of `laptop`, with fewer steps.

    Cost: about half an hour on two CPU cores, worked out from that of `laptop` (four variants of 300 steps in under 6 minutes). The list
    has not been timed as a whole.
    """
    changes = {"name": "laptop_learning_rates", "train.steps": STEPS, "train.checkpoint_every": STEPS}
    return learning_rates(override(laptop(), changes), KINDS, RATES)
