"""`converse`: turn after turn over one KV cache, core neurons chosen anew each turn from all that was said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import STREAM_CHUNK, run
from coreinfer_jax.engine.options import GenerateOptions
from coreinfer_jax.engine.request import Past
from coreinfer_jax.engine.results import Chunk
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.sparsity.choosers import Core, Recommended, chooser_for, resolved
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.moving import NOTHING


@dataclass(frozen=True)
class Conversation:
    """What the full model has read of a conversation: a handle for the next turn.

    Attributes:
        params: the model.
        tokens: the ids it has read.
        core: how core neurons were chosen.
        groups: the groups they were chosen by, or None.
        past: their keys, values and sums, on the device.
    """

    params: Params
    tokens: tuple[int, ...]
    core: Core
    groups: Groups | None
    past: Past

    def goes_on(self, params: Params, tokens: tuple[int, ...], core: Core, groups: Groups | None) -> bool:
        """Whether what was read is what `params` would have read of the first of `tokens`, to choose as `core` does."""
        same = params is self.params and core == self.core and groups is self.groups
        read = self.tokens
        return same and chooser_for(params, core).adds_up and len(tokens) > len(read) and tokens[: len(read)] == read


def converse(
    params: Params,
    tokens: Sequence[int],
    conversation: Conversation | None = None,
    core: Core | Recommended = "recommended",
    **options: Unpack[GenerateOptions],
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
            its own are read from the start, and so is everything where the model, `core` or `groups` differ, where the
            conversation outgrows the length from which the model rotates otherwise (Phi-3 for long contexts), where
            votes have the budget `mean`, a mean over all tokens at once, or the way of choosing is `Auto`, which asks
            what the first half of the whole conversation votes.
        core: as for `generate`.
        **options: see `GenerateOptions`.

    Yields:
        A chunk of one row, and the conversation to go on from. Only the latest is alive: the memory of the ones
        before it, and of the argument, is used again; with `device_memory` the argument's goes also where all is read
        from the start.

    Raises:
        CoreInferError: as `generate`; a conversation that another turn has gone on from already.
    """
    check_dense(params)
    known, groups, ids = resolved(params, core), options.get("groups"), _checked(tokens)
    if conversation is not None and not isinstance(conversation, Conversation):
        raise CoreInferError(f"conversation={shown(conversation)}: give what the last turn ended with, or None")
    past = conversation.past if conversation and conversation.goes_on(params, ids, known, groups) else None
    if past is not None:
        past.check_alive()
    there = conversation.past.device_rows if conversation is not None and conversation.params is params else NOTHING
    if there.is_alive:
        options.setdefault("device_rows", there)  # of use whatever is read anew
    request = make_request(params, [ids], core, options, past, tells=False)
    rope = params.config.rope
    if past is not None and rope is not None and rope.is_long(request.capacity) != rope.is_long(past.cache.capacity):
        options["device_rows"] = request.device_rows  # those before may have been given back
        # Its keys were rotated for shorter texts.
        request = make_request(params, [ids], core, options, None, tells=False)
    if conversation is not None and request.past is None and options.get("device_memory") is not None:
        conversation.past.release()  # the plan has no room for it
    return ((chunk, Conversation(params, ids, known, groups, after)) for chunk, after in run(request, STREAM_CHUNK))


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
