"""TensorBoard events of a run, written by the thread that trains.

A thread of its own, as in the usual writers, would end on a full disk, and training would wait for ever to hand it the next event.
"""

import contextlib
import socket
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mhc_jax.files import AnyPath

FLUSH_SECONDS = 30


class Events:
    """A new event file in a folder of this machine; TensorBoard reads such files as they grow."""

    def __init__(self, folder: AnyPath, purge_step: int):
        """TensorBoard drops what earlier files in the folder hold of `purge_step` and later."""
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"))
        self._flushed = time.monotonic()
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds one point of a curve; it reaches the disk with the next `flush`, half a minute later at most."""
        self._write(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes what has been added visible to TensorBoard."""
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Stores what has been added and closes the file, also when it cannot be stored."""
        with contextlib.closing(self._records):
            self.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
