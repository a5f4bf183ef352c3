"""`evaluate`: settings compared on documents, with intervals over documents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.measure import Measured, collect, measure
from coreinfer_jax.lab.evaluation.settings import (
    RANKINGS,
    Prior,
    Setting,
    alpha_of,
    check_rows_apart,
    chosen_by,
    described,
    kept_by,
    known_with,
)
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params, check_dense, weight_bytes_per_step
from coreinfer_jax.sparsity.calibration import explained_by
from coreinfer_jax.sparsity.narrow import narrowed_bytes
from coreinfer_jax.sparsity.rules import Rule
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import LEAST_TEXTS, Beginnings, Corpus, Selection
from coreinfer_jax.text.documents import Documents

PROMPT_TOKENS, CONTINUATION, TEXTS = (64,), 64, 64
RESAMPLES = 1000
# A prior: how much of each text, as neurons of models with learned positions differ by position, and in all.
PRIOR_LENGTH, PRIOR_TOKENS = 1024, 1 << 16
# Figures against decode position are means over as many tokens.
POSITIONS_PER_BIN = 16


@dataclass(frozen=True)
class Texts:
    """What is read, and how much.

    Attributes:
        prompt_tokens: lengths of context to evaluate.
        continuation: tokens scored after the first new one.
        texts: documents, at most.
        switched: whether each context goes on with the continuation of the next document.
        seed: of the order of documents, and of the intervals.
    """

    prompt_tokens: tuple[int, ...] = PROMPT_TOKENS
    continuation: int = CONTINUATION
    texts: int = TEXTS
    switched: bool = False
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that a document must have: the last one is only foretold."""
        return max(self.prompt_tokens) + self.continuation + 1


@dataclass(frozen=True)
class Excerpts:
    """Texts to compare settings on.

    Attributes:
        rows: int32 [n, W], as `measure` takes them.
        context: tokens before the continuation, of all or int32 [n] of each.
        too_short: texts that were passed over because they have fewer tokens.
    """

    rows: np.ndarray
    context: int | np.ndarray
    too_short: int

    @property
    def length(self) -> int:
        """Tokens of a context, on average."""
        return round(float(np.mean(self.context)))


def evaluate(
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents,
    settings: Sequence[Setting],
    texts: Texts = Texts(),
    *,
    prior: Prior | None = None,
) -> list[dict[str, Any]]:
    """What each setting costs against the full model.

    The full model reads the context and gives the first new token; from the pass over that token on, the narrowed model
    reads the continuation, as in decoding, with the text's own tokens (teacher forcing). Every prompt length is
    evaluated on the same documents and on the same tokens after the context.

    Args:
        params: dense weights.
        tokenizer: of the model.
        documents: texts, those too short for the longest context and its continuation are passed over.
        settings: to compare, each a `CoreConfig`, a `PerToken` or a `Foreknown`.
        texts: which texts, and how much of them.
        prior: sums over a corpus, from `read_prior`, for rules with `prior_tokens`.

    Returns:
        Per prompt length and setting: what was set, `bytes_per_token` (of weights), `kl` (nats per token), `agreement`
        (share of tokens), `perplexity`, and that of the full model, each of these with `mean` and `ci95`, the
        percentile bootstrap interval over documents; and each of them by decode position.

    Raises:
        CoreInferError: texts that are too few or too short, sizes that do not fit, a setting outside its range, prior
            tokens without a prior, logits that are NaN or infinite.
    """
    check_dense(params)
    check_on_device(params, "evaluate")
    check_settings(params, settings, texts)
    selection = Corpus(documents, tokenizer, texts.seed).select(texts.tokens, texts.texts)
    return compare(params, selection, settings, texts, prior)


def compare(
    params: Params, selection: Selection, settings: Sequence[Setting], texts: Texts, prior: Prior | None
) -> list[dict[str, Any]]:
    """`evaluate` on chosen texts, of `Texts.tokens` each."""
    excerpts = excerpts_of(selection, texts)
    return [result for own in excerpts for result in compare_on(params, own, settings, texts.seed, prior)]


def excerpts_of(selection: Selection, texts: Texts) -> list[Excerpts]:
    """Chosen texts, of `Texts.tokens` each, with a context of each length before the same continuation."""
    longest = max(texts.prompt_tokens)
    rows = _switched(selection.rows, longest) if texts.switched else selection.rows
    return [Excerpts(rows[:, longest - length :], length, selection.too_short) for length in texts.prompt_tokens]


def compare_on(
    params: Params, excerpts: Excerpts, settings: Sequence[Setting], seed: int, prior: Prior | None
) -> list[dict[str, Any]]:
    """What each setting costs on `excerpts`, with intervals of this seed; see `evaluate`."""
    rows, length = excerpts.rows, excerpts.length
    params = known_with(params, {} if prior is None else prior)
    name = f"comparing settings, prompts of {length} tokens"
    full, measured = measure(params, rows, excerpts.context, settings, prior=prior, name=name)
    dense = {
        "dense_perplexity": perplexity(full, seed),
        "dense_perplexity_by_position": perplexity_by_position(full),
    }
    return [
        {
            "prompt_tokens": length,
            "alpha": alpha_of(setting),
            "texts": len(rows),
            "too_short": excerpts.too_short,
            **described(setting),
            "linear_layers": sum(_linear_layers(params, setting)),
            "bytes_per_token": bytes_per_token(params, setting),
            **summary(one, seed),
            **dense,
        }
        for setting, one in zip(settings, measured, strict=True)
    ]


