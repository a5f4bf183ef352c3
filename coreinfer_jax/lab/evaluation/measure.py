"""What settings cost on texts: differences from the full model, per text and position of its continuation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_finite
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
from coreinfer_jax.lab.evaluation.settings import (
    PER_TOKEN,
    RANKINGS,
    Foreknown,
    PerToken,
    Prior,
    Setting,
    chosen_by,
    kept_by,
    known_with,
    without_prior,
)
from coreinfer_jax.lab.reading import batches, planned
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Linear, Params
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.calibration import explained_by
from coreinfer_jax.sparsity.ranking import scored
from coreinfer_jax.sparsity.rules import Contribution, Observer, Rule, Sums, mean_activations, places
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text.corpus import Beginnings

# A batch's logits, float32 [B, T, V] of continuations, and a layer's activations are its largest arrays.
BATCH_LOGITS, BATCH_TOKENS = 1 << 24, 4096

# What a setting sums up of a text: a rule's sums, over all tokens or without a leading BOS, of activations or of what
# linear neurons leave of them.
Observed: TypeAlias = tuple[Rule, bool, bool]
# Per layer, each neuron's place in the order of a rule, and what stands for it where it is dropped, [B, F] each.
Ranked: TypeAlias = tuple[list[Array], list[Array]]


@dataclass(frozen=True)
class Measured:
    """Of one setting, float32 [n, T]: see `Differences`."""

    kl: np.ndarray
    agreement: np.ndarray
    loss: np.ndarray


def measure(
    params: Params,
    rows: np.ndarray,
    context: int | np.ndarray,
    settings: Sequence[Setting],
    *,
    prior: Prior | None = None,
    name: str = "evaluating",
) -> tuple[np.ndarray, list[Measured]]:
    """Losses of the full model on continuations, float32 [n, T], and what each setting changes.

    Args:
        params: dense weights; by their calibration settings may be allocated.
        rows: texts int32 [n, W], of each its context and T + 1 more tokens; the last one is only foretold. The first
            token after the context comes from the full model in any case and is not scored. W is that of the longest
            context; behind shorter ones may stand anything.
        context: tokens that the full model reads, of all texts or int32 [n] of each.
        settings: to compare.
        prior: sums over a corpus, for rules with `prior_tokens`. With others than the calibration's own, its linear
            neurons are left out: what they leave is known of its own texts only.
        name: of the progress bar.

    Raises:
        CoreInferError: rules with `prior_tokens` that `prior` has no sums for; logits that are NaN or infinite.
    """
    cores = [own for setting in settings if isinstance(own := chosen_by(setting), CoreConfig)]
    prior = {} if prior is None else prior
    params = known_with(params, prior)
    _check_prior((core.ranking for core in cores), prior)
    kept = [kept_by(setting, params) for setting in settings]
    observed = {key: core for core in cores for key in _observed(core, params)}
    contexts = np.broadcast_to(np.asarray(context, np.int32), len(rows))
    T = rows.shape[1] - 1 - int(contexts.max())
    full: list[np.ndarray] = []
    parts: list[list[Measured]] = []
    plan = planned(len(rows), _rows_per_batch(rows, T, params.config))
    with progress([], total=len(plan) * len(settings), desc=name, unit="setting") as bar:
        for chosen, real in plan:
            reading = _read(params, rows[chosen, :-1], contexts[chosen], T, observed)
            check_finite(reading.finite)
            rest, following = _continuation(rows[chosen], contexts[chosen], T)
            ranked = _ranker(params, reading, list(observed), prior)
            full.append(np.asarray(losses(reading.logits, following))[:real])
            parts.append([])
            for setting, neurons in zip(settings, kept, strict=True):
                found = _difference(params, reading, rest, following, setting, neurons, ranked)
                parts[-1].append(Measured(*(np.asarray(x)[:real] for x in (found.kl, found.agreement, found.loss))))
                bar.update()
    joined = [
        Measured(*(np.concatenate([getattr(one, field) for one in own]) for field in ("kl", "agreement", "loss")))
        for own in zip(*parts, strict=True)
    ]
    return np.concatenate(full), joined


def _continuation(rows: np.ndarray, contexts: np.ndarray, T: int) -> tuple[Array, Array]:
    """The tokens that follow the contexts [B] of `rows` [B, W], and the token after each: int32 [B, T] both."""
    found = np.take_along_axis(rows, contexts[:, None] + np.arange(T + 1)[None, :], axis=1)
    return jnp.asarray(found[:, :-1]), jnp.asarray(found[:, 1:])


def _check_prior(rules: Iterable[Rule], prior: Prior) -> None:
    missing = sorted({rule.name for rule in rules if rule.prior_tokens and without_prior(rule) not in prior})
    if missing:
        raise CoreInferError(f"prior tokens are of a prior: give one of {', '.join(missing)}, from read_prior, or none")


def collect(params: Params, texts: Beginnings, rules: Iterable[Rule] = tuple(RANKINGS.values())) -> Prior:
    """A prior: the sums of rules over all tokens of texts.

    Raises:
        CoreInferError: activations that are NaN or infinite.
    """
    total: list[list[Sums]] | None = None
    params, rules = params.weights, list(dict.fromkeys(map(without_prior, rules)))
    for tokens, counted in by_width(texts, params.config):
        observers = [rule.observer(counted, params.config.mlp_size) for rule in rules]
        sums, finite = read_corpus(params, jnp.asarray(tokens), observers)
        check_finite(finite, "activations")
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "there are texts"
    return dict(zip(rules, zip(*total, strict=True), strict=True))


def _rows_per_batch(rows: np.ndarray, scored: int, config: ModelConfig) -> int:
    """How many texts a batch may have for their activations and the logits of `scored` tokens each."""
    return min(BATCH_LOGITS // (scored * config.vocab_size), BATCH_TOKENS // rows.shape[1])


def by_width(texts: Beginnings, config: ModelConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts in batches of about their own lengths, [B, T], and which of their tokens count."""
    widths = np.array([min(bucket(int(length)), texts.rows.shape[1]) for length in texts.lengths])
    for width in sorted(set(widths.tolist())):
        rows, lengths = texts.rows[widths == width, :width], texts.lengths[widths == width]
        name = f"reading the corpus, texts of up to {width} tokens"
        for chosen, real in batches(len(rows), _rows_per_batch(rows, 1, config), name):
            # Rows that fill a batch up do not count.
            ends = np.where(np.arange(len(chosen)) < real, lengths[chosen], 0)
            yield rows[chosen], np.arange(width)[None, :] < ends[:, None]


