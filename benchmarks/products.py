"""Where a decode step's time goes: the speed of each of its products alone, and what is left for everything else."""

from collections import Counter
from functools import partial
from math import prod
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from tqdm import tqdm

import coreinfer_jax as ci
from benchmarks.environment import environment, spread
from benchmarks.memory import bandwidth
from benchmarks.shapes import random_prompts, shape_config, shape_fields, shape_params
from coreinfer_jax.decoding import DECODE_OPTIONS
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.layers import matmul
from coreinfer_jax.params import Params, named_leaves

PROMPT_TOKENS, NEW_TOKENS = 64, 32
# Bytes of different matrices a product is timed over, more than caches hold.
SPAN = 400_000_000
# Matrices of one program: hundreds take minutes to compile.
MOST = 64
STEPS = 4


def measure(model: str, layers: int | None, rounds: int) -> dict[str, Any]:
    """Per dtype: the speed of every shape of product alone, of plain reads, and of a whole dense step.

    Raises:
        CoreInferError: an unknown model, more than fits, or fewer than one round.
    """
    config = shape_config(shape_fields(model, layers))
    if rounds < 1:
        raise CoreInferError(f"--rounds {rounds}: give at least 1")
    made_on = environment()
    return made_on | {
        "benchmark": "products",
        "model": model,
        "layers": config.num_layers,
        "rounds": rounds,
        "dtypes": {dtype: _of_dtype(shape_params(config, dtype), rounds, dtype) for dtype in ("float32", "bfloat16")},
    }


def _of_dtype(params: Params, rounds: int, dtype: str) -> dict[str, Any]:
    matrices = Counter(_decoded_matrices(params))
    prompt = random_prompts(params.config, 1, PROMPT_TOKENS)
    ci.generate(params, prompt, None, max_new_tokens=NEW_TOKENS)
    megabytes = {shape: prod(shape) * jnp.dtype(dtype).itemsize / 1e6 for shape in matrices}
    whole: list[float] = []
    plain: list[float] = []
    speeds: dict[tuple[int, ...], list[float]] = {shape: [] for shape in matrices}
    for _ in tqdm(range(rounds), desc=dtype, unit="round", disable=None):
        stats = ci.generate(params, prompt, None, max_new_tokens=NEW_TOKENS).stats
        plain.append(bandwidth() / 1e9)
        whole.append(stats.decode_seconds / stats.decode_steps)
        for shape in matrices:
            speeds[shape].append(_speed(shape, jnp.dtype(dtype)))
    return {
        "plain_gb_per_second": spread(plain),
        "step_ms": spread([1000 * seconds for seconds in whole]),
        "products": [
            {
                "out": shape[0],
                "in": shape[1],
                "number": number,
                "gb_per_second": spread(speeds[shape]),
                "ms": spread([number * megabytes[shape] / speed for speed in speeds[shape]]),
            }
            for shape, number in matrices.items()
        ],
    }


def _decoded_matrices(params: Params) -> list[tuple[int, ...]]:
    """Shapes of all matrices a step multiplies with."""
    tables = ["position_embedding"] + ([] if params.unembedding is None else ["token_embedding"])
    return [leaf.shape for name, leaf in named_leaves(params) if leaf.ndim == 2 and name not in tables]


def _speed(shape: tuple[int, ...], dtype: jnp.dtype) -> float:
    """GB/s of products of one row with matrices of `shape`, as a decode program has them."""
    size = prod(shape) * dtype.itemsize
    number = min(MOST, max(2, SPAN // size))
    weights = [_filled(shape, dtype, i) for i in range(number)]
    row = jnp.ones((1, 1, shape[1]), dtype)
    zero = jnp.float32(0)
    jax.block_until_ready(_products(row, weights, zero))
    began = perf_counter()
    jax.block_until_ready(_products(row, weights, zero))
    return STEPS * number * size / (perf_counter() - began) / 1e9


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _filled(shape: tuple[int, ...], dtype: jnp.dtype, i: Array) -> Array:
    return jnp.full(shape, 0.01, dtype) * (1 + i).astype(dtype)


@partial(jax.jit, compiler_options=DECODE_OPTIONS)
def _products(row: Array, weights: list[Array], weight_of_sums: Array) -> Array:
    """The row after `STEPS` times all products, to each of which it adds the sum, weighed.

    So products follow one another as those of a step do; and as the compiler does not know that the weight will be 0,
    it leaves none out.
    """

    def step(i: Array, row: Array) -> Array:
        for weight in weights:
            row = row + (weight_of_sums * matmul(row, weight).sum()).astype(row.dtype)
        return row

    return lax.fori_loop(0, STEPS, step, row)
