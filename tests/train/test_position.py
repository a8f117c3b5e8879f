"""Positions in the data over processes: real ones, that talk to each other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_jax.config import Config
from mhc_jax.data.pipeline import training_batches
from mhc_jax.data.prepare import prepare
from mhc_jax.data.prepared import Prepared
from mhc_jax.errors import UserError
from mhc_jax.train.position import SharedPosition

PROGRAM = """
import itertools, json, sys
import jax

address, index, source, output = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index), heartbeat_timeout_seconds=30)
from mhc_jax.config import DataConfig
from mhc_jax.data.pipeline import training_batches
from mhc_jax.data.prepare import prepare
from mhc_jax.train.position import SharedPosition

prepared = prepare(DataConfig(seq_len=16, source=(source,), heldout_share=0.2), 280)  # both at once, into one cache

def fresh():
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return SharedPosition(training_batches(prepared, seq_len=16, batch_size=2, seed=0, **place))

def take(batches, count):
    return [batch["tokens"].tolist() for batch in itertools.islice(batches, count)]

batches = fresh()
take(batches, 5)
state = json.loads(json.dumps(batches.get_state()))
expected = take(batches, 5)
resumed = fresh()
resumed.set_state(state)
again = take(resumed, 5)
with open(output, "w") as file:
    json.dump({"state": state, "expected": expected, "again": again}, file)
"""


@pytest.fixture
def prepared(tiny: Config) -> Prepared:
    return prepare(tiny.data, 280)


def test_a_single_process_saves_its_own_position(prepared: Prepared):
    batches = SharedPosition(training_batches(prepared, seq_len=16, batch_size=2, seed=0))
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    following = next(batches)["tokens"]
    resumed = SharedPosition(training_batches(prepared, seq_len=16, batch_size=2, seed=0))
    resumed.set_state(state)
    assert (next(resumed)["tokens"] == following).all()


def test_two_processes_save_both_positions_and_go_on(corpus: str, prepared: Prepared, tmp_path: Path):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    outputs = [tmp_path / f"{index}.json" for index in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index), corpus, str(output)], env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        for index, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first["state"] == second["state"]
    assert len(first["state"]["processes"]) == 2
    assert first["state"]["processes"][0] != first["state"]["processes"][1]
    for one in (first, second):
        assert one["again"] == one["expected"]
    assert first["expected"] != second["expected"]

    alone = SharedPosition(training_batches(prepared, seq_len=16, batch_size=4, seed=0))
    with pytest.raises(UserError, match="sequences a process 2, now 4; processes 2, now 1"):
        alone.set_state(first["state"])
