"""How JAX is set up for a command. Kept from modules that only read options, because it imports JAX."""

import os


def prepare_jax() -> None:
    """Compiled programs are kept between runs, and on a CPU the memory of a step for the next."""
    import jax

    from mhc_jax.data.prepare import cache_root
    from mhc_jax.parallel.devices import prefer_cpu_without_tpu
    from mhc_jax.train.host_memory import keep_freed_memory

    prefer_cpu_without_tpu()
    keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
