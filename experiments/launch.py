"""Job files that train the runs of a list on a cluster, a task or a job each: a Slurm job array, or one XPK workload a run.

Nothing is submitted here. The files train from the list's folder (`mhc-jax sweep FOLDER --only ...`), so that what is trained later is what
the sweep was when they were written. What they set, and what they expect to be set, is as in docs/launch.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mhc_jax.errors import UserError
from mhc_jax.experiments.runs import Run, RunList, run_folder, save_runs
from mhc_jax.files import AnyPath, is_remote, write_atomically
from mhc_jax.train.folder import finished

Launcher = Literal["slurm", "xpk"]

OF_A_NODE = 8  # GPUs of a node, as docs/launch has it

SLURM = """#!/bin/bash
# Task i of the array trains run i, with one process a GPU. Options that are given to sbatch count for more than those below.
#SBATCH --job-name={job}
#SBATCH --array={array}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={tasks}
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180

set -euo pipefail

# A folder that all nodes see.
export MHC_JAX_CACHE=${{MHC_JAX_CACHE:-{cache}}}

status=0
srun --kill-on-bad-exit=1 mhc-jax sweep {folder} --only "$SLURM_ARRAY_TASK_ID" || status=$?

# Above 128 a signal ended it: asked to stop before the time was up (143), or a task or node was lost. Anything else is for you to look at.
# The number of one task may be that of the whole array, which is not to begin again.
if [ "$status" -gt 128 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""

SLURM_DATA = """#!/bin/bash
# Tokenises the texts of the runs once, before the array begins.
#SBATCH --job-name={job}-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00

set -euo pipefail

export MHC_JAX_CACHE=${{MHC_JAX_CACHE:-{cache}}}
srun mhc-jax data {folder}
"""

XPK = """#!/bin/bash
# The run {run} on a TPU slice. XPK starts all hosts again when one fails, and the command goes on from the last checkpoint.
set -euo pipefail

: "${{CLUSTER:?the cluster that xpk cluster create made}}"
: "${{IMAGE:?a container image with mhc-jax[tpu,remote] installed}}"

xpk workload create \\
    --cluster "$CLUSTER" \\
    --workload {job} \\
    --tpu-type "${{TPU_TYPE:-v6e-64}}" \\
    --num-slices 1 \\
    --docker-image "$IMAGE" \\
    --max-restarts 50 \\
    --command {command}
"""


def launch(launcher: Launcher, runs: RunList, chosen: Sequence[Run], folder: AnyPath) -> str:
    """Writes the list and the job files of the chosen runs, and returns the command that submits them.

    Raises:
      UserError: a run's folder holds another config; for XPK, `folder` is no bucket and no absolute path, so that the hosts of a slice
        cannot see it.
    """
    if launcher == "xpk" and not is_remote(folder) and not folder.is_absolute():
        raise UserError(f"--launch xpk: the hosts of a slice cannot see {folder}; give --out gs://BUCKET/FOLDER, or a path from the root")
    for run in chosen:
        finished(run.config, run_folder(folder, run))
    if is_remote(folder):
        jobs = Path("runs", _label(runs.name), "jobs")
    else:
        folder = Path(folder).resolve()  # a job may begin in another folder
        jobs = folder / "jobs"
    save_runs(runs, folder)
    lines = (_slurm if launcher == "slurm" else _xpk)(runs, chosen, folder, jobs)
    write_atomically(jobs / "submit.sh", "\n".join(["#!/bin/bash", "set -euo pipefail", *lines, ""]))
    return f"bash {shlex.quote(str(jobs / 'submit.sh'))}"


def _slurm(runs: RunList, chosen: Sequence[Run], folder: AnyPath, jobs: Path) -> list[str]:
    common = {
        "job": _label(runs.name),
        "folder": shlex.quote(os.fspath(folder)),
        "cache": shlex.quote(str(Path.cwd() / "cache")),
    }
    write_atomically(jobs / "data.sbatch", SLURM_DATA.format(**common))
    numbers: dict[int, list[int]] = {}  # of the runs, by their number of devices: an array has one shape
    for number, run in enumerate(runs.runs, start=1):
        if run in chosen:
            numbers.setdefault(run.config.mesh.devices, []).append(number)
    lines = [f"data=$(sbatch --parsable {shlex.quote(str(jobs / 'data.sbatch'))})"]
    for devices, own in numbers.items():
        path = jobs / f"runs-{devices}.sbatch"
        tasks = max(count for count in range(1, OF_A_NODE + 1) if devices % count == 0)
        whole = own == list(range(own[0], own[-1] + 1)) and len(own) > 1
        array = f"{own[0]}-{own[-1]}" if whole else ",".join(map(str, own))
        write_atomically(path, SLURM.format(**common, array=array, nodes=devices // tasks, tasks=tasks))
        lines.append(f'sbatch --dependency=afterok:"$data" {shlex.quote(str(path))}')
    return lines


def _xpk(runs: RunList, chosen: Sequence[Run], folder: AnyPath, jobs: Path) -> list[str]:
    lines = []
    for number, run in enumerate(runs.runs, start=1):
        if run in chosen:
            command = shlex.quote(shlex.join(["mhc-jax", "sweep", os.fspath(folder), "--only", run.name]))
            path = jobs / f"{run.name}.sh"
            write_atomically(path, XPK.format(run=run.name, job=f"{_label(runs.name)}-{number}", command=command))
            lines.append(f"bash {shlex.quote(str(path))}")
    return lines


def _label(name: str) -> str:
    """The name as clusters allow it for jobs: small letters, digits and hyphens, a letter first, and short."""
    text = re.sub(r"[^a-z0-9]+", "-", f"sweep-{name}".lower())
    return text[:30].strip("-")
