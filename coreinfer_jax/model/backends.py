"""Forms that exist for one backend or one JAX version, each with the measurement that asked for it.

Each computes what a plainer form computes. "Remove" says when the plainer form can take over.

Temporaries are those of a decode loop, by `memory_analysis`, on jaxlib 0.10.2 and much the same on 0.12.0: 4 layers,
25 MB of bfloat16 weights, a cache of 8192 positions, 34 MB per row in float32. tests/test_compilation.py holds the same
loop below one layer's size.
Speeds are of two x86 cores with AVX-512, whose memory gives about 30 GB/s, or of what is named: an accelerator, or two
cores with AVX2, whose memory gives 15 to 20 GB/s.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

# Options of a program that multiplies few rows: sums in any order.
#
# They let XLA's CPU code use vector instructions for products with bfloat16 weights. Without them, one row times [5632,
# 2048] takes 0.7 ms on jaxlib 0.10.2, but 12.5 ms on 0.12.0. NaN, infinity and division stay exact. Remove: that
# product takes no longer without these options.
ANY_ORDER: dict[str, str | bool | int] = {
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
}

# Options of a compiled loop that reads weights in every step.
#
# Loop-invariant code motion is off, because XLA's CPU code hoists float32 copies of bfloat16 weights out of the loop: a
# second, wider copy of the model, made anew by each call. Temporaries: 51 MB with the pass, 0.5 MB without it.
# Remove: they are small with the pass.
#
# XLA's GPU code records a step's programs once and starts them together. It does so for the whole loop only where it is
# told to record loops, and all else that it records by default; else the host asks after every step whether to go on.
# A record of one loop counts as too small without the second option. An H200, 32 layers of LLaMA 3.1 8B, 20 % of the
# neurons, JAX 0.11.2: 2 % less time per step. Remove: loops are recorded by default.
DECODE_OPTIONS: dict[str, str | bool | int] = ANY_ORDER | {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
    "xla_gpu_graph_min_graph_size": 1,
}

# Options of a program that reads a text piece by piece: the first of those reasons counts, each piece is long.
PIECES_OPTIONS: dict[str, str | bool | int] = ANY_ORDER | {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


# Compiled apart, so that layers of the same shapes share one trace.
@jax.jit
def products(x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    """x [B, T, in] times each of `weights`, all [out, in] or all [B, out, in]: float32 [B, T, out] each.

    Of a few rows, but not of one, a GPU makes one product with all weights of 16 bits, read where they lie, instead of
    a program for each. Joining widths that are no multiple of a kernel's block would copy the weights in every step. A
    single row has `_sum_one_row`, which XLA joins by itself. Remove: it joins products by itself.
    """

    def one_by_one(x: Array, *weights: Array) -> tuple[Array, ...]:
        return tuple(matmul(x, weight) if weight.ndim == 2 else matmul_per_row(x, weight) for weight in weights)

    def joined(x: Array, *weights: Array) -> tuple[Array, ...]:
        ends = np.cumsum([weight.shape[-2] for weight in weights])
        return tuple(jnp.split(one_by_one(x, jnp.concatenate(weights, axis=-2))[0], ends[:-1], axis=-1))

    rows = x.shape[1] if weights[0].ndim == 3 else x.shape[0] * x.shape[1]
    few = 1 < rows <= _JOINED_ROWS and x.dtype.itemsize == 2
    if not few or len(weights) == 1 or any(weight.shape[-2] % _ACCELERATOR_WIDTHS for weight in weights):
        return one_by_one(x, *weights)
    return lax.platform_dependent(x, *weights, cuda=joined, default=one_by_one)


# Rows of one block of a GPU's product: up to as many, a product reads weights and does little else.
_JOINED_ROWS = 16


def matmul(x: Array, weight: Array) -> Array:
    """x [B, T, in] times weight [out, in]: float32 [B, T, out]."""
    forms: dict[str, Callable[[Array, Array], Array]] = {}
    if x.shape[0] * x.shape[1] == 1:
        forms["cuda"] = _sum_one_row
    if _has_few_rows(x):
        forms["cpu"] = _sum_few_rows
    if not forms:
        return _contract_last(x, weight)
    return lax.platform_dependent(x, weight, default=_contract_last, **forms)


def matmul_per_row(x: Array, weight: Array) -> Array:
    """x [B, T, in], each row times its own of weight [B, out, in]: float32 [B, T, out]."""

    def at_once(x: Array, weight: Array) -> Array:
        return jax.vmap(lambda row, own: matmul(row[None], own)[0])(x, weight)

    if x.shape[1] > _FEW_ROWS:
        return at_once(x, weight)
    return lax.platform_dependent(x, weight, cpu=_one_after_another, default=at_once)


def _one_after_another(x: Array, weight: Array) -> Array:
    # XLA's CPU code has no fast form of a product with a matrix for each row. Six pairs of [768, 576] and [576, 768],
    # one core with AVX2, jaxlib 0.10.2, ms at once and in this form: float32 11.0 and 1.2 for one row, 10.0 and 6.4 for
    # 4, 19 and 13 for 8; bfloat16 12.0 and 1.0, 39 and 5.6, 77 and 11. A copy of the form for each row is as fast, and
    # takes longer to compile with every row. Remove: a product at once takes no longer.
    return lax.map(lambda own: _sum_few_rows(own[0][None], own[1])[0], (x, weight))


# Up to so many rows are summed up beside each other while a weight is read once. Eight such sums fit the registers of a
# core with AVX2. A step of SmolLM2 that extends by 4 tokens over one that extends by 1, on two cores with AVX2 whose
# memory gives 15 to 20 GB/s, jaxlib 0.10.2 and 0.12.0: float32 2.3 and 2.0 in the plain form, 1.2 and 1.0 in this one;
# bfloat16 1.7 and 1.5 in this one, 1.2 of the step before one row took this form too. Its weights come twice as fast:
# 4 rows of them ask for 60 % of all that these cores can multiply and add. 8 rows take as long in either form.
# Remove: `_contract_last` of 4 rows takes no longer.
_FEW_ROWS = 4
_SUMS_TOGETHER = 8


def _has_few_rows(x: Array) -> bool:
    """Whether x [B, T, in] has so few rows that the plain form is slow on CPUs. It is not for a float32 row alone.

    For one row of 16 bits, XLA's CPU code makes a float32 copy of the whole weight, in every step. Temporaries: 49 MB,
    with the form below 0.5 MB. Speed: 1.4 GB/s. Remove: `_contract_last` makes no copy (tests/test_layers.py).
    """
    rows = x.shape[0] * x.shape[1]
    return rows <= _FEW_ROWS and (rows > 1 or x.dtype.itemsize == 2)


def _contract_last(x: Array, weight: Array) -> Array:
    # The plain form. Float32 weights are read at 23 to 32 GB/s; x times the transpose falls to 2 from 4096 inputs on.
    last = x.ndim - 1
    return lax.dot_general(x, weight, (((last,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _sum_one_row(x: Array, weight: Array) -> Array:
    # Products and their sums, no matrix product: XLA's GPU code reads a weight faster so than with any kernel for
    # matrices, and makes one program of several weights of one shape. An H200, weights in bfloat16, GB/s in this form
    # and in the plain one: [14336, 4096] 3561 and 2655, [4096, 4096] 3139 and 2395, [4096, 2944] 2822 and 1076. A step
    # with 12 layers, JAX 0.11.2, with `one_pass` as it is: LLaMA 3.1 8B 1.75 ms instead of 1.96, with 2944 neurons
    # 1.02 instead of 1.28; OPT 6.7B 1.54 instead of 1.82, with 3328 neurons 1.02 instead of 1.20. Two rows in this
    # form are slower than in the plain one. Remove: `_contract_last` is as fast.
    row = x.reshape(1, -1).astype(jnp.float32)
    return jnp.sum(row * weight.astype(jnp.float32), axis=1)[None, None]


def _sum_few_rows(x: Array, weight: Array) -> Array:
    # Products of every row with several blocks of outputs, summed up in one loop. XLA's CPU code keeps one sum of each
    # pair going, and reads and converts each weight once. With a single block the loop waits for its own additions.
    # On cores with AVX2 one row of bfloat16 reads 15 to 20 GB/s, what their memory gives; its product with the
    # transpose read 8 to 12, and 5 to 6 from 4096 inputs on. Needs sums in any order (`ANY_ORDER`): without, one row
    # times [49152, 576] takes 8 ms instead of 2.4.
    B, T, size_in = x.shape
    rows = _held(x.reshape(B * T, size_in).astype(jnp.float32))
    converted = weight.astype(jnp.float32)
    size_out = weight.shape[0]
    count = min(4, _SUMS_TOGETHER // rows.shape[0])
    size = -(-size_out // count)
    # The last blocks overlap those before them where they would reach beyond the end.
    starts = [min(i * size, size_out - size) for i in range(count)]
    blocks = [converted[start : start + size] for start in starts]
    sums = _sum_together([row[None] * block for row in rows for block in blocks], axis=1)
    news = [one[i % count * size - starts[i % count] :] for i, one in enumerate(sums)]
    return jnp.concatenate(news).reshape(B, T, size_out)


def _held(rows: Array) -> Array:
    """`rows` [R, in] as they are, made once: else their making is fused with the sums and done again per output.

    Zeros are added, in two sums at once, which XLA's CPU code neither simplifies nor fuses with what reads them; a
    barrier it takes away first. Four rows over one, [1536, 576] in float32, jaxlib 0.12.0: 4.4 unheld, 1.1 held.
    Remove: they are equal.
    """
    half = -(-rows.shape[1] // 2)
    padded = jnp.stack([rows, jnp.zeros_like(rows)])
    first, second = _sum_together([padded[:, :, :half], padded[:, :, -half:]], axis=0)
    return jnp.concatenate([first, second[:, 2 * half - rows.shape[1] :]], axis=1)


def _sum_together(addends: list[Array], axis: int) -> tuple[Array, ...]:
    """The sums of arrays of one shape over `axis`, in one loop."""

    def add(some: tuple[Array, ...], others: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(map(jnp.add, some, others))

    zeros = tuple(jnp.zeros((), one.dtype) for one in addends)
    return tuple(lax.reduce(tuple(addends), zeros, add, (axis,)))


# XLA's GPU code joins the products of gate and up, and brings sizes to what its kernels take: of weights whose width is
# no multiple of a kernel's block it makes longer copies, in every decode step. An H200, 8 layers of LLaMA 3.1 8B (F
# 14336) in bfloat16, one row, JAX 0.11.2, ms per step: all neurons 1.52; 2867 neurons 1.48, 2816 0.96; 5734 neurons
# 1.45, 5760 1.10. OPT 6.7B (F 16384): all 1.29; 3277 neurons 1.11, 3328 0.91. Remove: a step takes no longer at 2867
# neurons than at 2944.
_ACCELERATOR_WIDTHS = 128


def width_multiple(weight: Array | jax.ShapeDtypeStruct) -> int:
    """What the width of an MLP cut out of `weight` is to be a multiple of: 1 on a CPU, where every width runs well.

    The weight's own place decides; that of JAX's default backend where it has none, as within a program.
    """
    sharding = None if isinstance(weight, jax.core.Tracer) else getattr(weight, "sharding", None)
    platform = jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform
    return 1 if platform == "cpu" else _ACCELERATOR_WIDTHS


def draft_size(weight: Array, rows: int, streams: bool = False) -> int:
    """How many tokens to draft for each of `rows` (B) rows of a batch, where `weight` lies.

    A CPU verifies up to `_FEW_ROWS` tokens in little more time than one takes, and more of them at once cost much; a
    draft of one token is the least. On accelerators a pass over few tokens takes as long as one over a single token;
    one that `streams` the weights of MLPs to them waits for these, so that it may as well read more.
    """
    if width_multiple(weight) > 1:
        return _STREAMED_DRAFT if streams else _ACCELERATOR_DRAFT
    # Streamed or not: where a CPU reads MLPs from a file for each pass, one over 16 tokens still takes twice as long as
    # one over 4.
    return max(1, _FEW_ROWS // rows - 1)


_ACCELERATOR_DRAFT = 7
_STREAMED_DRAFT = 15


def one_pass(norm: Callable[[Array], Array], x: Array) -> Array:
    """norm(x) of x [B, T, ..., D], a norm over the last axis.

    XLA's GPU code makes one program of the norms of several rows, but two of a single one: its sum is no array. So a
    single row has a row of zeros beside it there, which saves two kernels per layer. And it would norm the row again in
    every program that multiplies it (`_sum_one_row`) and in every one of its blocks, so that is held apart. An H200, 12
    layers of LLaMA 3.1 8B with 2944 neurons in bfloat16, JAX 0.11.2, ms per step: 1.02; two programs 1.03; normed again
    1.17. Remove: a single row takes one program, and is normed once.
    """
    if x.size != x.shape[-1]:
        return norm(x)

    def beside_zeros(x: Array) -> Array:
        first = lax.broadcasted_iota(jnp.int32, (2, x.shape[-1]), 0) == 0
        two = jnp.where(first, x.reshape(1, -1), jnp.zeros((), x.dtype))
        return lax.optimization_barrier(norm(two.reshape(2, *x.shape[1:]))[:1])

    return lax.platform_dependent(x, cuda=beside_zeros, default=norm)


def write(past: Array, new: Array, positions: Array) -> Array:
    """`past` [B, G, S, H] with `new` [B, T, G, H] at slots `positions` [B, T]; positions outside 0 .. S-1 are dropped.

    Dropping matters for padding only: `dynamic_update_slice` would shift a block that overhangs the end and
    overwrite tokens that are there already.
    """
    widens = past.dtype.itemsize == 2 and _SCATTER_WIDENS
    if positions.shape[1] > 1:
        few = positions.shape[1] <= _FEW_ROWS
        return write_run(past, new, positions) if few and widens else _scatter(past, new, positions)
    elsewhere = _write_one_by_one if widens else _scatter
    return lax.platform_dependent(past, new, positions, tpu=_write_as_it_lies, default=elsewhere)


def write_run(past: Array, new: Array, positions: Array) -> Array:
    """`write` for at most S tokens per row in one run, row by row in place.

    A scatter takes XLA's CPU code, before JAX 0.11, a float32 copy of a 16-bit cache for every piece of a text.
    """
    S, T = past.shape[2], new.shape[1]
    index = jnp.arange(T)[None, None, :, None]
    for b in range(past.shape[0]):
        first = positions[b, 0]
        start = jnp.minimum(first, S - T)
        # What would overhang the end is left out; so many slots before the run are there already.
        beyond = first - start
        shifted = jnp.roll(new[b : b + 1].swapaxes(1, 2), beyond, axis=2)
        before = lax.dynamic_slice(past, (b, 0, start, 0), (1, *shifted.shape[1:]))
        past = lax.dynamic_update_slice(past, jnp.where(index < beyond, before, shifted), (b, 0, start, 0))
    return past


def _scatter(past: Array, new: Array, positions: Array) -> Array:
    if positions.size == 1:
        # XLA turns a scatter of one slot into a dynamic_update_slice, fuses it twice and copies the whole cache in
        # every decode step; with a second slot, which is dropped, it writes in place. Temporaries with a float32 cache:
        # 67 MB and 0.5 MB. Remove: they are small with one slot.
        new = jnp.concatenate([new, new], axis=1)
        positions = jnp.concatenate([positions, jnp.full_like(positions, past.shape[2])], axis=1)
    return past.at[jnp.arange(len(past))[:, None], :, positions].set(new, mode="drop", unique_indices=True)


# XLA's CPU code before JAX 0.11 makes a float32 copy of a 16-bit cache, in every step, to scatter into it. Temporaries
# of 3 rows: 101 MB, slot by slot 1.6 MB. Remove: the oldest supported JAX is 0.11.
_SCATTER_WIDENS = jax.__version_info__ < (0, 11)


def _write_one_by_one(past: Array, new: Array, positions: Array) -> Array:
    """`write` for one slot per row, none beyond the end."""
    for b in range(past.shape[0]):
        past = lax.dynamic_update_slice(past, new[b : b + 1].swapaxes(1, 2), (b, 0, positions[b, 0], 0))
    return past


def _write_as_it_lies(past: Array, new: Array, positions: Array) -> Array:
    # XLA's TPU code copies the whole cache for a scatter of one slot per row, and orders a cache of many heads anew
    # where the loop begins and ends. Temporaries of 2 layers in bfloat16 with 1024 positions, compiled by JAX 0.11.2
    # for a v6e: OPT 6.7B 47 MB, slot by slot 38 MB, in this form 3.2 MB; 4 rows 174, 38 and 4.1 MB; LLaMA 3.1 8B 11,
    # 2.4 and 2.4 MB. Remove: they are small with `_scatter`.
    in_order = Layout(tuple(range(past.ndim)))
    return with_layout_constraint(_write_one_by_one(past, new, positions), in_order)


Layered = TypeVar("Layered")


def before_the_next(made: tuple[Array, Layered]) -> tuple[Array, Layered]:
    """What a layer made, its residual stream [B, T, D] and what was observed of it, all before the next layer begins.

    XLA's GPU code would put off what is observed of all layers to the end, and keep their activations until then.
    Temporaries of a prefill of 2048 tokens, 8 layers of LLaMA 3.1 8B in bfloat16, compiled by JAX 0.11.2 for an H100:
    844 MB where nothing is observed; moments 1255 MB, votes 1774; in this form 844 and 895. Passes that observe
    nothing, as decode steps do, stay as they are. Remove: the temporaries are no larger without it.
    """
    if not jax.tree.leaves(made[1]):
        return made
    return lax.platform_dependent(made, cpu=lambda made: made, default=lax.optimization_barrier)
