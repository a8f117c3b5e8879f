"""A run in an object store: trained, killed, resumed and reported against an S3 server on this machine."""

import os
import socket
import subprocess
import sys
import time

import boto3
import pytest
from botocore.exceptions import ConnectionError as NoConnection

from soak.kill_soak import FIELDS, ROOT, prepare_corpus

SMALL = {**FIELDS, "--train.steps": 60}
FLAGS = [word for flag, value in SMALL.items() for word in (flag, str(value))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process that finds the server, its bucket and a warm cache."""
    folder = tmp_path_factory.mktemp("store")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    access = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in access.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        deadline = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket="bucket")
                break
            except NoConnection:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        prepare_corpus(folder / "corpus")
        yield {**os.environ, "MHC_JAX_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "CORPUS": f"{folder}/corpus/*.txt"}
    server.terminate()
    server.wait()


def command(environment, *words):
    return [sys.executable, "-u", "-m", "mhc_jax.cli", *words, "--data.source", environment["CORPUS"], *FLAGS]


def finish(environment, words):
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def keys(prefix):
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
    return [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])]


def content(key):
    return boto3.client("s3").get_object(Bucket="bucket", Key=key)["Body"].read()


@pytest.mark.slow
def test_a_run_in_a_store_is_killed_resumed_and_passes_over_damage(environment):
    whole = command(environment, "train", "laptop", "--out", "s3://bucket/whole")
    finish(environment, whole)
    assert {key.split("/")[1] for key in keys("whole/checkpoints/") if "/" in key} == {"state", "about.json"}
    assert {key.split("/")[0] for key in keys("whole/checkpoints/")} == {"40", "60"}

    cut = command(environment, "train", "laptop", "--out", "s3://bucket/cut")
    process = subprocess.Popen(cut, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 40/60"):
            break
    while "40/about.json" not in keys("cut/checkpoints/"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    client = boto3.client("s3")
    client.delete_object(Bucket="bucket", Key=next(f"cut/checkpoints/{key}" for key in keys("cut/checkpoints/") if "40/state/step/" in key))
    for key in keys("cut/"):
        if key == "summary.json" or key.startswith("checkpoints/60/"):
            client.delete_object(Bucket="bucket", Key=f"cut/{key}")  # where the run was faster than the signal
    output = finish(environment, cut)
    assert "the checkpoint of step 40 is damaged" in output
    assert "it lies in s3://bucket/cut/checkpoints/damaged-40 now" in output
    assert "resuming after step 20" in output
    for key in keys("whole/stability/"):
        assert content(f"cut/stability/{key}") == content(f"whole/stability/{key}")
    assert content("cut/checkpoints/60/about.json") == content("whole/checkpoints/60/about.json")
    assert "damaged-40/about.json" in keys("cut/checkpoints/")


@pytest.mark.slow
def test_a_list_of_runs_in_a_store_is_reported(environment):
    finish(environment, command(environment, "ablate", "laptop", "--variants", "residual", "mhc", "--out", "s3://bucket/list"))
    assert {"results.json", "report.md", "report.html", "runlist.json"} < set(keys("list/"))
    before = content("list/report.md")
    boto3.client("s3").delete_object(Bucket="bucket", Key="list/report.md")
    finish(environment, [sys.executable, "-m", "mhc_jax.cli", "report", "s3://bucket/list"])
    assert content("list/report.md") == before
