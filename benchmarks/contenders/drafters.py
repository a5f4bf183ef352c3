"""Drafters that always draft, one way each: what the full model accepts of their tokens, and how fast that is.

The library drafts only where that pays, by what it trusts more. Here each pass verifies a draft wherever there is one,
so that drafters can be told apart where none of them pays. The program is the library's own: it is told that drafts
cost nothing, and where earlier words are not to draft, that they have failed a billion times.

`skipping` is a reference: self-speculative decoding, in which the model drafts with some of its layers left out
(Draft & Verify, arXiv 2309.08168; SWIFT, arXiv 2410.06916). Only MLPs are left out here: attentions stay, so that the
cache is the full model's. At equal bytes it keeps all neurons of some layers, where core neurons are some of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.contenders.trial import Continued
from coreinfer_jax.engine.dispatch import bytes_read_per_token
from coreinfer_jax.engine.drafting import BEST, LOOKUP, no_experience
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.lossless import NEVER
from coreinfer_jax.engine.programs import DISPATCH
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.streamed_verification import decode_drafted_streamed
from coreinfer_jax.engine.verification import Drafted, decode_drafted, nothing_drafted
from coreinfer_jax.model import MlpPass, extend, observe_nothing, unembed
from coreinfer_jax.model.backends import draft_size
from coreinfer_jax.model.cache import bucket, init_cache
from coreinfer_jax.model.host import is_on_host
from coreinfer_jax.model.weights import Layer, Mlp, Params


@dataclass(frozen=True)
class Drafter:
    """What drafts.

    Attributes:
        narrow: weights that draft, on the device; None for none.
        looks_up: whether earlier words of the text draft too; where both do, what has fared better drafts.
    """

    narrow: Params | None
    looks_up: bool


def continued(params: Params, drafter: Drafter, prompt: Sequence[int], new: int) -> Continued:
    """`prompt` with `new` greedy tokens of `params`, fewer where these end the text, each pass verifying a draft."""
    rows = begin(make_request(params, [prompt], None, {"max_new_tokens": new, "lossless": True})).rows
    full, narrow, streams = params.weights, drafter.narrow, is_on_host(params)
    size = draft_size(params.token_embedding, 1, streams)
    share = 0.0 if narrow is None else _step_share(full, narrow, rows)
    decode = partial(decode_drafted_streamed, full, narrow, {}) if streams else partial(decode_drafted, full, narrow)
    costs = jnp.asarray([1.0, NEVER if narrow is None else 0.0], jnp.float32)
    state, tokens = _begun(rows, size, drafter.looks_up), [np.array(rows.token)]
    began = perf_counter()
    while not np.array(state.rows.done).all():
        state, made, count = decode(state, np.int32(DISPATCH), costs, np.int32(BEST), size=size)
        tokens.append(np.array(made)[0, : int(count[0])])
    seconds = perf_counter() - began
    return Continued(np.concatenate(tokens), seconds, drafts=_drafts(state) | {"size": size, "step_share": share})


def _begun(rows: Rows, size: int, looks_up: bool) -> Drafted:
    """`rows` before any draft; where nothing is to be looked up, with no trust in that."""
    state = nothing_drafted(rows, size)
    if not looks_up:
        trust = no_experience(1)
        state = replace(state, trust=replace(trust, reached=trust.reached.at[:, LOOKUP].set(1e9)))
    return jax.block_until_ready(state)


def _step_share(full: Params, narrow: Params, rows: Rows) -> float:
    """Of the bytes that a pass of the full model reads, those that a step of narrowed weights does."""
    return bytes_read_per_token(narrow, rows.cache) / bytes_read_per_token(full, rows.cache)


def _drafts(state: Drafted) -> dict[str, Any]:
    single, verified, made = int(state.single), int(state.verified), int(state.rows.length[0]) - 1
    return {
        "tokens_per_pass": made / max(1, single + verified),
        "accepted_per_draft": int(state.accepted.sum()) / max(1, verified),
        "verifications": verified,
        "single_passes": single,
        "core_steps": int(state.core_steps),
    }


def skipping(params: Params, skipped: Sequence[int]) -> Params:
    """`params` whose layers `skipped` have MLPs of no neurons: what is left of these is the bias of their output."""
    layers = enumerate(params.layers)
    return replace(
        params.weights,
        layers=tuple(replace(layer, mlp=_without_neurons(layer.mlp)) if l in skipped else layer for l, layer in layers),
    )


def _without_neurons(mlp: Mlp) -> Mlp:
    none = jnp.zeros(0, jnp.int32)
    gate = None if mlp.gate is None else mlp.gate.take_outputs(none)
    return Mlp(gate=gate, up=mlp.up.take_outputs(none), down=mlp.down.take_inputs(none))


def least_missed(params: Params, text: Sequence[int], count: int) -> list[int]:
    """The `count` layers without whose MLP, each left out alone, the model agrees most with itself on a text's tokens.

    So they are chosen once per model, as in Draft & Verify, by one pass per layer and not by a search over sets.
    """
    L, length = params.config.num_layers, len(text)
    tokens = jnp.asarray(np.pad(np.asarray(text, np.int32), (0, bucket(length) - length)))[None]
    everywhere = np.ones(L, np.float32)
    full = jnp.argmax(_scores(params.weights, tokens, everywhere), axis=-1)

    def agreement(l: int) -> float:
        scores = _scores(params.weights, tokens, np.where(np.arange(L) == l, 0, everywhere))
        of_full = jnp.take_along_axis(scores, full[:, None], axis=1)[:length]
        return float(of_full.mean())

    return sorted(sorted(range(L), key=agreement)[-count:])


@jax.jit
def _scores(params: Params, tokens: Array, there: Array | np.ndarray) -> Array:
    """Log-probabilities [T, V] after tokens [1, T], the neurons of layer l counting `there[l]` times, [L]."""

    def edit(l: int, layer: Layer, seen: MlpPass) -> Array:
        return seen.activations * there[l].astype(seen.activations.dtype)

    cache = init_cache(params.config, 1, tokens.shape[1], params.dtype)
    hidden, _, _ = extend(params, tokens, cache, jnp.zeros(1, jnp.int32), observe_nothing, edit)
    return jax.nn.log_softmax(unembed(params, hidden)[0])
