"""SIGTERM: what a machine sends before it is taken away. The run saves its state after the step at hand and ends.

With several processes all of them end after the same step, by JAX's preemption service, which catches the signal itself.
"""

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from mhc_jax.errors import Preempted

# What the service takes for the number of the step. It must rise, also when a run goes back or another run follows.
_questions = itertools.count()


class Preemption:
    """Catches SIGTERM while a run goes on. A context manager.

    Until `defer` is called there is nothing to save, and the signal raises Preempted at once. Outside the main thread, where Python
    catches no signals, nothing is done.
    """

    def __init__(self) -> None:
        self._catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._previous: Any = None
        self._deferred = False
        self._received = False

    def defer(self) -> None:
        """From here on the signal waits for the next call of `reached`."""
        self._deferred = True

    def reached(self) -> bool:
        """Whether the run must end after this step; the same in every process, each of which must ask after every step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(next(_questions)))
        return self._received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if not self._deferred:
            raise Preempted("stopped by SIGTERM before the first step; the same command begins again or goes on")

    def __enter__(self) -> "Preemption":
        if self._catches:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._catches:
            return
        signal.signal(signal.SIGTERM, self._previous)
        if self._received and error is None:  # too late to cut the run short, but a list of runs must not go on
            raise Preempted("stopped by SIGTERM when the run had just finished")
