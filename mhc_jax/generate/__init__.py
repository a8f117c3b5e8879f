"""Text from a trained run: `Generator.open(folder).generate(prompts)`. The network's side of it is `mhc_jax.nn.decode`."""

from mhc_jax.generate.generator import Generated, Generator
from mhc_jax.generate.sampling import Sampling

__all__ = ["Generated", "Generator", "Sampling"]
