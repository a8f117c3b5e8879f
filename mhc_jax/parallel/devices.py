"""Whether this machine has a TPU or GPU at all, told without waking JAX: libtpu on a machine without a TPU complains at length."""

import importlib.util
import os
from pathlib import Path

import jax

DEVICE_FILES = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "dxg")  # of TPUs and GPUs on Linux


def has_accelerator() -> bool:
    """Whether a TPU or GPU has a device file here."""
    return any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES)


def prefer_cpu_without_tpu() -> None:
    """Before JAX is first used: no TPU is looked for where libtpu is installed only as a compiler. What the user set stays."""
    if importlib.util.find_spec("libtpu") and not has_accelerator() and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
