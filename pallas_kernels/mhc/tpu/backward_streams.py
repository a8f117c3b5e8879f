"""The stages of the backward kernel that have lanes of streams. Grids, blocks and what follows the kernel stand in backward.

    dots        <d_u, x_j> and <d_u, y>: with them <d_u, x'_i>, which the gradients for the logits still lack
    mixing      per block of lanes: phi^T g on the matrix unit; x', then dx', dx and dy on the vector unit; g x'^T on the matrix unit;
                and the products of 16 tokens with themselves whose diagonals are <dx'_i, x_j> and <dx'_i, y>

Blocks of code are long on purpose: the compiler overlaps the two units inside a block and not beyond it. In the names below, a leading
d is a gradient and x' is `mixed`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mhc.tpu.backward_job import CONTRACT_LAST, Coefficients, Job, Ref, dot, repeat, total, wide
from pallas_kernels.mhc.tpu.backward_scalars import sum_of_lanes
from pallas_kernels.mhc.tpu.tiles_backward import LANES


def dots(job: Job, refs: dict[str, Ref]) -> list[jax.Array]:
    """[1, tokens] each: <d_u, x_j> for every stream, then <d_u, y>."""
    tiles, n = job.tiles, job.n
    group = tiles.dot_group

    def of_group(g, _):
        rows = pl.ds(pl.multiple_of(g * group, group), group)
        sums = [jnp.zeros((group, LANES), jnp.float32)] * (n + 1 if job.post else n)
        for start in range(0, job.width, LANES):
            d = wide(refs["d_u"][rows, pl.ds(start, LANES)])
            blocks = [refs["x"][rows, pl.ds(job.lane(j, start), LANES)] for j in range(n)]
            blocks += [refs["y"][rows, pl.ds(start, LANES)]] if job.post else []
            sums = [s + wide(b) * d for s, b in zip(sums, blocks)]
        for j, s in enumerate(sums):
            refs["partial"][j, rows] = s
        return 0

    repeat(tiles.tokens // group, of_group, 1 if job.interpret else 2)
    return [sum_of_lanes(refs["partial"][j], job.interpret) for j in range(n + 1 if job.post else n)]


def mixing(job: Job, refs: dict[str, Ref], valid: jax.Array | None) -> None:
    """Everything that has lanes of streams: writes dx and dy, adds to d_phi and to the Gram blocks."""
    tiles = job.tiles
    lanes, group, size = tiles.lanes, tiles.group, tiles.gram
    if job.post:
        refs["gram"][...] = jnp.zeros_like(refs["gram"])

    def of_lanes(c, _):
        for part in range(tiles.parts):
            start = pl.multiple_of((c * tiles.parts + part) * lanes, LANES)
            if job.pre:
                _project_back(job, refs, part, start)

            def mix(g, _, part=part, start=start):
                for first in range(0, size, group):
                    _Block(job, refs, part, job.rows(g * size, first, group), start).mix()
                return 0

            def differentiate(g, _, part=part, start=start):
                for first in range(0, size, group):
                    _Block(job, refs, part, job.rows(g * size, first, group), start).differentiate()
                if job.post:
                    _gram(job, refs, part, g, start)
                return 0

            if job.post and job.pre:
                repeat(tiles.tokens // size, mix, 1 if job.interpret else tiles.tokens)
            if job.pre:
                _add_to_d_phi(job, refs, part, start, valid)
            repeat(tiles.tokens // size, differentiate, 1 if job.interpret else tiles.tokens)
        return 0

    jax.lax.fori_loop(0, job.width // (lanes * tiles.parts), of_lanes, 0)


def _project_back(job: Job, refs: dict[str, Ref], part: int, start: Any) -> None:
    """phi^T g for one block of lanes of every stream."""
    for i in range(job.n):
        phi = refs["phi"][:, pl.ds(job.lane(i, start), job.tiles.lanes)]
        refs["from_phi"][part, i] = dot(refs["g_columns"][...], phi, interpret=job.interpret)


def _add_to_d_phi(job: Job, refs: dict[str, Ref], part: int, start: Any, valid: jax.Array | None) -> None:
    """g x'^T for one block of lanes of every stream."""
    rows = job.mapping.rows
    for i in range(job.n):
        at = pl.ds(job.lane(i, start), job.tiles.lanes)
        mixed = refs["mixed"][part, i] if job.post else refs["x"][:, at]
        if valid is not None:
            mixed = jnp.where(valid, mixed, jnp.zeros_like(mixed))
        d_phi = dot(refs["g_rows"][...], mixed, interpret=job.interpret)
        refs["d_phi"][0, :, at] += total(d_phi[k : k + rows] for k in range(0, d_phi.shape[0], rows))


