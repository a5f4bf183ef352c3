"""What settings cost on texts: differences from the full model, per text and position of its continuation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from coreinfer_jax.engine.prompts import check_finite
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.passes import (
    Differences,
    Reading,
    losses,
    read,
    read_corpus,
    with_best_of_each_token,
    with_fixed_sets,
)
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.config import Allocation, CoreConfig, ModelConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import allocate
from coreinfer_jax.sparsity.rules import RULES, Sums, column_norms, mean_activations, places, with_prior
from coreinfer_jax.sparsity.votes import Voting, make_voting
from coreinfer_jax.text.corpus import Beginnings

# A batch's logits, float32 [B, T, V] of continuations, and a layer's activations are its largest arrays.
BATCH_LOGITS, BATCH_TOKENS = 1 << 24, 4096
# Rules that give every token neurons of its own, by a magnitude: of the activation (as TEAL does, arXiv 2408.14690), of
# what the neuron writes (WINA, 2505.19427), of the gate (CATS, 2404.08763, which thereby need not read all of `up`).
PER_TOKEN: dict[str, Callable[[Array, Array, Array], Array]] = {
    "token-magnitude": lambda activations, gated, norms: jnp.abs(activations),
    "token-norm": lambda activations, gated, norms: jnp.abs(activations) * norms[None, None, :],
    "token-gate": lambda activations, gated, norms: jnp.abs(gated),
}


@dataclass(frozen=True)
class Setting:
    """A choice of neurons.

    Attributes:
        rule: one of `RULES` or `PER_TOKEN`.
        keep: share of F that is kept, in (0, 1].
        compensation: at which share of their mean activation, over the tokens the rule saw, dropped neurons stand.
        prior_tokens: how many tokens of its own a corpus adds to the context's sums.
        known: what the rule sees: the context, or, as a ceiling, the continuation itself.
        layers: which layers are narrowed, as fractions of depth.
        allocation: how `keep` is shared out over them.

    Rules of `PER_TOKEN` take `keep`, `layers` and `allocation` only.
    """

    rule: str
    keep: float
    compensation: float = 0.0
    prior_tokens: float = 0.0
    known: Literal["context", "continuation"] = "context"
    layers: tuple[float, float] = (0.0, 1.0)
    allocation: Allocation = "equal"

    def kept(self, params: Params) -> np.ndarray:
        """Neurons kept per layer of a model, by its calibration: int32 [L], F where a layer stays dense."""
        core = CoreConfig(beta=self.keep, layers=self.layers, allocation=self.allocation)
        gains = None if params.calibration is None else params.calibration.gains
        return np.array(allocate(core, params.config, gains), np.int32)


@dataclass(frozen=True)
class Measured:
    """Of one setting, float32 [n, T]: see `Differences`."""

    kl: np.ndarray
    agreement: np.ndarray
    loss: np.ndarray


def measure(
    params: Params,
    rows: np.ndarray,
    context: int,
    settings: Sequence[Setting],
    *,
    alpha: float = 0.4,
    prior: list[dict[str, Sums]] | None = None,
    name: str = "evaluating",
) -> tuple[np.ndarray, list[Measured]]:
    """Losses of the full model on continuations, float32 [n, T], and what each setting changes.

    Args:
        params: dense weights; by their calibration settings may be allocated.
        rows: texts int32 [n, context + T + 1]; the last token is only foretold. The first token after the context comes
            from the full model in any case and is not scored.
        context: tokens that the full model reads.
        settings: to compare.
        alpha: share of a token's positive neurons that it votes for.
        prior: per layer and rule, sums [F] over a corpus, for settings with `prior_tokens`.
        name: of the progress bar.

    Raises:
        CoreInferError: settings with `prior_tokens` and no `prior`, or none of their rule; logits that are NaN or
            infinite.
    """
    with_one = {setting.rule for setting in settings if setting.prior_tokens}
    if with_one and prior is None:
        raise CoreInferError("prior tokens are of a prior: give one, from read_prior")
    if unknown := with_one - set(prior[0] if prior else ()):
        raise CoreInferError(f"the prior has no sums for {', '.join(sorted(unknown))}: give those no prior tokens")
    kept = [setting.kept(params) for setting in settings]
    params = params.weights
    norms = column_norms(params)
    rules = tuple(sorted({setting.rule for setting in settings if setting.rule in RULES}))
    full, parts = [], []
    for chosen, real in _batches(rows, rows.shape[1] - 1 - context, params.config, name):
        tokens = rows[chosen]
        reading = _read(params, tokens, norms, context, alpha, rules)
        check_finite(reading.finite)
        rest, following = jnp.asarray(tokens[:, context:-1]), jnp.asarray(tokens[:, context + 1 :])
        choose = _chooser(reading, norms, prior)
        differences = [
            _difference(params, reading, rest, following, norms, setting, own, choose)
            for setting, own in zip(settings, kept, strict=True)
        ]
        full.append(np.asarray(losses(reading.logits, following))[:real])
        parts.append([Measured(*(np.asarray(x)[:real] for x in (d.kl, d.agreement, d.loss))) for d in differences])
    joined = [
        Measured(*(np.concatenate([getattr(one, field) for one in own]) for field in ("kl", "agreement", "loss")))
        for own in zip(*parts, strict=True)
    ]
    return np.concatenate(full), joined


def collect(
    params: Params, texts: Beginnings, alpha: float = 0.4, rules: Sequence[str] = tuple(RULES)
) -> list[dict[str, Sums]]:
    """A prior: per layer and rule, the sums [] and [F] over all tokens of texts.

    Raises:
        CoreInferError: activations that are NaN or infinite.
    """
    total: list[dict[str, Sums]] | None = None
    params = params.weights
    norms = column_norms(params)
    for tokens, counted in _by_width(texts, params.config):
        votings = _votings(counted, params.config.mlp_size, alpha, tuple(rules))
        sums, finite = read_corpus(params, jnp.asarray(tokens), norms, votings, rules=tuple(rules))
        check_finite(finite, "activations")
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "there are texts"
    return total


def _batches(rows: np.ndarray, scored: int, config: ModelConfig, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Which of the texts are in each batch, the last filled up with its first row, and how many rows are real.

    They are as large as their activations and the logits of `scored` tokens each allow.
    """
    B = max(1, min(len(rows), BATCH_LOGITS // (scored * config.vocab_size), BATCH_TOKENS // rows.shape[1]))
    for first in tqdm(range(0, len(rows), B), desc=name, unit="batch", disable=None, leave=False):
        batch = np.arange(first, min(first + B, len(rows)))
        yield np.concatenate([batch, np.full(B - len(batch), first)]), len(batch)


def _by_width(texts: Beginnings, config: ModelConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts in batches of about their own lengths, [B, T], and which of their tokens count."""
    widths = np.array([min(bucket(int(length)), texts.rows.shape[1]) for length in texts.lengths])
    for width in sorted(set(widths.tolist())):
        rows, lengths = texts.rows[widths == width, :width], texts.lengths[widths == width]
        for chosen, real in _batches(rows, 1, config, f"reading the corpus, texts of up to {width} tokens"):
            # Rows that fill a batch up do not count.
            ends = np.where(np.arange(len(chosen)) < real, lengths[chosen], 0)
            yield rows[chosen], np.arange(width)[None, :] < ends[:, None]


def _votings(counted: np.ndarray, mlp_size: int, alpha: float, rules: tuple[str, ...]) -> dict[str, Voting]:
    """By budget, the votes of tokens `counted` bool [B, T]."""
    return {budget: make_voting(counted, mlp_size, alpha, budget) for budget in {RULES[rule].budget for rule in rules}}


def _read(
    params: Params, tokens: np.ndarray, norms: list[Array], context: int, alpha: float, rules: tuple[str, ...]
) -> Reading:
    counted = np.ones((tokens.shape[0], tokens.shape[1] - 1), bool)
    parts = counted[:, :context], counted[:, context:]
    first, second = (_votings(part, params.config.mlp_size, alpha, rules) for part in parts)
    votings = {budget: (own, second[budget]) for budget, own in first.items()}
    return read(params, jnp.asarray(tokens[:, :-1]), norms, votings, context=context, rules=rules)


Chosen = tuple[list[Array], list[Array]]


def _chooser(reading: Reading, norms: list[Array], prior: list[dict[str, Sums]] | None) -> Callable[[Setting], Chosen]:
    """Places, and what stands for dropped neurons, [B, F] per layer; computed once for all keep ratios."""
    known: dict[tuple[object, ...], Chosen] = {}

    def choose(setting: Setting) -> Chosen:
        key = (setting.rule, setting.compensation, setting.prior_tokens, setting.known)
        if key not in known:
            seen = reading.context if setting.known == "context" else reading.continuation
            own = [layer[setting.rule] for layer in seen]
            corpus = [layer[setting.rule] for layer in prior] if prior and setting.prior_tokens else None
            settings = np.float32(setting.prior_tokens), np.float32(setting.compensation)
            known[key] = _ranked(own, corpus, *settings, norms, rule=setting.rule)
        return known[key]

    return choose


@partial(jax.jit, static_argnames="rule")
def _ranked(
    sums: list[Sums],
    prior: list[Sums] | None,
    prior_tokens: Array,
    compensation: Array,
    norms: list[Array],
    *,
    rule: str,
) -> Chosen:
    if prior is not None:
        sums = [with_prior(own, corpus, prior_tokens) for own, corpus in zip(sums, prior, strict=True)]
    ranked = [places(RULES[rule].score(own, norm, compensation)) for own, norm in zip(sums, norms, strict=True)]
    return ranked, [compensation * mean_activations(own) for own in sums]


@jax.jit
def _first(ranked: list[Array], kept: Array) -> list[Array]:
    """Masks of each layer's first `kept` [L] places."""
    return [place < most for place, most in zip(ranked, kept, strict=True)]


def _difference(
    params: Params,
    reading: Reading,
    rest: Array,
    following: Array,
    norms: list[Array],
    setting: Setting,
    kept: np.ndarray,
    choose: Callable[[Setting], Chosen],
) -> Differences:
    if setting.rule in PER_TOKEN:
        own = PER_TOKEN[setting.rule]
        return with_best_of_each_token(params, reading, rest, following, norms, kept, magnitude=own)
    ranked, filled = choose(setting)
    return with_fixed_sets(params, reading, rest, following, _first(ranked, kept), filled)
