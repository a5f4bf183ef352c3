"""`Calibration`: what texts said of a model's neurons, and the setting found for it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Optional

import jax
import numpy as np
from flax import struct
from jax import Array

from coreinfer_jax.model.shards import WHOLE, along, specs
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.rules import Contribution, Sums

if TYPE_CHECKING:
    from coreinfer_jax.sparsity.choice import Chooser

# Up to which share of a layer's neurons it has linear ones, where no calibration has tried it.
LINEAR_UP_TO = 0.65
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
        linear: how each layer's activations follow its input, and what is left of them; None where that is not known.
    """

    prior: tuple[Sums, ...]
    gains: np.ndarray | None
    core: Optional["Chooser"] = struct.field(pytree_node=False)
    linear: "Explained | None" = None

    def specs(self) -> "Calibration":
        """Neurons are spread over devices."""
        return replace(jax.tree.map(lambda _: WHOLE, self), prior=_by_neurons(self.prior), linear=specs(self.linear))


def _by_neurons(prior: tuple[Sums, ...]) -> tuple[Sums, ...]:
    spread: tuple[Sums, ...] = jax.tree.map(lambda array: along(0, 1) if array.ndim else WHOLE, prior)
    return spread


@struct.dataclass
class Explained:
    """Linear neurons of a whole model.

    Attributes:
        fits: of each layer.
        prior: as that of a `Calibration`, of the activations without what the fits expect.
        up_to: the largest share of its neurons at which a layer has linear ones: with more, those that they take the
            place of are worth more.
    """

    fits: tuple[LinearFit, ...]
    prior: tuple[Sums, ...]
    up_to: float = struct.field(pytree_node=False, default=LINEAR_UP_TO)

    def specs(self) -> "Explained":
        """Neurons are spread over devices."""
        return replace(self, fits=specs(self.fits), prior=_by_neurons(self.prior))

    @property
    def size(self) -> int:
        """Linear neurons of each layer, r."""
        return self.fits[0].size


def calibration_of(params: Params) -> Calibration | None:
    """What is known of a model's neurons; None where nothing is."""
    known: Calibration | Array | None = params.calibration
    assert known is None or isinstance(known, Calibration), "nothing else is kept there"
    return known


def explained_by(params: Params) -> Explained | None:
    """What is known of a model's linear neurons; None where nothing is."""
    known = calibration_of(params)
    return None if known is None else known.linear


def gains_of(params: Params) -> np.ndarray | None:
    """[L, PARTS], what each further part of a layer's neurons is worth; None where that is not known."""
    known = calibration_of(params)
    return None if known is None else known.gains
