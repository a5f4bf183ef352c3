"""What an evaluation compares: ways to choose the neurons that read a text's continuation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_fraction, check_name
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import ALLOCATIONS, Allocation, Narrowing, allocate
from coreinfer_jax.sparsity.calibration import Calibration, calibration_of, gains_of
from coreinfer_jax.sparsity.rules import RULES, Contribution, Rule, Sums, Votes
from coreinfer_jax.sparsity.stability import CoreConfig

# (activations, what the activation function gave, float32 [B, T, F] each, ||w|| [F]) to [B, T, F].
Magnitude: TypeAlias = Callable[[Array, Array, Array], Array]
# By a magnitude of the activation (as TEAL does, arXiv 2408.14690), of what the neuron writes (WINA, 2505.19427), or of
# the gate (CATS, 2404.08763, which thereby need not read all of `up`).
PER_TOKEN: dict[str, Magnitude] = {
    "token-magnitude": lambda activations, gated, norms: jnp.abs(activations),
    "token-norm": lambda activations, gated, norms: jnp.abs(activations) * norms[None, None, :],
    "token-gate": lambda activations, gated, norms: jnp.abs(gated),
}


@dataclass(frozen=True, kw_only=True)
class PerToken(Narrowing):
    """Each token its own neurons, those of the largest magnitude: what no set that is chosen beforehand can do.

    Attributes:
        rule: whose magnitude, one of `PER_TOKEN`.
        beta: share of F that is kept, in (0, 1].
        allocation: how `beta` is shared out over the layers, as in `CoreConfig`.
        layers: which layers are narrowed, as fractions of depth.

    Raises:
        CoreInferError: a value outside its range.
    """

    rule: str
    beta: float
    allocation: Allocation = "equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("rule", self.rule, tuple(PER_TOKEN))
        check_fraction("beta", self.beta)
        check_name("allocation", self.allocation, ALLOCATIONS)


@dataclass(frozen=True)
class Foreknown:
    """A ceiling: the neurons that `core` chooses when it sees the continuation itself in place of the context."""

    core: CoreConfig


Setting: TypeAlias = CoreConfig | PerToken | Foreknown
# Sums over a corpus: by rule, as it is without a prior, those of every layer, [] and [F].
Prior: TypeAlias = Mapping[Rule, tuple[Sums, ...]]


def without_prior(rule: Rule) -> Rule:
    """The rule that ranks by a text alone."""
    return replace(rule, prior_tokens=0.0)


def prior_of(calibration: Calibration | None) -> Prior:
    """What a calibration knows, as a prior."""
    return {} if calibration is None else {without_prior(Contribution()): calibration.prior}


def known_with(params: Params, prior: Prior) -> Params:
    """`params` with what is known of them beside `prior`: without linear neurons that were fitted to other texts."""
    known = calibration_of(params)
    if known is None or prior.get(without_prior(Contribution())) is known.prior:
        return params
    return replace(params, calibration=replace(known, linear=None))


def _named(rule: Rule) -> str:
    return f"{rule.name}-mean-budget" if getattr(rule, "budget", None) == "mean" else rule.name


# By the name that the command line and results give it, every rule as it is by default, without a prior.
RANKINGS: dict[str, Rule] = {
    _named(rule): rule
    for kind in RULES.values()
    for rule in (kind(prior_tokens=0.0), *([Votes(budget="mean")] if kind is Votes else []))
}


def chosen_by(setting: Setting) -> CoreConfig | PerToken:
    """What shares the kept neurons out, and ranks them.

    Raises:
        CoreInferError: no setting of an evaluation.
    """
    own = setting.core if isinstance(setting, Foreknown) else setting
    if not isinstance(own, CoreConfig) and not isinstance(setting, PerToken):
        raise CoreInferError(f"setting {shown(setting)}: give a CoreConfig, a PerToken or a Foreknown")
    return own


def check_rows_apart(core: object) -> None:
    """Refuse one core set for all rows of a batch, whose rows are texts of their own here."""
    if not getattr(core, "per_row", True):
        raise CoreInferError("per_row=False: a score would depend on the rest of its batch; take per_row=True")


def kept_by(setting: Setting, params: Params) -> np.ndarray:
    """Neurons kept per layer of a model, by its calibration: int32 [L], F where a layer stays dense."""
    own = chosen_by(setting)
    widths = own.widths(params) if isinstance(own, CoreConfig) else allocate(own, params.config, gains_of(params))
    return np.array(widths, np.int32)


def alpha_of(setting: Setting) -> float:
    """The share of its positive neurons that a token votes for; of rules without votes the usual one."""
    return float(getattr(chosen_by(setting).rule, "alpha", Votes().alpha))


def described(setting: Setting) -> dict[str, Any]:
    """A setting as results have it, flat; `alpha_of` apart."""
    own = chosen_by(setting)
    rule, compensation, prior_tokens = (
        (own.rule, 0.0, 0.0)
        if isinstance(own, PerToken)
        else (_named(own.ranking), own.compensation, own.ranking.prior_tokens)
    )
    return {
        "rule": rule,
        "keep": own.beta,
        "compensation": compensation,
        "prior_tokens": prior_tokens,
        "known": "continuation" if isinstance(setting, Foreknown) else "context",
        "layers": own.layers,
        "allocation": own.allocation,
        "linear": not isinstance(own, CoreConfig) or own.linear,
    }
