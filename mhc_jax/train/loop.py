"""One run from start to finish: prepares data, compiles, trains, evaluates, saves, resumes where it was cut, and goes back from a spike."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
from jax.experimental import multihost_utils
from rich.console import Console

from mhc_jax import config as configs
from mhc_jax.config import Config
from mhc_jax.data.batch import Batch
from mhc_jax.data.ngrams.artifact import FILE as ENGRAM_FILE
from mhc_jax.data.ngrams.artifact import open_artifact, save_artifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.pipeline import heldout_batches, training_batches
from mhc_jax.data.prepare import Prepared, prepare
from mhc_jax.errors import Preempted, UserError
from mhc_jax.files import AnyPath, is_remote, read_json, write_atomically, write_json
from mhc_jax.nn.decoder import learnable_mappings
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.processes import check_same_everywhere
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.fits import check_fits
from mhc_jax.train.folder import finished, full_disk_is_told
from mhc_jax.train.host_tables import DeviceTables, open_tables
from mhc_jax.train.metrics import MetricsWriter, losses_until
from mhc_jax.train.parameters import TOKENIZER_FILE, begun_from, check_begin
from mhc_jax.train.preemption import Preemption
from mhc_jax.train.programs import Programs, compile_programs, evaluate
from mhc_jax.train.progress import Progress
from mhc_jax.train.step import TrainState, placed_initial_state
from mhc_jax.train.summary import summary
from mhc_jax.train.watch import Rollbacks, Spike, Watch

PROFILED_STEPS = range(10, 15)  # after compilation and warm-up

Say = Callable[[str], None]


def train(config: Config, folder: AnyPath, *, say: Say = print, profile: bool = False) -> dict[str, Any]:
    """Trains a config in a run folder and returns its summary; a finished run returns at once, a cut one goes on.

    With several processes, all of them call this with the same arguments and a folder that all see; the first one speaks and writes.

    Raises:
      UserError: the folder belongs to another config, the data does not fit, the mesh asks for more devices than there are, the
        processes were given different things, too few steps are left for a profile, the disk is full, or the losses are beyond what the
        config tolerates.
      Preempted: SIGTERM came; what there was to save is saved.
    """
    started = time.perf_counter()
    if profile and is_remote(folder):
        raise UserError(f"a profile is written on this machine only, not to {folder}; give another --out")
    if (known := finished(config, folder)) is not None:
        return known
    first = jax.process_index() == 0
    if not first:
        say = _silent
    with Preemption() as preemption:
        mesh, rules = make_mesh(config.mesh), Rules()
        check_fits(config, mesh)
        data = prepare(config.data, config.model.vocab_size, progress=say)
        check_begin(config, data)
        tables = open_tables(config, mesh, rules)
        artifact = None if config.model.engram is None else open_artifact(folder, config.model.engram, data)
        check_same_everywhere(
            {
                "config": json.dumps(configs.to_json(config)),
                "text": data.fingerprint,
                "tokenizer": data.tokenizer_fingerprint,
                "n-gram tables": "" if artifact is None else artifact.checksum,
            }
        )
        batches, heldout = _open_data(config, data, None if artifact is None else NgramHash(artifact), tables)

        with full_disk_is_told(folder), jax.set_mesh(mesh), tables:
            if first:  # only now, so that a config refused above does not claim the folder
                write_json(folder / "config.json", configs.to_json(config))
                write_atomically(folder / "config.txt", configs.to_text(config))
                write_atomically(folder / TOKENIZER_FILE, data.sources[0].tokenizer.read_text(encoding="utf-8"))
                if artifact is not None:
                    save_artifact(artifact, folder / ENGRAM_FILE)
            with Checkpoints(folder, config, say) as checkpoints:
                run = _Run(config, folder, tables, batches, heldout, checkpoints, preemption, say, profile, started)
                run.restore(placed_initial_state(config, mesh, rules))
                say("compiling")
                run.programs = compile_programs(config, rules, run.state, heldout[0])
                preemption.defer()
                while (spike := run.advance()) is not None:
                    say(f"{spike}: going back")
                    run.go_back(spike, lambda: placed_initial_state(config, mesh, rules))

            if first:
                entries = summary(
                    config,
                    folder,
                    data,
                    memory_bytes=run.programs.memory_bytes,
                    compile_seconds=run.programs.seconds,
                    first_step_seconds=run.first_step_seconds,
                    rollbacks=len(run.rollbacks),
                )
                write_json(folder / "summary.json", entries)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("summary")
    return read_json(folder / "summary.json")


class _Run:
    """The state of a run between its steps, and what moves it: restore, advance, go_back."""

    programs: Programs
    state: TrainState

    def __init__(
        self,
        config: Config,
        folder: AnyPath,
        tables: DeviceTables,
        batches: grain.DatasetIterator[Batch],
        heldout: list[dict[str, Any]],
        checkpoints: Checkpoints,
        preemption: Preemption,
        say: Say,
        profile: bool,
        started: float,
    ):
        self.config, self.folder, self.tables = config, folder, tables
        self.batches, self.heldout, self.checkpoints = batches, heldout, checkpoints
        self.preemption, self.say, self.profile, self.started = preemption, say, profile, started
        self.rollbacks = Rollbacks(folder, config.train)
        self.first_step_seconds: float | None = None  # stays so when a cut run had only its summary left to write
        self._first_position = batches.get_state()
        self._resumed = False  # from a checkpoint, not from the beginning

    def restore(self, initial: TrainState) -> None:
        """Takes the newest checkpoint's state and data position, or the initial ones."""
        restored = self.checkpoints.restore(self.tables.like(initial))
        self._resumed = restored is not None
        if restored is None and self.config.train.init_from is not None:
            initial, taken = begun_from(initial, self.config)
            self.say(taken)
        state, position = restored or (initial, self._first_position)
        self.state = self.tables.start(state, self.heldout)
        self.batches.set_state(position)
        if restored:
            self.say(f"resuming after step {int(self.state.step)}")
        step = int(self.state.step)
        self.rollbacks.forget_after(step, write=jax.process_index() == 0)
        for _ in range(self.rollbacks.batches_to_skip(step)):
            next(self.batches)

    def go_back(self, spike: Spike, initial: Callable[[], TrainState]) -> None:
        """Restores what was before a spike, and leaves out the batches from there to the spike."""
        every = self.config.train.checkpoint_every
        to_step = (spike.step - 1) // every * every
        # Checkpoints that SIGTERM made since then: an undisturbed run would not go back to them. They are removed before the file is
        # written, so that a run that is killed in between comes upon the spike again.
        self.checkpoints.discard_after(to_step)
        self.rollbacks.add(spike, to_step, write=jax.process_index() == 0)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        del self.state  # so that memory need not hold two
        self.tables.close()
        self.restore(like if to_step else initial())

    def advance(self) -> Spike | None:
        """Trains to the last step, or to a spike from which the config says to go back.

        Raises:
          Preempted: SIGTERM came, and the state is saved.
        """
        config, first_step = self.config, int(self.state.step)
        if self.profile and (left := config.train.steps - first_step) < PROFILED_STEPS.stop:
            raise UserError(f"a profile needs {PROFILED_STEPS.stop} steps, but {left} are left to train; raise train.steps, or go without")
        resume_step = first_step if self._resumed else -1  # without a checkpoint a run begins again, its step 0 included
        first = jax.process_index() == 0
        watch = Watch(config.train, losses_until(self.folder, resume_step), int(self.state.skipped_in_row))
        console = None if first else Console(quiet=True)
        with MetricsWriter(self.folder, resume_step, writes=first) as writer, Progress(config, first_step, console) as progress:
            try:
                self._steps(first_step, writer, progress, watch)
            except Spike as spike:
                return spike
        return None

    def _steps(self, first_step: int, writer: MetricsWriter, progress: Progress, watch: Watch) -> None:
        config, last_step = self.config, self.config.train.steps
        if first_step == 0:
            self._evaluate(writer, progress)
        clock = time.perf_counter()
        pending: tuple[int, Any] | None = None  # the step that the device is still computing while the next batch is read

        def finish() -> None:
            nonlocal clock, pending
            if pending is None:
                return
            (step, metrics), pending = pending, None
            values = {name: float(value) for name, value in metrics._asdict().items() if value is not None}  # waits for the device
            now = time.perf_counter()
            writer.write("train", step, {**values, "tokens": step * config.tokens_per_step, "seconds": now - clock})
            progress.stepped(step, values["loss"], now - clock)
            clock = now
            watch.after(step, values["loss"], bool(values["skipped"]))

        for step in range(first_step + 1, last_step + 1):
            inputs = self.tables.take(self.tables.placed(next(self.batches), config.train.batch_size))
            if self.profile and step - first_step == PROFILED_STEPS.start:
                jax.profiler.start_trace(self.folder / "profile")
            self.checkpoints.check()
            self.state, metrics = self.tables.step(self.programs.train_step, self.state, inputs)
            finish()
            pending = step, metrics
            if self.first_step_seconds is None:
                jax.block_until_ready(metrics)
                self.first_step_seconds = time.perf_counter() - self.started
                self.say(f"first step after {self.first_step_seconds:.1f} s, of which {self.programs.seconds:.1f} s compiling")
            if self.profile and step - first_step == PROFILED_STEPS.stop:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                self.say(f"profile written to {self.folder / 'profile'}")
            if step % config.train.eval_every == 0 or step == last_step:
                finish()
                loss = self._evaluate(writer, progress)
                if step % config.train.checkpoint_every == 0 or step == last_step:
                    writer.flush()
                    self.checkpoints.save(self.tables.saved(self.state), self.batches.get_state(), loss)
                clock = time.perf_counter()
            if self.preemption.reached() and step < last_step:
                finish()
                # Without a held-out loss: an evaluation here would be one that the undisturbed run does not have.
                writer.flush()
                self.checkpoints.save(self.tables.saved(self.state), self.batches.get_state())
                self.checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM after step {step}, whose state is saved; the same command goes on from there")

    def _evaluate(self, writer: MetricsWriter, progress: Progress) -> float:
        """Held-out loss, and the lines and arrays of an evaluation written."""
        step = int(self.state.step)
        loss, scalars, arrays = evaluate(self.programs, self.state, map(self.tables.evaluated, self.heldout))
        writer.write("eval", step, scalars)
        writer.write_stability(step, {**arrays, "learnable": learnable_mappings(self.config.model)})
        progress.evaluated(step, loss)
        return loss


def _silent(line: str) -> None:
    """What processes other than the first say."""


def _open_data(
    config: Config, data: Prepared, ngrams: NgramHash | None, tables: DeviceTables
) -> tuple[grain.DatasetIterator[Batch], list[dict[str, Any]]]:
    """This process's rows of the training batches, on the host; the held-out batches, placed."""
    batches = training_batches(
        data,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        read_threads=config.data.read_threads,
        workers=config.data.workers,
        keep=tables.own_rows(config.train.batch_size),
        ngrams=ngrams,
    )
    sequences = config.train.eval_sequences
    size = math.gcd(sequences, config.train.batch_size // config.train.microbatches)
    heldout = heldout_batches(
        data, seq_len=config.data.seq_len, sequences=sequences, batch_size=size, keep=tables.own_rows(size), ngrams=ngrams
    )
    return batches, [tables.placed(batch, size) for batch in heldout]
