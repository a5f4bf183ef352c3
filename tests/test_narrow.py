"""Narrowed weights against the full model with the other neurons masked out."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.model.backends import width_multiple
from coreinfer_jax.model.layers import mlp_pass
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity import narrow as narrowing
from coreinfer_jax.sparsity.narrow import padded_width
from tests.support import LLAMA, MODELS, OPT, first_quick, half_slow, one_quick_in, random_model

TOKENS = np.random.default_rng(0).integers(3, 101, (2, 17))


def random_core(config: ci.ModelConfig, kept: int, seed: int = 0, rows: int | None = None) -> ci.CoreNeurons:
    rng = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        return np.sort(rng.choice(config.mlp_size, kept, replace=False))

    return ci.CoreNeurons(
        draw() if rows is None else np.stack([draw() for _ in range(rows)]) for _ in range(config.num_layers)
    )


def masked(params: Params, core: ci.CoreNeurons) -> Params:
    """Full-width params whose other neurons have a zero column in the down projection."""

    def layer(l: int):
        original = params.layers[l]
        keep = np.zeros(params.config.mlp_size, np.float32)
        keep[core.layers[l]] = 1
        down = original.mlp.down.replace(weight=original.mlp.down.weight * keep[None, :])
        return original.replace(mlp=original.mlp.replace(down=down))

    return params.replace(layers=tuple(layer(l) for l in range(len(params.layers))))


@pytest.mark.parametrize("name", half_slow(MODELS))
@pytest.mark.parametrize("kept", [1, 40, 96])
def test_compacted_mlp_equals_masked_full_width_mlp(name: str, kept: int) -> None:
    config = replace(MODELS[name], mlp_bias=True)
    params = random_model(config)
    core = random_core(config, kept)
    x = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
    narrow, full = ci.compact(params, core).layers[1].mlp, params.layers[1].mlp
    mask = np.zeros(config.mlp_size, np.float32)
    mask[core.layers[1]] = 1
    expected = full.down(mlp_pass(x, full, config).activations * mask[None, None, :])
    assert narrow.up.weight.shape == (kept, config.hidden_size)
    assert narrow.down.weight.shape == (config.hidden_size, kept)
    np.testing.assert_allclose(narrow.down(mlp_pass(x, narrow, config).activations), expected, atol=2e-5)


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_static_core_gives_the_logits_of_compacted_params(name: str) -> None:
    params, core = random_model(MODELS[name]), random_core(MODELS[name], 30)
    static = jax.jit(ci.forward, static_argnames="core")
    expected = np.asarray(ci.forward(masked(params, core), TOKENS))
    np.testing.assert_allclose(static(params, TOKENS, core=core), expected, atol=1e-4)
    np.testing.assert_allclose(ci.forward(params, TOKENS, core), expected, atol=1e-4)
    np.testing.assert_allclose(ci.forward(ci.compact(params, core), TOKENS), expected, atol=1e-4)
    programs = static._cache_size()
    static(params, TOKENS, core=ci.CoreNeurons([indices.tolist() for indices in core.layers]))
    assert static._cache_size() == programs, "an equal set compiles nothing"


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_per_row_core_neurons_equal_each_row_alone(name: str) -> None:
    params, core = random_model(MODELS[name]), random_core(MODELS[name], 30, rows=2)
    both = np.asarray(ci.forward(params, TOKENS, core))
    for b in range(2):
        np.testing.assert_allclose(both[b], ci.forward(params, TOKENS[b : b + 1], core.row(b))[0], atol=1e-4)


def test_layers_left_dense_keep_their_arrays() -> None:
    params = random_model(OPT)
    narrow = ci.compact(params, ci.CoreNeurons([None, [0, 5], None]))
    assert [layer.mlp.width for layer in narrow.layers] == [96, 2, 96]
    assert narrow.layers[0].mlp.up.weight is params.layers[0].mlp.up.weight
    assert narrow.token_embedding is params.token_embedding
    assert narrow.layers[1].attention.query.weight is params.layers[1].attention.query.weight


def test_core_neurons_are_values() -> None:
    first, same, other = ci.CoreNeurons([[1, 2], None]), ci.CoreNeurons(([1, 2], None)), ci.CoreNeurons([[1, 3], None])
    assert first == same
    assert hash(first) == hash(same)
    assert len({first, same, other}) == 2
    with pytest.raises(ValueError, match="read-only"):
        first.layers[0][0] = 7
    # The digest tells shapes and dense layers apart, not only the indices in a row.
    assert len({ci.CoreNeurons([[[0, 1]]]), ci.CoreNeurons([[0, 1]]), ci.CoreNeurons([[0, 1], None])}) == 3


def test_core_neurons_do_not_follow_the_caller_array() -> None:
    indices = np.array([1, 2], np.int32)
    core = ci.CoreNeurons([indices])
    indices[0] = 0
    assert core.layers[0].tolist() == [1, 2]


def test_gradients_flow_through_narrowed_params() -> None:
    params, core = random_model(LLAMA), random_core(LLAMA, 30)
    grads = jax.grad(lambda p: jnp.mean(ci.forward(p, jnp.asarray(TOKENS), core) ** 2))(params)
    outside = np.setdiff1d(np.arange(LLAMA.mlp_size), core.layers[0])
    moved = np.abs(np.asarray(grads.layers[0].mlp.up.weight)).sum(axis=1)
    assert (moved[core.layers[0]] > 0).all()
    assert (moved[outside] == 0).all()


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, widths are padded to a multiple of 16, as they are to one of 128 on accelerators."""
    return lambda: monkeypatch.setattr(narrowing, "width_multiple", lambda weight: 16)


