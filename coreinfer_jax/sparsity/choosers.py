"""All ways of choosing core neurons, by the names that users, files and results have for them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

from coreinfer_jax.checks import check_name
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import PRIOR_RULE, calibration_of
from coreinfer_jax.sparsity.choice import ASKED, AllNeurons, Chooser, Choosing, GivenNeurons
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.rules import Rule, Votes, rule_named
from coreinfer_jax.sparsity.similarity import Auto, Fused, Similarity
from coreinfer_jax.sparsity.stability import CoreConfig

# What `generate` takes; "recommended" is what a model's calibration found; all neurons where there is none.
Core = Chooser | CoreNeurons | None
Recommended = Literal["recommended"]

# Why a model that could be narrowed is not.
UNMEASURED = "not calibrated: 'coreinfer calibrate' finds how many neurons it can spare"
CALIBRATED = "as calibrated"

CHOOSERS: dict[str, type[Chooser]] = {kind.method: kind for kind in (CoreConfig, Similarity, Fused, Auto)}


def chooser_for(params: Params, core: Core | Recommended) -> Choosing:
    """The way of choosing that a caller's `core` means for `params`.

    Raises:
        CoreInferError: as `resolved`.
    """
    known = resolved(params, core)
    if known is None:
        return AllNeurons(ASKED if core is None else UNMEASURED if params.calibration is None else CALIBRATED)
    return GivenNeurons(known) if isinstance(known, CoreNeurons) else known


def resolved(params: Params, core: Core | Recommended) -> Core:
    """`core`, or what is recommended for `params`: of a model that nobody has measured, no neuron is left out.

    Raises:
        CoreInferError: something else.
    """
    if isinstance(core, str) and core == "recommended":
        known = calibration_of(params)
        return None if known is None else known.core
    if core is not None and not isinstance(core, Chooser | CoreNeurons):
        raise CoreInferError(
            f"core={shown(core)}: give a CoreConfig (or Similarity, Fused, Auto), CoreNeurons, None for all neurons, "
            "or 'recommended'"
        )
    return core


def settings_of(chooser: Chooser) -> dict[str, Any]:
    """The settings of a way of choosing as files and results hold them: flat, those of its rule among its own."""
    flat: dict[str, Any] = {"method": chooser.method}
    for one in fields(chooser):
        value = getattr(chooser, one.name)
        flat |= {"rule": value.name, **_fields(value)} if isinstance(value, Rule) else {one.name: value}
    return flat


def chooser_of(settings: Mapping[str, Any]) -> Chooser:
    """The way of choosing that flat settings say; names that it has no use for are passed over.

    Args:
        settings: as `settings_of` gives them. What is not there, or None, is as it is by default: the method
            stability, the rule contribution, and gamma, a group's keep ratio, what beta is.

    Raises:
        CoreInferError: an unknown method or rule, a value outside its range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    method = given.get("method", CoreConfig.method)
    check_name("method", method, tuple(CHOOSERS))
    kind = CHOOSERS[method]
    if kind is CoreConfig:
        given["rule"] = _filled(type(rule_named(given.get("rule", PRIOR_RULE))), given)
    else:
        given["votes"] = _filled(Votes, {**given, "prior_tokens": 0})
    if kind is Similarity:
        given = {"gamma": given.get("beta", Similarity.gamma)} | given
    if "layers" in given:
        given["layers"] = tuple(given["layers"])
    return _filled(kind, given)


Filled = TypeVar("Filled", bound=Rule | Chooser)


def _filled(kind: type[Filled], given: Mapping[str, Any]) -> Filled:
    return kind(**{one.name: given[one.name] for one in fields(kind) if one.name in given})


def _fields(value: Rule) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}