def _observed(core: CoreConfig, params: Params) -> list[Observed]:
    """What a setting observes of all layers: activations, and where it has linear neurons what these leave of them."""
    kinds = (False, True) if any(core.linear_layers(params)) else (False,)
    return [(without_prior(core.ranking), core.count_bos, linear) for linear in kinds]


def _read(
    params: Params, tokens: np.ndarray, contexts: np.ndarray, T: int, observed: Mapping[Observed, CoreConfig]
) -> Reading:
    """The full model over `tokens` [B, W], with what is `observed` of the contexts and of what follows."""
    config = params.config
    places = np.arange(tokens.shape[1])[None, :]
    observers = []
    for (_, _, linear), core in observed.items():
        context = core.counted(tokens, contexts, 0, config)
        rest = core.counted(tokens, contexts + T, 0, config) & (places >= contexts[:, None])
        own = partial(_observer, params, core.ranking, linear)
        observers.append((own(context), own(rest)))
    return read(params.weights, jnp.asarray(tokens), jnp.asarray(contexts), observers, scored=T)


def _observer(params: Params, rule: Rule, linear: bool, counted: np.ndarray) -> Observer:
    """Of all layers, that of a rule, or of what linear neurons leave."""
    known, F = explained_by(params), params.config.mlp_size
    if not linear or known is None or not isinstance(rule, Contribution):
        return rule.observer(counted, F)
    return rule.observer(counted, F, known.fits)


def _ranker(
    params: Params, reading: Reading, observed: Sequence[Observed], prior: Prior
) -> Callable[[Setting], Ranked]:
    """What ranks neurons for a setting; once for all keep ratios."""
    downs = [layer.mlp.down for layer in params.layers]
    known: dict[tuple[object, ...], Ranked] = {}
    explained = explained_by(params)

    def of_all(core: CoreConfig, foreknown: bool, linear: bool) -> Ranked:
        rule = core.ranking
        shards = core.shards_of(params)
        key = rule, core.compensation, core.count_bos, foreknown, linear, shards
        if key not in known:
            place = observed.index((without_prior(rule), core.count_bos, linear))
            own = [layer[place][foreknown] for layer in reading.sums]
            plain = prior[without_prior(rule)] if rule.prior_tokens else None
            corpus = explained.prior if linear and explained is not None else plain
            shares = np.float32(rule.prior_tokens), np.float32(0 if linear else core.compensation)
            texts = None if corpus is None else list(corpus)
            known[key] = ranked_neurons(own, texts, downs, *shares, rule=type(rule), shards=shards)
        return known[key]

    def ranked(setting: Setting) -> Ranked:
        core = chosen_by(setting)
        assert isinstance(core, CoreConfig), "tokens rank for themselves"
        layers = core.linear_layers(params)
        found = {linear: of_all(core, isinstance(setting, Foreknown), linear) for linear in dict.fromkeys(layers)}
        orders, filled = zip(*((found[own][0][l], found[own][1][l]) for l, own in enumerate(layers)), strict=True)
        return list(orders), list(filled)

    return ranked


@partial(jax.jit, static_argnames=("rule", "shards"))
def ranked_neurons(
    sums: list[Sums],
    prior: list[Sums] | None,
    downs: list[Linear],
    prior_tokens: Array,
    compensation: Array,
    *,
    rule: type[Rule],
    shards: int = 1,
) -> Ranked:
    """Each neuron's place, and what stands for it where it is dropped; arguments as of `ranking.rank`."""
    sums, scores = scored(sums, prior, downs, prior_tokens, compensation, rule)
    return [places(own, shards) for own in scores], [compensation * mean_activations(own) for own in sums]


@jax.jit
def _first(ranked: list[Array], kept: Array) -> list[Array]:
    """Masks of each layer's first `kept` [L] places."""
    return [place < most for place, most in zip(ranked, kept, strict=True)]


def _difference(
    params: Params,
    reading: Reading,
    rest: Array,
    following: Array,
    setting: Setting,
    kept: np.ndarray,
    ranked: Callable[[Setting], Ranked],
) -> Differences:
    weights = params.weights
    if isinstance(setting, PerToken):
        return with_best_of_each_token(weights, reading, rest, following, kept, magnitude=PER_TOKEN[setting.rule])
    order, filled = ranked(setting)
    core, known = chosen_by(setting), explained_by(params)
    linear = core.linear_layers(params) if isinstance(core, CoreConfig) else ()
    beside = None if known is None else (known.fits, jnp.asarray(linear))
    return with_fixed_sets(weights, reading, rest, following, _first(order, kept), filled, beside)
