"""One of several processes: what the environment says, which rows of a batch are its own. Real processes: train/test_processes."""

import http.server
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mhc_jax.config import MeshConfig
from mhc_jax.errors import UserError
from mhc_jax.parallel import processes
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.processes import heartbeat_seconds, how_to_join
from mhc_jax.parallel.rows import own_rows, part_of, place_rows
from mhc_jax.parallel.rules import Rules

PLAIN = {"JAX_COORDINATOR_ADDRESS": "node0:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def join(environment: dict[str, str], hosts: int = 1):
    return how_to_join(environment, lambda environment: hosts)


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {**SLURM, "SLURM_NTASKS": "1"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},  # a batch script, not one of its srun's tasks
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine them, please set the variable"},
    ],
)
def test_a_single_process_is_left_alone(alone, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    assert join(alone) is None
    monkeypatch.setattr(processes, "cloud_tpu_hosts", lambda environment: 1)
    with processes.joined(alone):
        pass


@pytest.mark.parametrize(
    ("launched", "hosts"),
    [
        (SLURM, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}, 1),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, 1),
        ({}, 4),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "node0:1"}, 1),
    ],
)
def test_what_a_launcher_tells_is_left_to_jax(launched, hosts):
    assert join(launched, hosts) == {}


def test_the_three_variables_come_before_a_launcher():
    expected = {"coordinator_address": "node0:8476", "num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate"}
    assert join(PLAIN) == join({**SLURM, **PLAIN}) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "^JAX_COORDINATOR_ADDRESS=a:1 is set, but JAX_NUM_PROCESSES and JAX_PROCESS_ID are not"),
        ({**PLAIN, "JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES=4 is set, but JAX_PROCESS_ID is not"),
        ({**SLURM, "JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID=1 is set, but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not"),
        (
            {**PLAIN, "JAX_COORDINATOR_ADDRESS": "node0"},
            "JAX_COORDINATOR_ADDRESS is 'node0'; give the first process's host and a free port",
        ),
        ({**PLAIN, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4 of JAX_NUM_PROCESSES = 4"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'; it must be a whole number"),
        ({**SLURM, "SLURM_NTASKS": "2x"}, "SLURM_NTASKS is '2x'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        join(environment)


def test_heartbeats():
    assert heartbeat_seconds({}) == 60
    assert heartbeat_seconds({"MHC_JAX_HEARTBEAT_SECONDS": "7"}) == 7
    for value, message in (("0", "it must be 1 to 3600"), ("soon", "whole number")):
        with pytest.raises(UserError, match=message):
            heartbeat_seconds({"MHC_JAX_HEARTBEAT_SECONDS": value})


def test_joining_bounds_every_wait_and_notes_what_an_error_means(monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.update(arguments))
    with (
        pytest.raises(RuntimeError) as caught,
        processes.joined({**PLAIN, "MHC_JAX_HEARTBEAT_SECONDS": "9"}),
    ):
        raise RuntimeError("connection reset")
    assert {name: given[name] for name in given if name.endswith(("timeout", "seconds"))} == {
        "initialization_timeout": 300,
        "heartbeat_timeout_seconds": 9,
        "shutdown_timeout_seconds": 9,
    }
    assert "another process has ended" in caught.value.__notes__[0]
    assert "within 9 s" in caught.value.__notes__[0]
    assert "as 3 of 4 processes at node0:8476" in capsys.readouterr().err

    def fails(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(UserError, match="processes of its launcher failed: Number of processes must be defined"), processes.joined(SLURM):
        pass


def test_the_metadata_server_of_a_cloud_tpu_tells_the_number_of_hosts():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path.endswith("/worker-network-endpoints")
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found = processes._hosts_by_metadata(f"localhost:{server.server_port}")
        server.shutdown()
        thread.join()
    assert found == 2
    assert processes._hosts_by_metadata(f"localhost:{server.server_port}") == 1  # nobody answers any longer


MESHES = [MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=2, context=2, tensor=2), MeshConfig(context=8), MeshConfig(expert=2)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_hold_every_part_of_a_batch_and_the_whole_comes_together(mesh, count):
    """The devices of each process in turn, as if the others were elsewhere."""
    sequences, length = 8, 16
    whole = np.arange(sequences * length * 3, dtype=np.int32).reshape(sequences, length, 3)
    sharding = NamedSharding(make_mesh(mesh), Rules().spec("batch", "sequence"))
    devices = list(sharding.mesh.devices.flat)
    shards = mesh.data * mesh.fsdp * mesh.expert
    places, together = sharding.devices_indices_map(whole.shape), np.full_like(whole, -1)
    for of_process in np.array_split(np.array(devices), min(count, len(devices))):
        mine = own_rows(sharding, sequences, set(of_process))
        assert len(mine) == -(-len(of_process) * shards // len(devices)) * (sequences // shards)  # no more than its devices hold
        for device in of_process:
            together[places[device]] = part_of(whole[mine], mine, places[device])
    np.testing.assert_array_equal(together, whole)


def test_rows_are_placed_as_the_sharding_says():
    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=2, context=4)), Rules().spec("batch", "sequence"))
    x = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    array = place_rows(x, 4, sharding)
    assert array.sharding == sharding
    np.testing.assert_array_equal(array, x)
