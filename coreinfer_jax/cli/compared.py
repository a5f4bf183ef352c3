"""The settings that `coreinfer eval` compares, on texts or on tasks."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from coreinfer_jax.checks import check_fraction
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.settings import PER_TOKEN, RANKINGS, PerToken
from coreinfer_jax.sparsity.calibration import PRIOR_RULE
from coreinfer_jax.sparsity.rules import Votes
from coreinfer_jax.sparsity.stability import CoreConfig


def rules(options: argparse.Namespace, preset: CoreConfig) -> list[str]:
    """The names of the rules asked for, or of the preset's."""
    return options.rule or [preset.ranking.name]


def settings(
    options: argparse.Namespace, preset: CoreConfig, has_prior: Callable[[str], bool]
) -> Iterator[list[CoreConfig | PerToken]]:
    """Per alpha every rule at every keep ratio; of what is not named, the preset's own rule takes the preset's.

    Args:
        options: of the command.
        preset: what is not named.
        has_prior: whether there is a prior for the rule of a name.
    """
    for alpha in options.alpha or [getattr(preset.ranking, "alpha", Votes().alpha)]:
        check_fraction("alpha", alpha)  # also where no rule takes it
        yield list(_of_alpha(options, preset, alpha, has_prior))


def _of_alpha(
    options: argparse.Namespace, preset: CoreConfig, alpha: float, has_prior: Callable[[str], bool]
) -> Iterator[CoreConfig | PerToken]:
    known = preset.ranking if preset.ranking.name == PRIOR_RULE else CoreConfig().ranking
    asked = known.prior_tokens if options.prior_tokens is None else options.prior_tokens
    ranges = [preset.layers] if options.layers is None else [(first, last) for first, last in options.layers]
    for layers, name in product(ranges, rules(options, preset)):
        own, keeps = name == preset.ranking.name, options.beta or [preset.beta]
        allocations = options.allocation or [preset.allocation if own else "equal"]
        if name in PER_TOKEN:
            for allocation, keep in product(allocations, keeps):
                yield PerToken(rule=name, beta=keep, allocation=allocation, layers=layers)
            continue
        rule = replace(preset.ranking if own else RANKINGS[name], prior_tokens=asked if has_prior(name) else 0.0)
        rule = replace(rule, alpha=alpha) if isinstance(rule, Votes) else rule
        compensations = options.compensation or [preset.compensation if own else 0.0]
        linear = [preset.linear] if options.linear is None else [asked == "yes" for asked in options.linear]
        for compensation, beside, allocation, keep in product(compensations, linear, allocations, keeps):
            shares = {"beta": keep, "allocation": allocation, "layers": layers}
            yield replace(preset, rule=rule, compensation=compensation, linear=beside, **shares)


def refuse_unused(
    options: argparse.Namespace, preset: CoreConfig, has_prior: Callable[[str], bool], remedy: str
) -> None:
    """Refuse `--alpha` and `--prior-tokens` where no rule takes them."""
    named = rules(options, preset)
    if options.alpha and not any("votes" in rule for rule in named):
        raise CoreInferError(f"--alpha {options.alpha[0]:g}: is of votes; add --rule votes, or leave it out")
    if options.prior_tokens is not None and not any(has_prior(rule) for rule in named if rule not in PER_TOKEN):
        raise CoreInferError(f"--prior-tokens {options.prior_tokens:g}: no rule here has a prior to weigh; {remedy}")
