"""The named configurations: each is a function that returns a `Config`, and its docstring says what to expect and at what cost."""

from collections.abc import Callable

from mhc_jax.config import Config
from mhc_jax.configs import depth30, engram, laptop, large, paper, sparse
from mhc_jax.errors import UserError

CONFIGS: dict[str, Callable[[], Config]] = {
    "laptop": laptop.laptop,
    "depth30": depth30.depth30,
    "3b": paper.paper_3b,
    "9b": paper.paper_9b,
    "27b": paper.paper_27b,
    "3b_1t": paper.paper_3b_1t,
    "engram_27b": engram.engram_27b,
    "engram_40b": engram.engram_40b,
    "engram_moe_27b": engram.engram_moe_27b,
    "engram_dense_4b": engram.engram_dense_4b,
    "deepseek_v32": sparse.deepseek_v32,
    "dsa_laptop": sparse.dsa_laptop,
    "v3_671b": large.v3_671b,
    "moe_1t": large.moe_1t,
}


def get(name: str) -> Config:
    """The named config.

    Raises:
      UserError: there is no such name; the message lists those that exist.
    """
    if name not in CONFIGS:
        raise UserError(f"there is no config {name!r}; choose one of {', '.join(CONFIGS)}")
    return CONFIGS[name]()
