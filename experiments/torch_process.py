"""The PyTorch baseline as a process beside this one, which takes a step when it is told to. `torch_baseline.py` is what runs in it."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mhc_jax.config import Config, fields
from mhc_jax.errors import UserError

SCRIPT = Path(__file__).with_name("torch_baseline.py")


class TorchBaseline:
    """Steps of the plain PyTorch model of a config's shape. `about` is what the process says of itself."""

    def __init__(self, process: subprocess.Popen[str], messages: IO[str], config: Config):
        """Waits some minutes, while the process tries its setups."""
        self._process, self._messages = process, messages
        self.about = self._ask({"shape": dict(fields(config)), "threads": cores()})

    def step(self) -> float:
        """Takes one step; its seconds."""
        return float(self._ask({})["seconds"])

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._messages.seek(0)
            last = (self._messages.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the PyTorch process ended ({last}); --torch-python needs an environment with torch and transformers")
        return json.loads(answer)


@contextmanager
def torch_baseline(python: Path, config: Config) -> Iterator[TorchBaseline]:
    """The baseline in a process of the interpreter `python`, with as many threads as this process has cores.

    Raises:
      UserError: there is no such interpreter, or the process ended; its last line of stderr says why.
    """
    # stderr goes to a file: a pipe that nobody reads would block the process once it is full.
    with tempfile.TemporaryFile("w+") as messages:
        try:
            process = subprocess.Popen([python, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True)
        except OSError as error:
            raise UserError(f"--torch-python {python} cannot be run: {error.strerror}; name the python of an environment") from None
        try:
            yield TorchBaseline(process, messages, config)
        finally:
            process.kill()
            process.communicate()


def cores() -> int:
    """Cores that this process may use: as many threads as XLA has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
