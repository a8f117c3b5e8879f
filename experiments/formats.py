"""Numbers as text, one way each. A value that does not exist is a dash; one that was not finite says so."""

import math

from mhc_jax.experiments.results import Statistic

NONE = "–"
NOT_FINITE = "not finite"


def loss(value: float) -> str:
    """Nats, 4 decimals."""
    return f"{value:.4f}"


def gap(value: float) -> str:
    """A difference of losses in nats, signed, 4 decimals."""
    return f"{value:+.4f}"


def significant(value: float) -> str:
    """Three significant digits, without an exponent between 0.0001 and a million: 3120, 1.62, 0.0412, 4.51e10."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{round(value):,}"


def percent(value: float) -> str:
    """A share, one decimal."""
    return f"{100 * value:.1f} %"


def mebibytes(value: float) -> str:
    """Bytes as MiB."""
    return f"{value / 2**20:,.0f} MiB"


def mean(value: Statistic | None, form) -> str:
    """The mean of a statistic by one of the functions above."""
    if value is None or value.seeds == 0:
        return NONE
    return NOT_FINITE if value.mean is None else form(value.mean)


def mean_and_spread(value: Statistic | None, form) -> str:
    """The same with the standard deviation over seeds, where there is one."""
    text = mean(value, form)
    return text if value is None or value.spread is None else f"{text} ± {value.spread:.4f}"
