"""Programs whose cost is known by arithmetic. Functions of a module, because another process builds them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

SMALL = jax.ShapeDtypeStruct((512, 128), jnp.float32)  # 64 tiles of 4 KiB
SMALL_BYTES = 2 * 512 * 128 * 4  # read and written
LARGE = jax.ShapeDtypeStruct((65536, 1024), jnp.float32)  # 256 MiB: more than any chip's VMEM
LARGE_BYTES = 2 * 65536 * 1024 * 4
MATRIX = 2048


def _call(kernel, x, rows, *, name, semantics="arbitrary", **more):
    block = pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(x.shape[0], rows),),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        name=name,
        **more,
    )(x)


def _copy_kernel(x, out):
    out[...] = x[...]


def _copy(x, rows=512, semantics="arbitrary"):
    return _call(_copy_kernel, x, rows, name="copy", semantics=semantics)


def copy_small(semantics="arbitrary"):
    return partial(_copy, rows=8, semantics=semantics), (SMALL,)


def copy_large(semantics="arbitrary", rows=512):
    return partial(_copy, rows=rows, semantics=semantics), (LARGE,)


def copy_ragged():
    """The last block is a part of one: the size of its DMAs is computed in the kernel."""
    return partial(_copy, rows=1000), (LARGE,)


def _repeat_kernel(x, out, *, trips):
    out[...] = lax.fori_loop(0, trips, lambda _, total: total * 1.0001 + x[...], x[...])


def loop(trips):
    """Every tile goes `trips` times through a multiplication and an addition that wait for each other."""
    return lambda x: _call(partial(_repeat_kernel, trips=trips), x, 8, name="loop"), (SMALL,)


def _dynamic_kernel(n, x, out):
    out[...] = lax.fori_loop(0, n[0], lambda _, total: total * 1.0001 + x[...], x[...])


def _condition_kernel(n, x, out):
    out[...] = x[...]

    @pl.when(n[pl.program_id(0)] > 0)
    def _():
        out[...] = lax.fori_loop(0, 10, lambda _, total: total * 1.0001 + x[...], x[...])


def _with_scalars(kernel, name, count):
    def call(n, x):
        block = pl.BlockSpec((8, 128), lambda i, n: (i, 0))
        spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(64,), in_specs=[block], out_specs=block)
        return pl.pallas_call(kernel, grid_spec=spec, out_shape=SMALL, name=name)(n, x)

    return call, (jax.ShapeDtypeStruct((count,), jnp.int32), SMALL)


def dynamic_loop():
    return _with_scalars(_dynamic_kernel, "dynamic", 1)


def data_condition():
    return _with_scalars(_condition_kernel, "condition", 64)


def _sum_kernel(x, out, total):
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += x[...]

    @pl.when(step == pl.num_programs(0) - 1)
    def _():  # slow on purpose: were it charged at every step it would be most of the time
        out[...] = lax.fori_loop(0, 1000, lambda _, y: y * 1.0001 + total[...], total[...])


def sum_blocks():
    """The first and the last step do more; the output is written once."""

    def call(x):
        return pl.pallas_call(
            _sum_kernel,
            grid=(64,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
            name="sum_blocks",
        )(x)

    return call, (SMALL,)


def _add_kernel(w, x, out):
    out[...] = w[...] + x[...]


def outer_axis():
    """The blocks of `w` move with the outer axis alone: 8 blocks, not 128."""

    def call(w, x):
        inner = pl.BlockSpec((64, 1024), lambda i, j: (i * 16 + j, 0))
        return pl.pallas_call(
            _add_kernel,
            grid=(8, 16),
            in_specs=[pl.BlockSpec((64, 1024), lambda i, j: (i, 0)), inner],
            out_specs=inner,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            name="outer_axis",
        )(w, x)

    return call, (jax.ShapeDtypeStruct((512, 1024), jnp.float32), jax.ShapeDtypeStruct((8192, 1024), jnp.float32))


OUTER_BYTES = (2 * 8192 + 512) * 1024 * 4


def _pipeline_kernel(x, out):
    block = pl.BlockSpec((512, 1024), lambda i: (i, 0))
    pltpu.emit_pipeline(_copy_kernel, grid=(128,), in_specs=[block], out_specs=[block])(x, out)


def _dma_kernel(x, out, buffer, semaphores):
    def step(i, carry):
        rows = pl.ds(pl.multiple_of(i * 256, 256), 256)
        for source, target, semaphore in ((x.at[rows], buffer, 0), (buffer, out.at[rows], 1)):
            copy = pltpu.make_async_copy(source, target, semaphores.at[semaphore])
            copy.start()
            copy.wait()
        return carry

    lax.fori_loop(0, 256, step, 0)


def _in_hbm(kernel, name, **more):
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return lambda x: pl.pallas_call(kernel, in_specs=[anywhere], out_specs=anywhere, out_shape=LARGE, name=name, **more)(x), (LARGE,)


def emit_pipeline():
    return _in_hbm(_pipeline_kernel, "pipeline")


def manual_dma():
    """Nothing overlaps: the kernel waits for each DMA at once."""
    return _in_hbm(_dma_kernel, "dma", scratch_shapes=[pltpu.VMEM((256, 1024), jnp.float32), pltpu.SemaphoreType.DMA((2,))])


def scan(length):
    """The kernel in the body of a scan, as in a stack of layers."""
    return lambda x: lax.scan(lambda carry, _: (_copy(carry), None), x, None, length=length)[0], (LARGE,)


def nested_scan(outer, inner):
    def call(x):
        def body(carry, _):
            return lax.scan(lambda c, _: (_copy(c), None), carry, None, length=inner)[0], None

        return lax.scan(body, x, None, length=outer)[0]

    return call, (LARGE,)


def while_loop():
    """As often as the data says."""
    call = lambda n, x: lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, _copy(s[1])), (0, x))[1]  # noqa: E731
    return call, (jax.ShapeDtypeStruct((), jnp.int32), LARGE)


def conditional():
    """One copy or two."""
    call = lambda p, x: lax.cond(p, _copy, lambda x: _copy(_copy(x)), x)  # noqa: E731
    return call, (jax.ShapeDtypeStruct((), jnp.bool_), LARGE)


def twice():
    """Two equal kernels, of which the compiler keeps one."""
    return lambda x: _copy(_copy(x)), (LARGE,)


def sharded(devices, reduced=False):
    mesh = AbstractMesh((devices,), ("data",))
    x = jax.ShapeDtypeStruct(LARGE.shape, LARGE.dtype, sharding=NamedSharding(mesh, P("data")))

    def local(x):
        return lax.psum(_copy(x), "data") if reduced else _copy(x)

    out = P() if reduced else P("data")
    return jax.shard_map(local, in_specs=P("data"), out_specs=out, check_vma=False), (x,)


def matmul(size=MATRIX):
    matrix = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return lambda a, b: a @ b, (matrix, matrix)


def add_one():
    return lambda x: x + 1.0, (LARGE,)


def not_a_block():
    """Rejected by Mosaic: blocks of 3 rows."""
    return partial(_copy, rows=3), (SMALL,)
