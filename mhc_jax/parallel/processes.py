"""Runs of several processes, by JAX's own multi-controller runtime: whether this process is one of several, joining the others, and
agreeing with them. docs/processes.md tells how to start them.

How they end together is JAX's part: each sends heartbeats to the first, and a process that misses those of another ends itself.
"""

import hashlib
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mhc_jax.errors import Preempted, UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "MHC_JAX_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 60
JOIN_SECONDS = 300  # how long a process waits for the others when it starts

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads; srun sets all of them
TPU_FILES = ("accel*", "vfio/[0-9]*")
METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Joins the other processes before JAX is first used, where the environment says that there are any; a single one stays as it is.

    An unexpected error inside gets a note of what it means among several processes.

    Raises:
      UserError: the environment says a part of what is needed, or JAX cannot make sense of it.
    """
    arguments = how_to_join(environment)
    if arguments is None:
        yield
        return
    seconds = heartbeat_seconds(environment)
    known = arguments.get("coordinator_address")
    place = (
        f"as {arguments['process_id']} of {arguments['num_processes']} processes at {known}" if known else "the processes of its launcher"
    )
    # When the time is up JAX ends the process with a message that does not say what it waited for.
    print(f"mhc-jax: joining {place}; JAX waits {JOIN_SECONDS} s for all to come", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"joining {place} failed: {error}; set {ADDRESS}, {COUNT} and {INDEX} (docs/processes.md)") from error
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        error.add_note(
            f"This is process {jax.process_index()} of {jax.process_count()}. If the error is one of communication, another process has "
            f"ended: look for the first one that did. All end within {seconds} s, and the same command goes on from the last checkpoint."
        )
        raise


def how_to_join(environment: Mapping[str, str], ask: Callable[[Mapping[str, str]], int] | None = None) -> dict[str, Any] | None:
    """The arguments that `jax.distributed.initialize` needs beside time-outs; None for a process alone.

    Args:
      environment: the three variables of `from_variables`, or what a launcher sets that JAX knows: Slurm, and Cloud TPU on Kubernetes.
      ask: how many hosts there are, as a Cloud TPU VM knows it.

    Raises:
      UserError: some of the three variables are missing or make no sense.
    """
    launched = _launched(environment) or (ask or cloud_tpu_hosts)(environment) > 1
    present = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    if not present or (present == [ADDRESS] and launched):  # JAX reads the address itself
        return {} if launched else None
    address, count, index = from_variables(environment)
    if count == 1:
        return None
    return {"coordinator_address": address, "num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}


def from_variables(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """Address of the first process, number of processes and number of this one.

    Raises:
      UserError: names what is missing or makes no sense.
    """
    names = (ADDRESS, COUNT, INDEX)
    if missing := [name for name in names if not environment.get(name)]:
        given = ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
        raise UserError(
            f"{given} is set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; a run of several processes needs all "
            "three in each of them, and a single process none"
        )
    address, (count, index) = environment[ADDRESS], (_whole(environment, name) for name in (COUNT, INDEX))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS} is {address!r}; give the first process's host and a free port there, such as node0:8476")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"{INDEX} is {index} of {COUNT} = {count}; processes are numbered from 0 to one less than their number")
    return address, count, index


def heartbeat_seconds(environment: Mapping[str, str]) -> int:
    """After how many seconds without a sign of life a process counts as dead, which ends the others.

    Raises:
      UserError: the variable holds something other than 1 to 3600.
    """
    seconds = _whole(environment, HEARTBEAT) if environment.get(HEARTBEAT) else HEARTBEAT_SECONDS
    if not 1 <= seconds <= 3600:
        raise UserError(f"{HEARTBEAT} is {seconds}; it must be 1 to 3600")
    return seconds


def _whole(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name} is {environment[name]!r}; it must be a whole number") from None


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows says in the environment that it started several processes."""
    if all(name in environment for name in SLURM) and _whole(environment, "SLURM_NTASKS") > 1:
        return True
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = _whole(environment, "MEGASCALE_NUM_SLICES") if environment.get("MEGASCALE_NUM_SLICES") else 1
    # libtpu puts a sentence into the second where it cannot tell.
    return bool(re.fullmatch(r"[^\s,]+(,[^\s,]+)*", hosts)) and len(hosts.split(",")) * slices > 1


def cloud_tpu_hosts(environment: Mapping[str, str]) -> int:
    """How many hosts share the TPU slice of this Cloud TPU VM, by its metadata server; 1 where there is no TPU or no such server."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in TPU_FILES) or not find_spec("libtpu") or "TPU_SKIP_MDS_QUERY" in environment:
        return 1
    return _hosts_by_metadata(environment.get("GCE_METADATA_IP", "metadata.google.internal"))


def _hosts_by_metadata(server: str) -> int:
    request = urllib.request.Request(METADATA.format(server), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return len(answer.read().decode().split(","))
    except (OSError, ValueError):
        return 1


def check_same_everywhere(facts: Mapping[str, str]) -> None:
    """Every process calls this with its own facts, of equal names.

    Raises:
      UserError: in all of them, where a fact is not the same in all; it is named.
    """
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(fact.encode()).digest()[:8], np.uint32) for fact in facts.values()]
    everywhere = multihost_utils.process_allgather(np.stack(digests))
    if differ := [name for name, of_fact in zip(facts, everywhere.swapaxes(0, 1)) if (of_fact != of_fact[0]).any()]:
        raise UserError(
            f"the processes of the run differ in their {' and '.join(differ)}; start all with the same command on the same files, best "
            "with MHC_JAX_CACHE in a folder that all see"
        )
