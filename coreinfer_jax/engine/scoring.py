"""`score_continuations`: log-probabilities of given continuations, on the weights that `generate` would decode with."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from coreinfer_jax.checks import check_finite
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import score_given
from coreinfer_jax.engine.prompts import Prompts, Tokens, pad_prompts
from coreinfer_jax.engine.request import checked_request
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.sparsity.choosers import Core, Recommended, chooser_for
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.neurons import CoreNeurons

# Answers to choose from are a few tokens long; reading 64 positions for each would be most of the work.
LEAST_CONTINUATION = 8


@dataclass(frozen=True)
class Scores:
    """What continuations are worth, one entry per row.

    Attributes:
        logprobs: float32 [n], the natural logarithm of the probability of each token of the row's continuation.
        is_best: bool [n], whether it was the most probable token.
        core: the core neurons used, None when dense.
    """

    logprobs: tuple[np.ndarray, ...]
    is_best: tuple[np.ndarray, ...]
    core: CoreNeurons | None


def score_continuations(
    params: Params,
    contexts: Tokens,
    continuations: Tokens,
    core: Core | Recommended = "recommended",
    *,
    groups: Groups | None = None,
) -> Scores:
    """How probable given continuations are when they are decoded as `generate` decodes.

    The full model reads a context, core neurons are chosen as `generate` chooses them, and the narrowed model reads the
    continuation, in one pass that equals decoding it token by token. As in `generate` the first token's probability is
    the full model's: a continuation of one token says nothing about core neurons.

    Args:
        params: dense weights, from `load`.
        contexts: int [B, T], or a list of lists of unequal lengths.
        continuations: the same, for the same rows.
        core: as for `generate`.
        groups: groups of texts made ready by `prepare_groups`, for the ways of choosing that use them.

    Returns:
        `Scores`.

    Raises:
        CoreInferError: an empty context or continuation, an id outside the vocabulary, more tokens to read (all but the
            last of a continuation) than the model has positions, core neurons of another model, logits that are NaN or
            infinite.
    """
    check_dense(params)
    check_on_device(params, "score_continuations")
    config = params.config
    prompts, rest = _padded("contexts", contexts, config), _padded("continuations", continuations, config)
    chooser = chooser_for(params, core)
    begun = begin(checked_request(params, prompts, chooser, groups, GREEDY, _positions_after(prompts, rest, config)))
    tokens = rest.tokens[:, : bucket(int(rest.lengths.max()), LEAST_CONTINUATION)]
    weights = begun.chosen.weights(params)
    read = score_given(weights, begun.rows.cache, begun.rows.position, begun.logits, tokens)
    logprobs, is_best = (
        tuple(row[:length] for row, length in zip(np.array(rows), rest.lengths, strict=True)) for rows in read
    )
    check_finite(jnp.isfinite(np.concatenate(logprobs)).all())
    return Scores(logprobs, is_best, begun.chosen.core)


def _padded(name: str, tokens: Tokens, config: ModelConfig) -> Prompts:
    try:
        return pad_prompts(tokens, config)
    except CoreInferError as error:
        raise CoreInferError(f"{name}: {error}") from error


def _positions_after(prompts: Prompts, rest: Prompts, config: ModelConfig) -> int:
    """Positions needed after the longest context; a row's last token is foretold, not read."""
    if len(prompts.lengths) != len(rest.lengths):
        raise CoreInferError(
            f"{len(prompts.lengths)} contexts and {len(rest.lengths)} continuations: give one for every context"
        )
    needed = prompts.lengths + rest.lengths - 1
    longest = int(needed.argmax())
    if needed[longest] > config.max_positions:
        raise CoreInferError(
            f"row {longest}: {prompts.lengths[longest]} tokens of context and {rest.lengths[longest]} of the "
            f"continuation exceed the model's {config.max_positions} positions; shorten the context"
        )
    return int(needed[longest] - prompts.lengths.max())
