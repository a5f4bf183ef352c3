"""Products of few rows, which CPU programs write in a form of their own, against NumPy in float64."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreinfer_jax.model.backends import DECODE_OPTIONS, matmul, matmul_per_row, one_pass, products, write
from coreinfer_jax.model.layers import mlp_pass
from coreinfer_jax.model.weights import Linear
from tests.support import MODELS, random_model


def drawn(shape, seed, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Outputs are cut into blocks; the last ones overlap where they do not divide: 1, 5 and 11 outputs.
@pytest.mark.parametrize(("size_in", "size_out"), [(1, 1), (7, 5), (8193, 11)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 2), (1, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_few_rows_are_exact_but_for_the_order_of_sums(shape, size_in, size_out, dtype):
    x, weight = drawn((*shape, size_in), 0, dtype), drawn((size_out, size_in), 1, dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for options in ({}, DECODE_OPTIONS):
        y = jax.jit(matmul, compiler_options=options)(x, weight)
        assert y.dtype == jnp.float32
        assert np.abs(np.asarray(y) - expected).max() < 1e-6 * size_in


@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_their_own_weights_are_exact_but_for_the_order_of_sums(tokens, dtype):
    x, weight = drawn((3, tokens, 40), 0, dtype), drawn((3, 11, 40), 1, dtype)
    expected = np.einsum("bti,boi->bto", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    y = jax.jit(matmul_per_row, compiler_options=DECODE_OPTIONS)(x, weight)
    assert y.dtype == jnp.float32
    assert np.abs(np.asarray(y) - expected).max() < 1e-6 * 40


def test_rows_of_their_own_weights_equal_single_rows():
    x, weight = drawn((3, 1, 40), 2), drawn((3, 11, 40), 3)
    together = Linear(weight=weight)(x)
    for b in range(3):
        alone = Linear(weight=weight[b])(x[b : b + 1])
        assert np.array_equal(np.asarray(together[b], np.float32), np.asarray(alone[0], np.float32))


@pytest.mark.parametrize("bias", [None, np.arange(7)])
def test_parts_of_a_linear_are_those_of_numpy(bias):
    weight, x, offset = (np.asarray(drawn(shape, seed)) for seed, shape in enumerate(((7, 5), (2, 1, 5), (2, 7))))
    layer = Linear(jnp.asarray(weight), None if bias is None else jnp.asarray(bias, jnp.bfloat16))
    rows = jnp.asarray([[0, 3], [2, 4]])
    exact, wide = weight.astype(np.float64), np.asarray(x, np.float64)[:, 0]
    for b in range(2):
        outputs, inputs = layer.take_outputs(rows), layer.take_inputs(rows)
        assert (outputs.rows, outputs.size_out, outputs.size_in) == (2, 2, 5)
        assert (inputs.rows, inputs.size_out, inputs.size_in) == (2, 7, 2)
        np.testing.assert_array_equal(outputs.weight[b], weight[rows[b]])
        np.testing.assert_array_equal(inputs.weight[b], weight[:, rows[b]])
        assert bias is None or outputs.bias[b].tolist() == rows[b].tolist()
        assert inputs.bias is layer.bias
    np.testing.assert_allclose(layer.input_norms(), np.linalg.norm(exact, axis=0), rtol=1e-6)
    np.testing.assert_allclose(layer.mixed(jnp.asarray(wide, jnp.float32)), wide @ exact.T, rtol=1e-5, atol=1e-6)
    shifted = layer.shifted(jnp.asarray(offset, jnp.float32))(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16))
    expected = wide @ exact.T + np.asarray(offset, np.float64) + (0 if bias is None else bias)
    np.testing.assert_allclose(np.asarray(shifted, np.float64)[:, 0], expected, rtol=1e-2, atol=1e-2)
    assert layer.shifted(None) is layer


@pytest.mark.parametrize("name", ["opt", "llama", "relu-llama"])
def test_activations_and_what_the_activation_function_gave_are_those_of_numpy(name):
    params = random_model(MODELS[name])
    mlp, x = params.layers[1].mlp, np.asarray(drawn((2, 3, params.config.hidden_size), 5, "float32"))
    linear_of = lambda m: x @ np.asarray(m.weight).T + (0 if m.bias is None else np.asarray(m.bias))  # noqa: E731
    act = (lambda v: np.maximum(v, 0)) if params.config.activation == "relu" else (lambda v: v / (1 + np.exp(-v)))
    gated = act(linear_of(mlp.up if mlp.gate is None else mlp.gate))
    found = mlp_pass(jnp.asarray(x), mlp, params.config)
    np.testing.assert_allclose(found.gated, gated, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.activations, gated if mlp.gate is None else gated * linear_of(mlp.up), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_infinity_and_nan_come_through_a_decode_program_in_their_own_row_only(rows):
    weight = drawn((4, 40), 4)
    product = jax.jit(matmul, compiler_options=DECODE_OPTIONS)
    for value in (np.inf, np.nan):
        x = drawn((1, rows, 40), 5).at[0, 0, 3].set(value)
        finite = np.isfinite(np.asarray(product(x, weight)))
        assert not finite[0, 0].any()
        assert finite[0, 1:].all()
        assert not bool(jax.jit(lambda y: jnp.isfinite(y).all(), compiler_options=DECODE_OPTIONS)(product(x, weight)))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("size", [2048, 5632])
def test_no_copy_of_a_narrow_weight_is_made(size, rows):
    """The speed of decoding on CPUs depends on it: a float32 copy would show among the temporaries."""
    x, weight, bias = drawn((1, rows, size), 0), drawn((size, size), 1), drawn((size,), 2)

    def steps(x, layer):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(layer(x)), x)

    lowered = jax.jit(steps, compiler_options=DECODE_OPTIONS).lower(x, Linear(weight=weight, bias=bias))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < size * size


@contextmanager
def as_on(platform):
    """Forms of another platform, where JAX would choose by the platform that it compiles for."""

    def chosen(*arguments, default=None, **forms):
        return forms.get(platform, default)(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", chosen)
        yield


@pytest.mark.parametrize("rows", [1, 3])
def test_joined_products_are_those_of_each_weight(rows):
    x = drawn((rows, 1, 64), 0)
    weights = [drawn((width, 64), width) for width in (256, 128, 384)]
    per_row = [drawn((rows, width, 64), width) for width in (256, 128, 384)]
    for own in (weights, per_row):
        with as_on("cuda"):
            found = products.__wrapped__(x, tuple(own))
        for one, weight in zip(found, own, strict=True):
            wide = np.broadcast_to(np.asarray(weight, np.float64), (rows, *weight.shape[-2:]))
            expected = np.einsum("bti,boi->bto", np.asarray(x, np.float64), wide)
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 1, 1, 32)])
def test_a_norm_beside_zeros_is_that_of_the_row_alone(shape):
    x = drawn(shape, 0, "float32")

    def norm(x):
        return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)

    with as_on("cuda"):
        found = one_pass(norm, x)
    np.testing.assert_array_equal(found, norm(x))


def test_a_cache_written_as_on_a_tpu_is_written_alike():
    past, new = drawn((3, 2, 8, 4), 0, "float32"), drawn((3, 1, 2, 4), 1, "float32")
    positions = jnp.asarray([[0], [7], [3]], jnp.int32)
    with as_on("tpu"):
        found = write(past, new, positions)
    expected = np.array(past)
    for b, s in enumerate([0, 7, 3]):
        expected[b, :, s] = new[b, 0]
    np.testing.assert_array_equal(found, expected)
