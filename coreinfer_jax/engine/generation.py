"""`generate` and `stream`: prompts in, tokens out."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Unpack

import numpy as np

from coreinfer_jax.checks import parse_bytes
from coreinfer_jax.engine.budget import check_plan, plan_request
from coreinfer_jax.engine.loop import STREAM_CHUNK, run
from coreinfer_jax.engine.options import GenerateOptions, drawing_of, lossless_of
from coreinfer_jax.engine.programs import DISPATCH
from coreinfer_jax.engine.prompts import Tokens, check_length, pad_prompts
from coreinfer_jax.engine.request import Past, Request, checked_request
from coreinfer_jax.engine.results import Chunk, Generation
from coreinfer_jax.engine.sampling import fill_id
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.host import is_on_host
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.sparsity.choice import Choosing
from coreinfer_jax.sparsity.choosers import Core, Recommended, chooser_for
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.moving import NOTHING

MAX_NEW_TOKENS = 128


def generate(
    params: Params, tokens: Tokens, core: Core | Recommended = "recommended", **options: Unpack[GenerateOptions]
) -> Generation:
    """Generate from prompts with the MLPs narrowed to core neurons after the prefill.

    The first new token is drawn from the full model's logits; narrowed weights act from the pass over it onwards.
    Programs are compiled per batch size, prompt bucket and cache bucket (powers of two, at least 64) and kept widths;
    other prompts, lengths and settings reuse them. Greedy and sampled decoding are two programs.

    Args:
        params: dense weights, from `load`.
        tokens: int [B, T], or a list of lists of unequal lengths; rows are padded here.
        core: a `CoreConfig` (or `Similarity`, `Fused`, `Auto`) chooses core neurons from the prompt; `CoreNeurons` are
            used as they are; None is dense. "recommended" is what the model's calibration found, and dense where it has
            none: nobody knows what that model can spare. With `per_row=True` each row equals its own single run and a
            step reads B narrowed MLPs; with `per_row=False` all rows together choose one set, which a step reads once.
        **options: see `GenerateOptions`.

    Returns:
        `Generation`.

    Raises:
        CoreInferError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions, a
            setting outside its range, core neurons of another model, logits that are NaN or infinite.
    """
    request = make_request(params, tokens, core, options)
    chunks = [chunk for chunk, _ in run(request, DISPATCH)]
    filled = fill_id(params.config)
    padded = np.full((request.rows, request.max_new_tokens), filled, np.int32)
    lengths = np.zeros(request.rows, np.int32)
    for chunk in chunks:
        for row, length, own, new in zip(padded, lengths, chunk.tokens, chunk.lengths, strict=True):
            row[length : length + new] = own[:new]
        lengths += chunk.lengths
    last = chunks[-1]
    return Generation(
        tokens=padded,
        lengths=lengths,
        fill_id=filled,
        core=last.core,
        stats=last.stats,
        device_rows=last.device_rows,
    )


def stream(
    params: Params, tokens: Tokens, core: Core | Recommended = "recommended", **options: Unpack[GenerateOptions]
) -> Iterator[Chunk]:
    """The tokens of `generate` as they are made: the first alone, then up to 8 per chunk.

    Lossless, a chunk may hold a few more, and the one that measures what drafts cost up to 26, or 50 where MLPs stay on
    the host of an accelerator. Arguments and errors are those of `generate`, raised at the call; leave the loop to stop
    early.
    """
    request = make_request(params, tokens, core, options)
    return (chunk for chunk, _ in run(request, STREAM_CHUNK))


def make_request(
    params: Params,
    tokens: Tokens,
    core: Core | Recommended,
    options: GenerateOptions,
    past: Past | None = None,
    tells: bool = True,
) -> Request:
    """A call to generate, checked, so that mistakes surface at the call and not when the first chunk is asked for.

    Tokens are whole prompts, whatever of them `past` has read. With a budget it `tells` the plan on standard error.
    """
    check_dense(params)
    drawing = drawing_of(options, params.config)
    lossless, regather_at = lossless_of(options)
    prompts = pad_prompts(tokens, params.config)
    new = options.get("max_new_tokens", MAX_NEW_TOKENS)
    check_length(int(prompts.lengths.max()), new, params.config)
    chooser = chooser_for(params, core)
    if regather_at is not None:
        # What is recommended may be all neurons.
        _check_regathering(regather_at, params, chooser, options.get("groups"), asked=not isinstance(core, str))
    there = options.get("device_rows")
    request = checked_request(
        params, prompts, chooser, options.get("groups"), drawing, int(new), past, there, lossless, regather_at
    )
    budget = options.get("device_memory")
    return request if budget is None else _planned(request, parse_bytes("device_memory", budget), tells)


def _check_regathering(
    regather_at: float, params: Params, chooser: Choosing, groups: Groups | None, asked: bool
) -> None:
    """Refuse core neurons that cannot follow a text."""
    if is_on_host(params):
        raise CoreInferError(
            f"regather_at={regather_at}: of a model whose MLPs stay on the host the prompt's core neurons draft; "
            "leave it out"
        )
    if asked and not (chooser.adds_up and chooser.observed_layers(params.config, groups)):
        raise CoreInferError(
            f"regather_at={regather_at}: core neurons of this kind stay as they are; give a CoreConfig whose tokens "
            "count one by one (not votes with the budget 'mean'), or leave it out"
        )


def _planned(request: Request, budget: int, tells: bool) -> Request:
    """A request that has room in a budget.

    Rows of an earlier call that have no room beside the prefill are given back.
    """
    if not is_on_host(request.params):
        raise CoreInferError(
            f"device_memory={budget}: is of models that stay on the host; load with mlps_on_host=True, or leave it out"
        )
    plan = plan_request(request, budget)
    if tells:
        print(plan.told(), file=sys.stderr)
    check_plan(request, plan)
    if plan.has_room_for(request.device_rows.nbytes):
        return request
    request.device_rows.release(*request.device_rows.mlps)
    past = None if request.past is None else replace(request.past, device_rows=NOTHING)
    return replace(request, device_rows=NOTHING, past=past)
