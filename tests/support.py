"""Small models the tests share."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.host import HostArray
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, named_leaves, with_leaves

OPT = ModelConfig(
    family="opt",
    vocab_size=101,
    hidden_size=32,
    embed_size=32,
    mlp_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_size=8,
    max_positions=160,
    activation="relu",
    norm_eps=1e-5,
    attention_bias=True,
    mlp_bias=True,
    tied=True,
    bos_id=2,
    eos_ids=(2,),
    pad_id=1,
)
OPT_350M_STYLE = replace(OPT, embed_size=16, norm_first=False, final_norm=False)
LLAMA = replace(
    OPT,
    family="llama",
    num_kv_heads=2,
    activation="silu",
    norm_eps=1e-6,
    attention_bias=False,
    mlp_bias=False,
    tied=False,
    rope=Rope(),
    bos_id=1,
    pad_id=None,
)
MODELS = {"opt": OPT, "opt-350m-style": OPT_350M_STYLE, "llama": LLAMA, "relu-llama": replace(LLAMA, activation="relu")}


def first_quick(*axes: Iterable[object]) -> list[object]:
    """Parameters: all combinations of the axes' values, of which all but the first are slow."""
    return [pytest.param(*one, marks=[pytest.mark.slow] if i else []) for i, one in enumerate(product(*axes))]


def half_slow(*axes: Iterable[object]) -> list[object]:
    """Parameters: all combinations of the axes' values, every second one slow.

    With two or more axes each value has a quick one.
    """
    return one_quick_in(2, *axes)


def one_quick_in(many: int, *axes: Iterable[object]) -> list[object]:
    """Parameters: all combinations of the axes' values, all slow but those whose numbers add up to a multiple."""
    numbered = [list(enumerate(axis)) for axis in axes]
    return [
        pytest.param(*(value for _, value in one), marks=[pytest.mark.slow] if sum(i for i, _ in one) % many else [])
        for one in product(*numbered)
    ]


@cache
def random_model(config: ModelConfig, seed: int = 0, dtype: str = "float32", scale: float = 0.2) -> Params:
    """Random weights, large enough that the best token stands clear of the second best.

    NumPy draws them: JAX would compile a program for every shape.
    """
    rng, shapes = np.random.default_rng(seed), abstract_params(config, jnp.dtype(dtype))
    sizes = {name: leaf.shape for name, leaf in named_leaves(shapes)}

    def draw(name: str) -> jax.Array:
        noise = scale * rng.standard_normal(sizes[name], np.float32)
        return jnp.asarray(noise + name.endswith("norm.scale"), dtype)

    return with_leaves(shapes, draw)


def with_mlps_on_host(params: Params) -> Params:
    """`params` as `load` returns them with mlps_on_host=True, the MLPs read from arrays instead of a file."""

    def leaf(name: str) -> jax.Array:
        array = leaves[name]
        if ".mlp." not in name:
            return array
        held = np.array(array)
        return HostArray(held.shape, held.dtype, held.copy, lambda begin, end: held[begin:end].copy())

    leaves = dict(named_leaves(params))
    return replace(with_leaves(params, leaf), calibration=params.calibration)


def check_same_core(one: ci.CoreNeurons, other: ci.CoreNeurons) -> None:
    """The same neurons, and the same offsets but for the rounding of sums that were added in another order."""
    for a, b in zip(one.layers, other.layers, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.offsets, other.offsets, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
