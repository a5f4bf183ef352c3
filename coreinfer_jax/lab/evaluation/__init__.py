"""What core neurons cost in quality, measured against the full model on texts of one's own."""

from coreinfer_jax.lab.evaluation.calibrating import Bound, Calibrated, calibrate
from coreinfer_jax.lab.evaluation.comparison import Texts, evaluate, read_prior
from coreinfer_jax.lab.evaluation.settings import Foreknown, PerToken

__all__ = ["Bound", "Calibrated", "Foreknown", "PerToken", "Texts", "calibrate", "evaluate", "read_prior"]
