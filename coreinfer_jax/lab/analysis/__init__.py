"""The paper's evidence about core neurons, measured on any model and texts (`coreinfer analyze`)."""

from coreinfer_jax.lab.analysis.inputs import Pairs, read_pairs
from coreinfer_jax.lab.analysis.parts import analyze

__all__ = ["Pairs", "analyze", "read_pairs"]