@pytest.mark.parametrize(("name", "rows"), one_quick_in(4, MODELS, [None, 2]))
def test_padded_widths_change_no_logits(name: str, rows: int | None, padding: Callable[[], None]) -> None:
    params = random_model(replace(MODELS[name], mlp_bias=True))
    sets = random_core(params.config, 30, rows=rows)
    shape = (32,) if rows is None else (rows, 32)
    core = ci.CoreNeurons(sets.layers, [np.linspace(-1, 1, np.prod(shape)).reshape(shape)] * 3)
    expected = ci.forward(params, TOKENS, core)
    plain = ci.compact(params, core)
    padding()
    padded = ci.compact(params, core)
    assert [layer.mlp.width for layer in plain.layers] == [30] * 3
    assert [layer.mlp.width for layer in padded.layers] == [32] * 3
    np.testing.assert_allclose(ci.forward(padded, TOKENS), expected, atol=1e-5)
    mlp = padded.layers[0].mlp
    for array, axis in ((mlp.up.weight, -2), (mlp.up.bias, -1), (mlp.down.weight, -1)):
        assert not np.take(np.asarray(array), [30, 31], axis=axis).any()
    with pytest.raises(ci.CoreInferError, match="narrowed"):
        ci.compact(padded, core)


@pytest.mark.parametrize("name", first_quick(MODELS))
def test_padded_widths_generate_the_same_from_the_same_sets(name: str, padding: Callable[[], None]) -> None:
    params, prompts = random_model(MODELS[name]), [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    cores = [ci.CoreConfig(), ci.CoreConfig(beta=0.4, per_row=False), ci.CoreConfig.paper()]
    cores += [random_core(params.config, 30, rows=2), ci.CoreNeurons([None, np.arange(90), np.arange(96)])]

    def generated() -> list[ci.Generation]:
        return [ci.generate(params, prompts, core, max_new_tokens=12) for core in cores]

    plain = generated()
    padding()
    for before, after in zip(plain, generated(), strict=True):
        np.testing.assert_array_equal(after.tokens, before.tokens)
        assert after.core == before.core
        assert after.stats.kept_neurons == before.stats.kept_neurons
        padded = [padded_width(kept, 96, 16) for kept in before.stats.kept_neurons]
        more = sum(padded) - sum(before.stats.kept_neurons)
        sets = 2 if after.core.rows == 2 else 1
        biases = sets * 4 * more if params.config.mlp_bias else 0
        matrices = sets * 4 * 32 * more * (3 if params.layers[0].mlp.gate else 2)
        read = after.stats.bytes_read_per_token - before.stats.bytes_read_per_token
        assert read == (matrices + biases) / 2


@pytest.mark.parametrize(
    ("kept", "mlp_size", "width"),
    [
        (1, 14336, 128),
        (2816, 14336, 2816),
        (2867, 14336, 2944),
        (14200, 14336, 14208),
        (14250, 14336, 14250),
        (14336, 14336, 14336),
        (0, 14336, 0),
        (40, 96, 40),
        (96, 96, 96),
        (800, 1000, 896),
        (900, 1000, 900),
    ],
)
def test_padded_widths_stay_below_all_neurons(kept: int, mlp_size: int, width: int) -> None:
    assert padded_width(kept, mlp_size, 128) == width
    assert padded_width(kept, mlp_size, 1) == kept


def test_the_place_of_the_weights_decides_on_padding() -> None:
    def placed(platform: str) -> SimpleNamespace:
        return SimpleNamespace(sharding=SimpleNamespace(device_set=[SimpleNamespace(platform=platform)]))

    cpu = jax.device_put(np.ones(3), jax.devices("cpu")[0])
    assert width_multiple(cpu) == width_multiple(placed("cpu")) == 1
    assert width_multiple(placed("gpu")) == width_multiple(placed("tpu")) == 128
    of_default = 1 if jax.default_backend() == "cpu" else 128
    assert width_multiple(np.ones(3)) == of_default
    jax.jit(lambda x: x * width_multiple(x)).lower(cpu)
