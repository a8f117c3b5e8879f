"""Continues texts with a trained run: opens its folder, reads prompts in chunks, then draws one token a sequence at a time.

A batch of any prompts runs as one, on one device or a mesh. Two programs are compiled for it: a chunk of PREFILL tokens, and one token.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mhc_jax.config import Config, MeshConfig, override
from mhc_jax.data.ngrams.artifact import FILE as ENGRAM_FILE
from mhc_jax.data.ngrams.artifact import load_artifact
from mhc_jax.data.tokenizer import TextTokenizer, load_tokenizer
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath
from mhc_jax.generate.sampling import Sampling, keys_of, sample
from mhc_jax.generate.text import TextPieces
from mhc_jax.nn.decode import DECODING, Cache, Network, Ngrams, decode, network_of
from mhc_jax.nn.ngram_hash import hash_numbers
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.train.fits import device_bytes
from mhc_jax.train.folder import saved_config
from mhc_jax.train.memory import on_host
from mhc_jax.train.parameters import TOKENIZER_FILE, parameters_of
from mhc_jax.train.step import initial_state, state_shardings

PREFILL = 128  # tokens of each prompt that are read at a time
MAX_TOKENS = 200  # that are drawn where nothing is said


class Generated(NamedTuple):
    """What came out, and how fast; seconds are without compilation."""

    texts: list[str]  # without the prompts
    prompt_tokens: int  # of all prompts
    prefill_seconds: float
    tokens: list[list[int]]  # drawn for each prompt, end-of-text included
    decode_seconds: float

    @property
    def speed(self) -> str:
        """One line for people."""
        drawn = sum(map(len, self.tokens))
        parts = ("prefill", self.prompt_tokens, self.prefill_seconds), ("decode", drawn, self.decode_seconds)
        return "; ".join(f"{name}: {count} tokens, {count / seconds:,.1f} a second" for name, count, seconds in parts)


class Generator:
    """A trained network and its tokenizer."""

    def __init__(self, config: Config, network: Network, tokenizer: TextTokenizer):
        self.config, self.tokenizer = config, tokenizer
        self._mesh = make_mesh(config.mesh)
        # Taking modules apart costs more at every call than the call itself: programs are given a list of arrays.
        structure: Any
        self._arrays, structure = jax.tree.flatten(network)
        known = tokenizer.size

        def prefill(arrays: list[Any], tokens: Any, count: Any, logits: Any, cache: Cache) -> tuple[Any, Cache]:
            found, cache = decode(structure.unflatten(arrays), tokens, count, cache)
            return jnp.where(count[:, None] > 0, found[:, :known], logits), cache  # the model may have room for more tokens than there are

        def step(arrays: list[Any], tokens: Any, end: Any, alive: Any, cache: Cache) -> tuple[Any, Any, Cache]:
            alive &= tokens != end
            logits, cache = decode(structure.unflatten(arrays), tokens[:, None], alive.astype(jnp.int32), cache)
            return logits[:, :known], alive, cache

        # Whatever goes from program to program has the sequences first, and stays where they are.
        self._split = NamedSharding(self._mesh, DECODING.spec("batch"))
        self._prefill = jax.jit(prefill, donate_argnames="cache", out_shardings=self._split)
        self._step = jax.jit(step, donate_argnames="cache", out_shardings=self._split)
        self._sample = jax.jit(sample, static_argnames="sampling", out_shardings=self._split)

    @classmethod
    def open(cls, folder: AnyPath, mesh: MeshConfig | None = None) -> "Generator":
        """The generator of a run: its config, tokenizer and newest undamaged checkpoint, on one device or a mesh.

        Parameters are split as in training, whatever mesh that had; every device has some of the sequences and their caches.

        Raises:
          UserError: there is no run, no checkpoint or no tokenizer in the folder, or one of them cannot be used; or the mesh asks for more
            devices than there are, or does not divide the model.
        """
        if not (folder / "config.json").exists():
            raise UserError(f"there is no run in {folder}; give the folder of one, such as runs/laptop-mhc-seed0")
        saved = saved_config(folder)
        if not (folder / TOKENIZER_FILE).exists():
            raise UserError(
                f"{folder} has no {TOKENIZER_FILE}: it was trained before runs kept their tokenizer; copy the tokenizer.json that its text "
                "was tokenised with there (`mhc-jax data NAME` prints the folder that has it)"
            )
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE, saved.model.vocab_size)
        # Of the batch that was trained with nothing is kept that a mesh would have to divide.
        mesh = mesh or MeshConfig()
        batch = {"train.microbatches": 1, "train.batch_size": mesh.batch_parts, "train.eval_sequences": mesh.batch_parts}
        axes = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(mesh).items()}
        config = override(saved, {"train.init_from": None} | batch | axes)
        if on_host(config):
            config = override(config, {"model.engram.tables.placement": "device", "model.engram.tables.hot_rows": 0})
        on = make_mesh(mesh)
        shapes = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(lambda: initial_state(config)),
            state_shardings(config, on, DECODING),
        )
        state, step, missing = parameters_of(folder, config, shapes)
        if missing:
            raise UserError(f"the checkpoint of step {step} in {folder} lacks {', '.join(missing[:3])}; it is that of another config")
        ngrams = None
        if config.model.engram is not None:
            artifact = load_artifact(folder / ENGRAM_FILE, config.model.engram, tokenizer.fingerprint)
            numbers = hash_numbers(artifact.multipliers, artifact.primes, artifact.offsets)
            assert state.memory is not None
            ngrams = Ngrams(state.memory.tables, numbers, jnp.asarray(artifact.lookup), jnp.asarray(artifact.pad))
        with jax.set_mesh(on):
            return cls(config, network_of(state.model, state.router_bias, ngrams), tokenizer)

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int | None = None,
        *,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        context: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Generated:
        """Continues each prompt until the text ends or `max_tokens` are drawn.

        Which tokens are drawn for a prompt depends on `seed`, on the prompt and on how often it came before in `prompts`, not on the
        others (but for rounding, which may differ with the number of prompts).

        Args:
          prompts: texts; an empty one begins with the end-of-text token.
          max_tokens: drawn for each prompt; None: MAX_TOKENS, or as many as the context has room for.
          sampling: how a token is drawn.
          seed: of the random numbers.
          context: tokens of a prompt and its continuation that there is room for; None: data.seq_len of the run.
          say: is given the continuation of a single prompt in pieces, as they come.

        Raises:
          UserError: a number is out of range, or does not fit with the others or into memory; a prompt cannot be tokenised.
        """
        context = self.config.data.seq_len if context is None else context
        ids = [list(map(int, own)) or [self.tokenizer.end_of_text] for own in self.tokenizer.encode(prompts)]
        max_tokens = _checked(ids, max_tokens, context, seed)
        parts = self.config.mesh.batch_parts
        spare = -len(ids) % parts  # sequences that only fill up the batch
        self._check_memory((len(ids) + spare) // parts, context)
        with jax.set_mesh(self._mesh):
            keys, cache = keys_of([*prompts, *[""] * spare], seed), self._no_tokens(len(ids) + spare, context)
            cache = self._compile(cache, keys, sampling)

            begun = time.perf_counter()
            logits, cache = self._read(ids + [[self.tokenizer.end_of_text]] * spare, cache)
            jax.block_until_ready(logits)
            prefilled = time.perf_counter()
            drawn = self._draw(logits, cache, keys, sampling, max_tokens, say, len(ids))
            ended = time.perf_counter()
        texts = [self.tokenizer.decode([token for token in own if token != self.tokenizer.end_of_text]) for own in drawn]
        return Generated(texts, sum(map(len, ids)), prefilled - begun, drawn, ended - prefilled)

    def _no_tokens(self, batch: int, context: int) -> Cache:
        """An empty cache, each part of it made where it belongs."""
        return jax.jit(lambda: Cache.empty(self.config.model, batch, context), out_shardings=self._split)()

    def _compile(self, cache: Cache, keys: Any, sampling: Sampling) -> Cache:
        """Runs every program once on no tokens, which leaves the cache as it is."""
        batch = len(cache.length)
        none, no_tokens = np.zeros(batch, np.int32), np.zeros((batch, PREFILL), np.int32)
        logits, cache = self._prefill(self._arrays, no_tokens, none, self._no_logits(batch), cache)
        tokens = self._sample(logits, keys, cache.length, sampling)
        _, _, cache = self._step(self._arrays, tokens, self.tokenizer.end_of_text, jnp.zeros(batch, bool, device=self._split), cache)
        return jax.block_until_ready(cache)

    def _no_logits(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, self.tokenizer.size), device=self._split)

    def _read(self, ids: list[list[int]], cache: Cache) -> tuple[jax.Array, Cache]:
        """The logits after each prompt, and the cache that holds all prompts."""
        lengths = np.array([len(own) for own in ids], np.int32)
        padded = np.zeros((len(ids), -(-lengths.max() // PREFILL) * PREFILL), np.int32)
        for row, own in zip(padded, ids):
            row[: len(own)] = own
        logits = self._no_logits(len(ids))
        for start in range(0, padded.shape[1], PREFILL):
            count = np.clip(lengths - start, 0, PREFILL)
            logits, cache = self._prefill(self._arrays, padded[:, start : start + PREFILL], count, logits, cache)
        return logits, cache

    def _draw(
        self,
        logits: jax.Array,
        cache: Cache,
        keys: Any,
        sampling: Sampling,
        max_tokens: int,
        say: Callable[[str], None] | None,
        sequences: int,
    ) -> list[list[int]]:
        """The tokens of the first `sequences`, up to their end-of-text. The next step is under way while those of one are looked at."""
        end, pieces = self.tokenizer.end_of_text, TextPieces(self.tokenizer.decode)
        drawn: list[list[int]] = [[] for _ in range(sequences)]
        alive = jax.device_put(jnp.arange(logits.shape[0]) < sequences, self._split)
        for left in reversed(range(max_tokens)):
            tokens = self._sample(logits, keys, cache.length, sampling)
            if left:
                logits, alive, cache = self._step(self._arrays, tokens, end, alive, cache)
            for own, token in zip(drawn, np.asarray(tokens).tolist()):
                if not own or own[-1] != end:
                    own.append(token)
            if say is not None and drawn[0][-1] != end:
                say(pieces.add(drawn[0][-1]))
            if all(own[-1] == end for own in drawn):
                break
        return drawn

    def _check_memory(self, batch: int, context: int) -> None:
        one = jax.eval_shape(lambda: Cache.empty(self.config.model, 1, 1))
        needed, there = (
            batch * context * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one.latents)),
            device_bytes(jax.devices()[0]),
        )
        if context >= 2**31 or (there is not None and needed > there):
            has = "" if there is None else f", and there are {there / 2**30:,.1f} GiB"
            raise UserError(
                f"a context of {context} tokens needs {needed / 2**30:,.1f} GiB for the caches of {batch} sequence(s){has}; lower it"
            )


def _checked(ids: list[list[int]], max_tokens: int | None, context: int, seed: int) -> int:
    """How many tokens are drawn at most."""
    if not ids:
        raise UserError("there is no prompt; give at least one, which may be empty")
    if context <= 0:
        raise UserError(f"context is {context}; it must be a positive number of tokens")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be 0 to {2**32 - 1}")
    longest = max(map(len, ids))
    if longest >= context:
        raise UserError(
            f"a prompt has {longest} tokens, and a context of {context} has no room for it and one more; shorten it or raise context"
        )
    room = context - longest
    if max_tokens is None:
        return min(MAX_TOKENS, room)
    if max_tokens <= 0:
        raise UserError(f"max_tokens is {max_tokens}; it must be a positive number of tokens")
    if max_tokens > room:
        raise UserError(
            f"max_tokens is {max_tokens}, but after a prompt of {longest} tokens a context of {context} has room for {room}; "
            "lower it or raise context"
        )
    return max_tokens
