"""The kernel of our own for Hopper GPUs, on a CPU through Pallas' interpreter, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public only since JAX 0.11

from benchmarks import mosaic


@pytest.mark.parametrize(("out", "size"), [(32, 256), (16, 2176), (16, 4224)])
def test_the_kernel_multiplies(out, size):
    # Two rows at a time, more inputs than are added up at once, and rows of which one fills a copy.
    generator = np.random.default_rng(0)
    x, weight = (jnp.asarray(generator.standard_normal(shape), jnp.bfloat16) for shape in ((1, size), (out, size)))
    made = mosaic.matvec(x, weight, interpret=InterpretGPUParams())
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert made.shape == (1, out)
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(made), exact, rtol=0, atol=1e-6 * size)


def test_only_weights_of_whole_strips_and_copies_fit():
    def fits(*shape):
        return mosaic.fits(jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    assert fits(16, 128)
    assert fits(128256, 4096)
    assert not fits(24, 128)
    assert not fits(16, 192)
    assert not fits(16, 256 * 128 + 128)
