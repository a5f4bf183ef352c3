"""One row times a weight as a kernel of our own for NVIDIA's Hopper GPUs, through Pallas and Mosaic GPU.

Every block of threads takes a strip of the weight's rows. It holds the one row in shared memory, and streams its strip
past it, a few rows at a time, so that several copies from the GPU's memory are always under way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of a strip: few enough that 132 processors have work with 4096 rows, many enough that reading the one row counts
# for little.
STRIP = 16
# Hopper's copy engine takes at most 256 along each axis, so rows of the weight are copied as `size / LANES` of these.
LANES = 128
# Copies that are under way at a time, and what one of them brings unless a single row is longer.
_COPIES, _COPY_BYTES = 4, 1 << 14
# Of a block of threads on Hopper GPUs, less what barriers take.
_SHARED_BYTES = 224 << 10
# What is added up before it is one number: 16 float32 numbers in each of the 128 threads.
_AT_ONCE = 16


def fits(weight: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `matvec` takes a weight [out, in]: of 16 bits, multiples of 16 and 128, rows that shared memory holds."""
    out, size = weight.shape
    held = (1 + _COPIES) * size * weight.dtype.itemsize
    return weight.dtype.itemsize == 2 and out % STRIP == 0 and size % LANES == 0 and held <= _SHARED_BYTES


def matvec(x: Array, weight: Array, interpret: Any = None) -> Array:
    """x [1, in] times weight [out, in] that `fits`, of one 16-bit type: float32 [1, out].

    `interpret` is Pallas' own parameter, with which the kernel runs on a CPU.
    """
    out, size = weight.shape
    parts, item = size // LANES, weight.dtype.itemsize
    rows = 2 if 2 * size * item <= _COPY_BYTES else 1

    def strip(x_ref: Any, weight_ref: Any, out_ref: Any, x_here: Any, copied: Any) -> None:
        first = lax.axis_index("strip") * STRIP
        plgpu.copy_gmem_to_smem(x_ref, x_here, copied)
        plgpu.barrier_wait(copied)

        def step(indices: Any, rows_here: Any) -> None:
            for row in range(rows):
                out_ref[first + indices[0] * rows + row] = _sum_of_products(x_here, rows_here, row, parts)

        streamed = plgpu.BlockSpec((rows, parts, LANES), lambda i: (i, 0, 0))
        stream = plgpu.emit_pipeline(step, grid=(STRIP // rows,), in_specs=[streamed], max_concurrent_steps=_COPIES)
        stream(weight_ref.at[pl.ds(first, STRIP)])

    kernel = plgpu.kernel(
        strip,
        out_type=jax.ShapeDtypeStruct((out,), jnp.float32),
        scratch_types=[plgpu.SMEM((parts, LANES), x.dtype), plgpu.Barrier()],
        grid=(out // STRIP,),
        grid_names=("strip",),
        interpret=interpret,
    )
    made: Array = kernel(x.reshape(parts, LANES), weight.reshape(out, parts, LANES))
    return made[None]


def _sum_of_products(x_here: Any, rows_here: Any, row: int, parts: int) -> Array:
    total = jnp.float32(0)
    for start in range(0, parts, _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, parts))
        total += jnp.sum(x_here[some].astype(jnp.float32) * rows_here[row, some].astype(jnp.float32))
    return total
