"""What stability-guided core neurons cost the embedded models: perplexity of true continuations, by keep ratio.

Prompts and continuations come from the documents that training held out. The full model reads the prompt; the
continuation, given token by token, is read on the prompt's core neurons over the prompt's cache, as in decoding.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import coreinfer_jax as ci
from benchmarks.environment import environment
from coreinfer_jax.cache import init_cache
from coreinfer_jax.core.predict import predict
from coreinfer_jax.core.select import Votes, count_votes, kept_neurons, make_voting
from coreinfer_jax.fingerprint import fingerprint
from coreinfer_jax.models import extend, observe_nothing, unembed
from coreinfer_jax.params import Params, abstract_params, weight_bytes_per_step
from coreinfer_jax.training.corpus import read_text

FILES = ("stories.txt", "prose.txt")
FLOAT32 = jnp.dtype("float32")
KEEPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
PROMPT_LENGTHS = (16, 64, 256)
CONTINUATION = 128
ROWS = 8


def measure(texts: Path) -> dict[str, Any]:
    """Perplexities of both embedded models over held-out documents of the files in `texts`."""
    return environment() | {
        "continuation_tokens": CONTINUATION,
        "alpha": ci.CoreConfig().alpha,
        "models": {name: _model(name, texts) for name in ("opt", "llama")},
    }


def _model(name: str, texts: Path) -> dict[str, Any]:
    params, tokenizer = ci.load(f"embedded:{name}", "float32")
    assert tokenizer is not None
    size = max(PROMPT_LENGTHS) + CONTINUATION + 1
    documents = [document for file in FILES for _, document in read_text(texts / file).held_out]
    rows = [ids[:size] for document in documents if len(ids := tokenizer.encode(document)) >= size]
    batches = np.array(rows[: len(rows) // ROWS * ROWS]).reshape(-1, ROWS, size)
    lengths = tqdm(PROMPT_LENGTHS, desc=name, unit="length", disable=None)
    return {
        "fingerprint": fingerprint(params),
        "texts": ROWS * len(batches),
        "bytes_share": {str(keep): _bytes_share(params, keep) for keep in KEEPS},
        "perplexity": {str(n): _by_keep(params, batches[:, :, : n + CONTINUATION + 1], n) for n in lengths},
    }


def _bytes_share(params: Params, keep: float) -> float:
    """Weight bytes of a step on core neurons, as a share of the full model's."""
    narrowed = abstract_params(replace(params.config, mlp_size=kept_neurons(keep, params.config.mlp_size)), FLOAT32)
    return weight_bytes_per_step(narrowed, 1) / weight_bytes_per_step(abstract_params(params.config, FLOAT32), 1)


def _by_keep(params: Params, batches: np.ndarray, length: int) -> dict[str, float]:
    """Perplexity of the 128 tokens after the first `length` + 1, dense and per keep ratio; batches [n, B, tokens]."""
    losses: dict[str, list[float]] = {}
    for batch in batches:
        prompt, rest = jnp.asarray(batch[:, :length]), jnp.asarray(batch[:, length:])
        cache, votes = _read(params, prompt)
        losses.setdefault("dense", []).append(float(_loss(params, cache, rest, length)))
        for keep in KEEPS:
            voters = np.full(ROWS, length)
            predicted = predict(ci.CoreConfig(beta=keep), dict(enumerate(votes)), voters, params.config, None)
            loss = _loss(predicted.weights(params), cache, rest, length)
            losses.setdefault(str(keep), []).append(float(loss))
    return {keep: float(np.exp(np.mean(values))) for keep, values in losses.items()}


@jax.jit
def _read(params: Params, prompt: Array) -> tuple[Any, list[Votes]]:
    """Cache, with room for the continuation, and votes of prompts [B, T]."""
    B, T = prompt.shape
    voting = make_voting(np.ones((B, T), bool), params.config.mlp_size, ci.CoreConfig().alpha, "per_token")
    cache = init_cache(params.config, B, T + CONTINUATION, params.token_embedding.dtype)
    _, cache, votes = extend(params, prompt, cache, jnp.zeros(B, jnp.int32), partial(count_votes, voting=voting))
    return cache, list(votes)


@partial(jax.jit, static_argnames="length")
def _loss(params: Params, cache: Any, rest: Array, length: int) -> Array:
    """Mean loss of tokens `rest` [B, n] from the second on: the full model's logits give the first."""
    start = jnp.full(rest.shape[0], length, jnp.int32)
    hidden, _, _ = extend(params, rest[:, :-1], cache, start, observe_nothing)
    return optax.softmax_cross_entropy_with_integer_labels(unembed(params, hidden), rest[:, 1:]).mean()
