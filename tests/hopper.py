"""Where a Hopper GPU is, the tests of GPU kernels run them on it; everywhere else they interpret them on the CPU."""

import jax
import pytest

from pallas_kernels.choose import HOPPER

INTERPRET = not any(name in jax.devices()[0].device_kind for name in HOPPER)
on_hopper = pytest.mark.skipif(INTERPRET, reason="a shape for a Hopper GPU, which this machine has not")
in_the_interpreter = pytest.mark.skipif(not INTERPRET, reason="asks the interpreter what happens before what")
