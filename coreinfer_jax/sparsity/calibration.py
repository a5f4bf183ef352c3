"""`Calibration`: what texts said of a model's neurons, and the setting found for it."""

import numpy as np
from flax import struct
from jax import Array

from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.rules import Contribution, Sums

# The rule whose sums a calibration holds.
PRIOR_RULE = Contribution.name


@struct.dataclass
class Calibration:
    """What `calibrate` found; it lies beside a model's weights and is loaded with them.

    Attributes:
        prior: per layer, sums over the texts by `PRIOR_RULE`, float32 [] and [F].
        gains: float32 [L, PARTS], what each further part of a layer's neurons is worth
            (lab/evaluation/sensitivity.py); None where that is not known.
        core: how to generate where the caller names nothing; None with all neurons.
    """

    prior: tuple[Sums, ...]
    gains: np.ndarray | None
    core: Chooser | None = struct.field(pytree_node=False)


def calibration_of(params: Params) -> Calibration | None:
    """What is known of a model's neurons; None where nothing is."""
    known: Calibration | Array | None = params.calibration
    assert known is None or isinstance(known, Calibration), "nothing else is kept there"
    return known


def gains_of(params: Params) -> np.ndarray | None:
    """[L, PARTS], what each further part of a layer's neurons is worth; None where that is not known."""
    known = calibration_of(params)
    return None if known is None else known.gains
