"""`generate` and `stream`: prompts in, tokens out."""

from collections.abc import Iterable, Iterator

import numpy as np
from jax import Array

from coreinfer_jax.engine.programs import DISPATCH
from coreinfer_jax.engine.prompts import Tokens, fill_id, make_sampling
from coreinfer_jax.engine.request import Core, Recommended, make_request
from coreinfer_jax.engine.results import Chunk, Generation
from coreinfer_jax.engine.session import STREAM_CHUNK, run
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.narrow import check_dense


def generate(
    params: Params,
    tokens: Tokens,
    core: Core | Recommended = "recommended",
    *,
    groups: Groups | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Iterable[int] = (),
    key: Array | int | None = None,
) -> Generation:
    """Generate from prompts with the MLPs narrowed to core neurons after the prefill.

    The first new token is drawn from the full model's logits; narrowed weights act from the pass over it onwards.
    Programs are compiled per batch size, prompt bucket and cache bucket (powers of two, at least 64) and kept widths;
    other prompts, lengths and settings reuse them. Greedy and sampled decoding are two programs.

    Args:
        params: dense weights, from `load`.
        tokens: int [B, T], or a list of lists of unequal lengths; rows are padded here.
        core: a `CoreConfig` chooses core neurons from the prompt; `CoreNeurons` are used as they are; None is dense.
            "recommended" is what the model's calibration found, or `CoreConfig()` where it has none.
            With `per_row=True` each row equals its own single run and a step reads B narrowed MLPs; with
            `per_row=False` all rows together choose one set, which a step reads once.
        groups: groups of texts made ready by `prepare_groups`, for the methods of `core` that use them.
        max_new_tokens: new tokens per row, at most.
        temperature: 0 takes the most probable token; above 0 draws.
        top_k: draw among the k most probable tokens only.
        top_p: draw among the smallest set of tokens with at least this probability only.
        eos_ids: a row ends after any of these, looked for among new tokens only; () never stops.
        key: `jax.random.key` or int seed; row i draws its t-th token with fold_in(fold_in(key, i), t).

    Returns:
        `Generation`.

    Raises:
        CoreInferError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions, a
            setting outside its range, core neurons of another model, logits that are NaN or infinite.
    """
    check_dense(params)
    sampling = make_sampling(params.config, temperature, top_k, top_p, eos_ids, key)
    chunks = [chunk for chunk, _ in run(make_request(params, tokens, core, groups, max_new_tokens, sampling), DISPATCH)]
    filled = fill_id(params.config)
    made = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    padded = np.full((made.shape[0], max_new_tokens), filled, np.int32)
    padded[:, : made.shape[1]] = made
    lengths = np.stack([chunk.lengths for chunk in chunks]).sum(axis=0, dtype=np.int32)
    return Generation(tokens=padded, lengths=lengths, fill_id=filled, core=chunks[-1].core, stats=chunks[-1].stats)


def stream(
    params: Params,
    tokens: Tokens,
    core: Core | Recommended = "recommended",
    *,
    groups: Groups | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Iterable[int] = (),
    key: Array | int | None = None,
) -> Iterator[Chunk]:
    """The tokens of `generate` as they are made: the first alone, then up to 8 per chunk.

    Arguments and errors are those of `generate`, raised at the call; leave the loop to stop early.
    """
    check_dense(params)
    sampling = make_sampling(params.config, temperature, top_k, top_p, eos_ids, key)
    request = make_request(params, tokens, core, groups, max_new_tokens, sampling)
    return (chunk for chunk, _ in run(request, STREAM_CHUNK))
