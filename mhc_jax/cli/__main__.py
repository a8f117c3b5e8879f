"""`python -m mhc_jax.cli`."""

import sys

from mhc_jax.cli import main

sys.exit(main())