def bytes_per_token(params: Params, setting: Setting) -> int:
    """Bytes of weights that a decode step on the setting's neurons reads for one row."""
    kept, F, known = kept_by(setting, params), params.config.mlp_size, explained_by(params)
    left_out = [narrowed_bytes(params, (l,), F - int(K), 1) for l, K in enumerate(kept)]
    layers = zip(_linear_layers(params, setting), params.layers, strict=True)
    fits = () if known is None else zip(known.fits, layers, strict=True)
    linear = [own.bytes_beside(layer.mlp.down.weight.dtype) for own, (there, layer) in fits if there]
    return weight_bytes_per_step(params, 1) - sum(left_out) + sum(linear)


def _linear_layers(params: Params, setting: Setting) -> tuple[bool, ...]:
    """In which layers a setting has linear neurons."""
    core = chosen_by(setting)
    return core.linear_layers(params) if isinstance(core, CoreConfig) else (False,) * params.config.num_layers


def read_prior(
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents,
    rules: Iterable[Rule] = tuple(RANKINGS.values()),
    *,
    seed: int = 0,
) -> Prior:
    """What a model's neurons do over a corpus, for the `prior` of `evaluate`: sums over the beginnings of its texts.

    Args:
        params: dense weights.
        tokenizer: of the model.
        documents: texts, other ones than those to evaluate; at most 1024 tokens of each (fewer where the model has
            fewer positions), until there are 65536.
        rules: whose sums are wanted; by default those of every rule as it is by default.
        seed: of the order of documents.

    Returns:
        By rule, `Sums` of [] and [F] per layer.

    Raises:
        CoreInferError: texts that are too few or too short, activations that are NaN or infinite.
    """
    return collect(params, prior_texts(Corpus(documents, tokenizer, seed), params.config), rules)


def prior_texts(corpus: Corpus, config: ModelConfig, half: int | None = None, least: int = 0) -> Beginnings:
    """What a prior is read from, of all documents or of one half of them, and more until there are `least` tokens."""
    return corpus.beginnings(min(PRIOR_LENGTH, config.max_positions), max(PRIOR_TOKENS, least), half)


def check_settings(params: Params, settings: Sequence[Setting], texts: Texts) -> None:
    """Refuse what can be refused without reading a text."""
    for setting in settings:
        own = chosen_by(setting)
        own.narrowed_layers(params.config.num_layers)  # refuses layers that select none
        check_rows_apart(own)
    sizes = (*texts.prompt_tokens, texts.continuation)
    if not texts.prompt_tokens or min(sizes) < 1:
        raise CoreInferError("prompt and continuation tokens: give whole numbers of at least 1")
    if texts.texts < LEAST_TEXTS:
        raise CoreInferError(f"texts={texts.texts}: give at least {LEAST_TEXTS}")
    whole, most = max(texts.prompt_tokens) + texts.continuation, params.config.max_positions
    if whole > most:
        raise CoreInferError(
            f"{max(texts.prompt_tokens)} prompt tokens and {texts.continuation} of the continuation exceed the model's "
            f"{most} positions; take fewer"
        )


def _switched(rows: np.ndarray, context: int) -> np.ndarray:
    """Each text's first `context` tokens before the others of the next text."""
    return np.concatenate([rows[:, :context], np.roll(rows[:, context:], -1, axis=0)], axis=1)


def summary(measured: Measured, seed: int) -> dict[str, Any]:
    """Means and intervals over documents, and means by position."""
    return {
        "kl": interval(measured.kl.mean(axis=1), seed),
        "agreement": interval(measured.agreement.mean(axis=1), seed),
        "perplexity": perplexity(measured.loss, seed),
        "kl_by_position": _binned(measured.kl),
        "agreement_by_position": _binned(measured.agreement),
        "perplexity_by_position": perplexity_by_position(measured.loss),
    }


def interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    """The mean of `values` [n], one per document, and its 95 % percentile bootstrap interval."""
    values = values.astype(np.float64)
    mean = float(values.mean())
    if np.ptp(values) == 0:  # nothing to resample
        return {"mean": mean, "ci95": [mean, mean]}
    from scipy.stats import bootstrap  # takes a second to import, which other commands need not wait for

    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return {"mean": mean, "ci95": [float(found.low), float(found.high)]}


def perplexity(losses: np.ndarray, seed: int) -> dict[str, Any]:
    """The perplexity of texts with `losses` [n, T] in nats, and its interval over documents."""
    found = interval(losses.mean(axis=1), seed)
    return {"mean": float(np.exp(found["mean"])), "ci95": [float(np.exp(bound)) for bound in found["ci95"]]}


def perplexity_by_position(losses: np.ndarray) -> list[float]:
    """The perplexity of texts with `losses` [n, T] in nats, by decode position."""
    return [float(np.exp(mean)) for mean in _binned(losses)]


def _binned(values: np.ndarray) -> list[float]:
    """Means over documents and over POSITIONS_PER_BIN positions in a row; the last bin may be of fewer."""
    means = values.astype(np.float64).mean(axis=0)
    return [float(part.mean()) for part in np.split(means, range(POSITIONS_PER_BIN, len(means), POSITIONS_PER_BIN))]
