"""Linear neurons: a few neurons without an activation function, which write most of what those left out would.

Much of an activation follows the MLP's input x linearly: a_n(x) is about c_n + q_n . P x, with r directions P [r, D]
that all neurons of a layer share. What the neurons outside of a core set S write is then about c_S + B_S P x: a
constant, and one small matrix B_S = W Q^T - W_S Q_S^T [D, r], where W [D, F] is the down projection. That is r more
neurons. Their activations are P x itself, and their columns of the down projection are B_S.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.shards import WHOLE, along, own_part, own_total
from coreinfer_jax.model.weights import Linear


@struct.dataclass
class LinearFit:
    """How the activations of one layer follow its MLP's input.

    Attributes:
        directions: P [r, D].
        slopes: Q [r, F].
        constants: c, float32 [F].
        written: W Q^T [D, r], what all neurons together write.
    """

    directions: Array
    slopes: Array
    constants: Array
    written: Array

    def specs(self) -> "LinearFit":
        """Neurons are spread over devices, which all hold the directions."""
        return LinearFit(directions=WHOLE, slopes=along(1, 2), constants=along(0, 1), written=WHOLE)

    @property
    def size(self) -> int:
        """Linear neurons, r."""
        return int(self.directions.shape[0])

    def bytes_beside(self, dtype: jnp.dtype) -> int:
        """Bytes that the linear neurons add to a narrowed MLP of a type: their rows and their columns."""
        return 2 * int(self.directions.size) * jnp.dtype(dtype).itemsize

    def expected(self, inputs: Array) -> Array:
        """The activations that inputs x [B, T, D] make likely: float32 [B, T, F]."""
        B, T, D = inputs.shape
        placed = _product(inputs.reshape(B * T, D), self.directions.T)
        return _product(placed, self.slopes).reshape(B, T, -1) + self.constants[None, None, :]

    def unexplained(self, seen: MlpPass) -> Array:
        """Activations without what is expected of them: float32 [B, T, F]."""
        return seen.activations.astype(jnp.float32) - self.expected(seen.inputs)

    def inputs_as(self, dtype: jnp.dtype) -> Linear:
        """What makes the linear neurons' activations of an MLP's input."""
        return Linear(self.directions.astype(dtype))

    def left_to_write(self, kept: Array, indices: Array, size: int) -> Array:
        """B_S, the linear neurons' columns of the down projection where S is kept: float32 [D, `size`].

        Args:
            kept: the down projection's columns of S, [D, K].
            indices: S, [K].
            size: at least r; the columns beyond are zero.
        """
        slopes = jnp.take(self.slopes, indices, axis=1, mode="clip")
        beyond = (0, 0), (0, size - self.size)
        written, by_kept = jnp.pad(self.written.astype(jnp.float32), beyond), jnp.pad(_product(kept, slopes.T), beyond)
        return own_part(written, -1) - own_total(by_kept)


def _product(x: Array, y: Array) -> Array:
    """x [m, n] times y [n, p] in float32."""
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    return lax.dot_general(*wide, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def neurons_worth(size: int, gated: bool) -> int:
    """How many neurons cost the bytes of `size` linear ones: those have two rows of D numbers, gated ones three."""
    return -(-2 * size // 3) if gated else size
