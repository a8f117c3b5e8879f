"""Tests through the TPU compiler run where it exists: libtpu is for Linux on x86-64 alone, and the extra `test` installs it."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("libtpu") else ["test_compiled.py"]
