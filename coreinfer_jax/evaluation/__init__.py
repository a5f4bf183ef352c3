"""What core neurons cost in quality, measured against the full model on texts of one's own."""

from coreinfer_jax.evaluation.calibrate import Bound, Calibrated, calibrate
from coreinfer_jax.evaluation.measure import Setting
from coreinfer_jax.evaluation.run import Texts, evaluate, read_prior

__all__ = ["Bound", "Calibrated", "Setting", "Texts", "calibrate", "evaluate", "read_prior"]
