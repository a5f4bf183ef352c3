"""`converse`: turn after turn over one KV cache, core neurons chosen anew each turn from all that was said."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax import Array

from coreinfer_jax.engine.prompts import make_sampling
from coreinfer_jax.engine.request import Core, Past, Recommended, check_alive, make_request, resolved
from coreinfer_jax.engine.results import Chunk
from coreinfer_jax.engine.session import STREAM_CHUNK, run
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import CoreConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.narrow import check_dense


@dataclass(frozen=True)
class Conversation:
    """What the full model has read of a conversation: a handle for the next turn.

    Attributes:
        params: the model.
        tokens: the ids it has read.
        core: how core neurons were chosen.
        groups: the groups they were chosen by, or None.
        past: their keys, values and votes, on the device.
    """

    params: Params
    tokens: tuple[int, ...]
    core: Core
    groups: Groups | None
    past: Past


def converse(
    params: Params,
    tokens: Sequence[int],
    conversation: Conversation | None = None,
    core: Core | Recommended = "recommended",
    *,
    groups: Groups | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Iterable[int] = (),
    key: Array | int | None = None,
) -> Iterator[tuple[Chunk, Conversation]]:
    """The next reply in a conversation, in chunks as `stream` makes them.

    Only tokens that the full model has not read are read: what the user said last, and before it the last reply, which
    narrowed weights had made; its keys and values are replaced by the full model's. What their neurons did joins the
    sums of the earlier turns. So the reply is, token for token, that of `stream` over the whole conversation, at the
    cost of a prefill of its last two turns.

    Args:
        params: dense weights.
        tokens: the whole conversation so far, for instance by the tokenizer's chat template.
        conversation: what came with the last chunk of the turn before; None for the first. Ids that do not continue
            its own are read from the start, and so is everything where the model, `core` or `groups` differ, where
            votes have the budget `mean`, a mean over all tokens at once, or the method is `auto`, which asks what the
            first half of the whole conversation votes.
        core: see `generate`.
        groups: see `generate`.
        max_new_tokens: see `generate`.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        eos_ids: see `generate`.
        key: see `generate`.

    Yields:
        A chunk of one row, and the conversation to go on from. Only the latest is alive: the memory of the ones
        before it, and of the argument, is used again.

    Raises:
        CoreInferError: as `generate`; a conversation that another turn has gone on from already.
    """
    check_dense(params)
    core = resolved(params, core)
    sampling = make_sampling(params.config, temperature, top_k, top_p, eos_ids, key)
    ids = _checked(tokens)
    if conversation is not None and not isinstance(conversation, Conversation):
        raise CoreInferError(f"conversation={shown(conversation)}: give what the last turn ended with, or None")
    past = conversation.past if conversation and _continues(params, ids, core, groups, conversation) else None
    if past is not None:
        check_alive(past)
    request = make_request(params, [ids[past.read if past else 0 :]], core, groups, max_new_tokens, sampling, past)
    return ((chunk, Conversation(params, ids, core, groups, after)) for chunk, after in run(request, STREAM_CHUNK))


def _checked(tokens: Sequence[int]) -> tuple[int, ...]:
    """The ids, which `make_request` checks one by one, as a tuple."""
    is_list = not isinstance(tokens, str) and (isinstance(tokens, Sequence) or hasattr(tokens, "__array__"))
    try:
        ids = np.asarray(tokens if is_list else 0)
    except ValueError:  # NumPy's word for lists of unequal depth
        ids = np.asarray(0)
    if ids.ndim != 1:
        raise CoreInferError(f"tokens: {type(tokens).__name__}; give one conversation's ids, a flat list")
    return tuple(ids.tolist())


def _continues(
    params: Params, ids: tuple[int, ...], core: Core, groups: Groups | None, conversation: Conversation
) -> bool:
    """Whether keys, values and votes of `conversation` are those that `params` has for the first of `ids`."""
    read = conversation.tokens
    same = params is conversation.params and core == conversation.core and groups is conversation.groups
    return same and _adds_up(core) and len(ids) > len(read) and ids[: len(read)] == read


def _adds_up(core: Core) -> bool:
    """Whether sums over the parts of a conversation are all that the choice needs."""
    if not isinstance(core, CoreConfig):
        return True
    return core.method != "auto" and (core.ranking != "votes" or core.budget == "per_token")
