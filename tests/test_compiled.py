"""Decode and prefill as they are compiled for accelerators: without a copy of a weight, the cache in place.

What is marked `aot` compiles for devices that are not there (extra `aot`), and reads what the programs move.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import DTYPE, Asked, measure
from benchmarks.described import placed_on
from benchmarks.many_devices import CAPACITY, System, read
from benchmarks.shapes import shape_config, shape_fields
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.rows import Rows, first_drawn
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.cache import cache_bytes, init_cache
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import leaf_bytes
from coreinfer_jax.sparsity.narrow import padded_width
from coreinfer_jax.sparsity.votes import kept_neurons
from tests.support import LLAMA, random_model

MODELS = ("llama-3.1-8b", "opt-6.7b")
DECODE: dict[str, dict[str, Any]] = {
    "dense": {"keeps": (None,)},
    "narrowed": {"keeps": (0.2,)},
    "a core set per row": {"keeps": (0.2,), "rows": 2},
    "one core set for all rows": {"keeps": (0.2,), "rows": 4, "per_row": False},
    "sampled": {"keeps": (0.2,), "sampled": True},
}
SLOW = ("sampled", "prefill")
QUICK = {
    "llama-3.1-8b": ("dense", "narrowed", "one core set for all rows"),
    "opt-6.7b": ("a core set per row", "sampled", "prefill"),
}
# XLA's TPU code brings the keys of several rows and many heads onto the chip, and writes all of them back in every
# step: before JAX 0.11 those of two rows, since then of four.
WRITTEN_BACK = [("v6e", "opt-6.7b", "one core set for all rows")]
if jax.__version_info__ < (0, 11):
    WRITTEN_BACK.append(("v6e", "opt-6.7b", "a core set per row"))


def _rows(tokens: int) -> Rows:
    """Rows that have read one token each."""
    cache = init_cache(LLAMA, 2, 64, jnp.dtype(jnp.float32))
    first, read = jnp.asarray([3, 7], jnp.int32), jnp.ones(2, jnp.int32)
    return first_drawn(cache, jnp.zeros((2, LLAMA.vocab_size)), first, read, make_sampling(LLAMA, 2, GREEDY, tokens))


def test_decode_is_exported_for_every_platform_at_once() -> None:
    params, steps = random_model(LLAMA), np.int32(8)
    # What holds a cache's layout on TPUs is no operation that JAX promises to read in later versions.
    layout = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    export = jax.export.export(decode, platforms=("cuda", "tpu", "cpu"), disabled_checks=[layout])
    exported = export(params, _rows(8), steps)
    assert exported.platforms == ("cuda", "tpu", "cpu")
    _, tokens, run = exported.call(params, _rows(8), steps)
    _, expected, expected_run = decode(params, _rows(8), steps)
    np.testing.assert_array_equal(tokens, expected)
    assert run == expected_run > 1


# A v6e keeps the caches of few layers on the chip, which says nothing of a whole model.
LAYERS = {"h100": 2, "v6e": 8}
# Bytes that XLA sets aside for each layer besides what programs hold, for transfers that run ahead.
SET_ASIDE = {"h100": 0, "v6e": 1.25e6}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A described device; programs are compiled for it as users get them."""
    try:
        placed_on(request.param)
    except CoreInferError as error:
        pytest.skip(str(error))
    with jax.default_matmul_precision("default"):
        yield request.param


def _cases(*names: str) -> list[object]:
    """Every device, model and case."""
    return [pytest.param(*case, marks=_marks(*case)) for case in product(LAYERS, MODELS, names)]


def _marks(device: str, model: str, name: str) -> list[pytest.MarkDecorator]:
    """Each case is quick with one model; sorting and prefills take the compiler for TPUs a minute or two."""
    slow = name not in QUICK[model] or (device == "v6e" and name in SLOW)
    marks = [pytest.mark.slow] if slow else []
    if (device, model, name) in WRITTEN_BACK:
        marks.append(pytest.mark.xfail(reason="the cache is written back whole", raises=AssertionError, strict=True))
    return marks


@pytest.mark.aot
@pytest.mark.parametrize(("device", "model", "case"), _cases(*DECODE), indirect=["device"])
def test_a_decode_step_moves_what_it_needs(device: str, model: str, case: str) -> None:
    asked = Asked(device, model, LAYERS[device], programs=("decode",), **DECODE[case])
    (result,) = measure(asked)
    config = shape_config(shape_fields(model, LAYERS[device]))
    cache = cache_bytes(config, asked.rows, asked.capacity, DTYPE)
    weights = [leaf_bytes(leaf) for leaf in jax.tree.leaves(abstract_params(config, DTYPE).layers) if leaf.ndim > 1]
    assert result["weight_copies"] == []
    assert result["temporary_bytes"] - LAYERS[device] * SET_ASIDE[device] < min(min(weights), cache / 4)
    assert result["bytes_moved"] <= 1.02 * result["bytes_needed"]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("device", "model", "per_host"),
    [("h100", "llama-2-70b", 8), pytest.param("v5e-8", "llama-3.1-8b", 8, marks=pytest.mark.slow)],
    indirect=["device"],
)
def test_over_many_devices_a_layer_waits_twice(device: str, model: str, per_host: int) -> None:
    """A layer more is two sums over devices more, dense or narrowed; and each device holds its share of it."""
    system = System(model, device, 1, per_host)
    F = shape_config(shape_fields(model, 1)).mlp_size
    narrowed = padded_width(kept_neurons(0.4, F, per_host) // per_host, F // per_host, 128) * per_host / F
    for keep, share in ((None, 1.0), (0.4, narrowed)):
        few, more = (read(system, keep, layers) for layers in (1, 2))
        assert more["sums"] - few["sums"] == 2
        assert more["others"] == few["others"]
        config = shape_config(shape_fields(model, 1))
        layer = abstract_params(config, DTYPE).layers[0]
        dense = sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(layer.attention))
        held = (dense + share * sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(layer.mlp))) / per_host
        held += cache_bytes(config, 1, CAPACITY, DTYPE) / per_host
        assert more["bytes_per_device"] - few["bytes_per_device"] == pytest.approx(held, rel=0.02)


# Enough layers for the activations of all to be far more than those of one.
PREFILLS = {"h100": (4, 2048), "v6e": (2, 512)}


@pytest.mark.aot
@pytest.mark.parametrize(("device", "model", "case"), _cases("prefill"), indirect=["device"])
def test_a_prefill_keeps_no_more_alive_where_it_observes(device: str, model: str, case: str) -> None:
    layers, tokens = PREFILLS[device]
    plain, observing = measure(Asked(device, model, layers, prompt_tokens=tokens, programs=(case,)))
    assert observing["temporary_bytes"] <= 1.1 * plain["temporary_bytes"]