def _gram(job: Job, refs: dict[str, Ref], part: int, block: Any, start: Any) -> None:
    """Products of all dx'_i with all x_j and y, of every token of a block with every other: one block of lanes is added."""
    size, lanes = job.tiles.gram, job.tiles.lanes
    rows = job.rows(block * size, 0, size)

    def stack(name: str, streams: range) -> list[jax.Array]:
        return [refs[name][rows, pl.ds(job.lane(i, start), lanes)] for i in streams]

    left = [refs["d_mixed"][part, i, rows] for i in range(job.n)] if job.pre else stack("d_mixed_in", range(job.n))
    right = stack("x", range(job.n if job.mixes else 0)) + stack("y", range(1))
    products = dot(jnp.concatenate(left, axis=0), jnp.concatenate(right, axis=0), CONTRACT_LAST, job.interpret)
    refs["gram"][block, :, : products.shape[1]] += products


@dataclass(frozen=True)
class _Block:
    """One group of tokens, one block of lanes.

    Coefficients are loaded where they are used, and x' comes back from memory: that keeps registers free.
    """

    job: Job
    refs: dict[str, Ref]
    part: int
    rows: Any
    start: Any

    def load(self, name: str, i: int = 0) -> jax.Array:
        return self.refs[name][self.rows, pl.ds(self.job.lane(i, self.start), self.job.tiles.lanes)]

    def store(self, name: str, i: int, block: jax.Array) -> None:
        ref = self.refs[name]
        ref[self.rows, pl.ds(self.job.lane(i, self.start), self.job.tiles.lanes)] = block.astype(ref.dtype)

    def scaled(self, k: int, block: jax.Array) -> jax.Array:
        factor = self.refs["spread" if block.dtype == jnp.float32 else "narrow"][k, self.rows]
        if factor.shape == block.shape:
            return factor * block
        return jnp.concatenate([factor * block[:, lane : lane + LANES] for lane in range(0, block.shape[1], LANES)], axis=1)

    def narrow(self, block: jax.Array) -> jax.Array:
        """The type x' is made in."""
        return block if self.job.tiles.narrow else wide(block)

    def mix(self) -> None:
        """x', of x and y."""
        job, at, n = self.job, Coefficients(self.job), self.job.n
        x, y = [self.narrow(self.load("x", j)) for j in range(n)], self.narrow(self.load("y"))
        mixed = self.refs["mixed"]
        for i in range(n):
            streams = total(self.scaled(at.res + i * n + j, x[j]) for j in range(n)) if job.mixes else x[i]
            mixed[self.part, i, self.rows] = (streams + self.scaled(at.post + i, y)).astype(mixed.dtype)

    def differentiate(self) -> None:
        """dx', and of it dx and dy."""
        job, at, n = self.job, Coefficients(self.job), self.job.n
        d_mixed = []
        for i in range(n):
            terms = [wide(self.load("d_mixed_in", i))] if job.post else []
            if job.pre:
                mixed = self.refs["mixed"][self.part, i, self.rows] if job.post else self.load("x", i)
                terms += [self.scaled(at.pre + i, wide(self.load("d_u"))), self.refs["from_phi"][self.part, i, self.rows]]
                terms += [wide(self.scaled(at.norm, self.narrow(mixed)))]
            d_mixed.append(total(terms))
            if job.post and job.pre:
                ref = self.refs["d_mixed"]
                ref[self.part, i, self.rows] = d_mixed[i].astype(ref.dtype)
        for j in range(n):
            d = total(self.scaled(at.res + i * n + j, d_mixed[i]) for i in range(n)) if job.mixes else d_mixed[j]
            self.store("dx", j, d)
        if job.post:
            self.store("dy", 0, total(self.scaled(at.post + i, d_mixed[i]) for i in range(n)))
