"""Eight fake devices, no silent broadcasting over missing axes, and array shapes checked at run time, for every test."""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the suite's time

# The shapes in the signatures of these packages are checked while functions are traced. The hook must be in place before their import.
install_import_hook(["mhc_jax.nn", "mhc_jax.parallel"], "beartype.beartype")

from mhc_jax.nn import remat  # noqa: E402

remat.LONGEST_UNROLLED = 0  # a loop over layers compiles faster; one test compares it with unrolled layers


@pytest.fixture
def float64():
    """64-bit arrays for one test: create them inside, everything computed from them is float64."""
    with jax.enable_x64(True):
        yield
