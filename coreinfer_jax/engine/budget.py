"""The memory of a call whose MLPs stay on the host, laid out before it begins: what is on the device, and what moves.

Arrays are counted from their shapes. What programs need besides is what the compiler says of them
(`memory_analysis`), of the very programs that the call runs; for small steps between them there are bounds. A later
turn of a conversation is planned with what the turns before have left: their cache, where that is the larger one, and
one array of it beside its successor where it is outgrown.
"""

import functools
from bisect import bisect_left
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.request import Request
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.engine.streamed import embed_tokens, first_token, next_token, pass_of_prefill, through_layer
from coreinfer_jax.engine.streamed_verification import NO_CACHE, begun, draft_next, keep, without_cache
from coreinfer_jax.engine.verification import nothing_drafted
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.backends import draft_size
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.decoder import first_alike
from coreinfer_jax.model.host import mlp_bytes, shapes_on_host, without_layers
from coreinfer_jax.model.weights import Mlp, Params, leaf_bytes
from coreinfer_jax.sparsity.choice import AllNeurons, Chooser, ToNarrow
from coreinfer_jax.sparsity.narrow import narrowed_shapes
from coreinfer_jax.sparsity.stability import CoreConfig

# Of a call, in this order: the full model reads the prompts; chosen neurons are gathered and moved; tokens are made.
PHASES = ("prefill", "compaction", "decode")
# Parts that are of any call's prefill, whatever it is asked for.
_OF_ANY_CALL = ("embeddings", "attention and norms", "calibration", "two MLPs on their way")
# The largest keep ratio that fits is looked for in steps of one hundredth.
RATIOS = 100


@dataclass(frozen=True)
class Part:
    """Some of the memory of a call.

    Attributes:
        name: what it holds.
        nbytes: how much.
        phases: those of `PHASES` in which it is there.
    """

    name: str
    nbytes: int
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True)
class Plan:
    """What a call needs on the device, phase by phase, and what it moves there.

    Attributes:
        budget: bytes that it may have.
        parts: what is on the device.
        model_bytes: all weights of the model.
        per_prompt: bytes of MLPs that a prefill moves.
        per_set: bytes of core neurons that are moved after it, at most: what a later prompt shares stays.
        per_pass: bytes that each pass of decoding moves; 0 where core neurons decide.
        drafted: tokens that core neurons or earlier words draft for such a pass, at most; 0 without drafts.
    """

    budget: int
    parts: tuple[Part, ...]
    model_bytes: int
    per_prompt: int
    per_set: int
    per_pass: int
    drafted: int = 0

    def phase_bytes(self, phase: str) -> int:
        """Bytes on the device in a phase, at its largest."""
        return sum(part.nbytes for part in self.parts if phase in part.phases)

    @property
    def needed(self) -> int:
        """The smallest budget that works."""
        return max(map(self.phase_bytes, PHASES))

    def has_room_for(self, rows: int) -> bool:
        """Whether `rows` bytes of an earlier prompt's neurons may stay until they are used again.

        They stand beside the whole prefill. Then they make room layer by layer, so that only what they have more than
        the new ones is there besides. Where every token moves all MLPs they are of no use.
        """
        more = max(0, rows - self.per_set)
        fits = max(self.phase_bytes("prefill") + rows, self.phase_bytes("compaction") + more) <= self.budget
        return fits and self.per_set > 0

    def told(self) -> str:
        """The plan as a user reads it: a table of what is on the device in each phase, then what moves."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*lines, *self._moves()])

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("on the device", *PHASES)]
        for part in self.parts:
            rows.append((part.name, *(shown_bytes(part.nbytes) if phase in part.phases else "" for phase in PHASES)))
        rows.append(("together", *(shown_bytes(self.phase_bytes(phase)) for phase in PHASES)))
        rows.append((f"of {shown_bytes(self.budget)}", *(f"{self.phase_bytes(p) / self.budget:.0%}" for p in PHASES)))
        return rows

    def _moves(self) -> list[str]:
        told = [f"All weights are {shown_bytes(self.model_bytes)}; MLPs stay on the host."]
        if self.needed + self.model_bytes <= self.budget:
            told.append("The budget has room for all of them: without it nothing would be moved.")
        told.append(f"A prompt moves {shown_bytes(self.per_prompt)} of MLPs, layer by layer.")
        if self.per_set:
            then = "" if self.per_pass else ", and then no token moves any"
            told.append(f"Its core neurons move {shown_bytes(self.per_set)} more{then}.")
        if self.per_pass:
            told.append(self._of_each_pass())
        if self.per_set:
            is_again = self.has_room_for(self.per_set)
            again = "stay and are used again" if is_again else "have no room beside the next prompt's prefill"
            told.append(f"Rows that a later prompt shares {again}.")
        return told

    def _of_each_pass(self) -> str:
        size = shown_bytes(self.per_pass)
        if self.drafted:
            return (
                f"Lossless, each pass of the full model moves {size}, and makes 1 to {self.drafted + 1} tokens of a "
                "row: core neurons alone would move none."
            )
        return f"Each new token moves {size}: core neurons would move none."


def shown_bytes(size: float) -> str:
    """Bytes as a plan tells them: in the largest unit that they fill."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{int(size)} bytes"


def plan_request(request: Request, budget: int) -> Plan:
    """The memory of a request whose MLPs stay on the host; arrays of its params may be shapes without data.

    Nothing is run: programs are compiled, those that the request runs in any case.
    """
    params, narrowing = shapes_on_host(request.params), request.to_narrow
    weights = _narrowed(params, narrowing)
    kept_dense = [l for l, kept in enumerate(narrowing.kept) if kept is None]
    # Where no layer is narrowed no MLP stays on the device: every step moves all.
    is_dense = len(kept_dense) == len(narrowing.kept)
    streams, drafted = is_dense or request.lossless, _drafted(request)
    prefill = _prefill_of(request, params)
    whole = [mlp_bytes(layer.mlp) for layer in params.layers]
    narrowed = [0 if l in kept_dense else mlp_bytes(layer.mlp) for l, layer in enumerate(weights.layers)]
    dense = 0 if is_dense else sum(whole[l] for l in kept_dense)
    rows = prefill.rows
    if request.lossless:
        step = _drafting_temporaries(params, None if is_dense else weights, rows, drafted)
    else:
        step = _streamed_temporaries(params, rows) if streams else _step_temporaries(weights, rows)
    parts = [
        Part("embeddings", _bytes(without_layers(params))),
        Part("attention and norms", sum(_bytes(layer) - mlp_bytes(layer.mlp) for layer in params.layers)),
        Part("calibration", _bytes(params.calibration) if params.calibration is not None else 0),
        Part("KV cache", _bytes(rows.cache)),
        Part("state of the rows", _state(request, rows, prefill)),
        Part("chosen neurons", _bytes(_indices(narrowing)) + _bytes(_offsets(narrowing, params)), PHASES[1:]),
        Part("narrowed MLPs", sum(narrowed), PHASES[1:]),
        Part("MLPs kept dense", dense, PHASES[1:]),
        Part("two MLPs on their way", 2 * max(whole), PHASES[:1] if not streams else (PHASES[0], PHASES[2])),
        Part("hidden states", prefill.hidden, PHASES[:1]),
        Part("temporaries", prefill.temporaries, PHASES[:1]),
        Part("one layer's gather", 2 * max(narrowed), PHASES[1:2]),
        Part("temporaries of a step", step, PHASES[2:]),
    ]
    return Plan(
        budget=budget,
        parts=tuple(part for part in parts if part.nbytes),
        model_bytes=sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(params.weights)),
        per_prompt=sum(whole),
        per_set=sum(narrowed) + dense,
        per_pass=sum(whole) - dense if streams else 0,
        drafted=drafted,
    )


def check_plan(request: Request, plan: Plan) -> None:
    """Refuse a plan that its budget has no room for.

    Raises:
        CoreInferError: naming the smallest budget that would do, and what else would: the largest keep ratio that fits,
            where one does, and that lossless be left out, where that helps.
    """
    if plan.needed <= plan.budget:
        return
    raise CoreInferError(
        f"device_memory={plan.budget} ({shown_bytes(plan.budget)}): this call needs {shown_bytes(plan.needed)}; give "
        f"device_memory={plan.needed} or more; or {_remedy(request, plan)}{_or_not_lossless(request, plan.budget)}"
    )


def _or_not_lossless(request: Request, budget: int) -> str:
    """That a lossless request fits if it is not lossless, where it does."""
    if not request.lossless or plan_request(replace(request, lossless=False), budget).needed > budget:
        return ""
    return "; or leave out lossless"


def _remedy(request: Request, plan: Plan) -> str:
    """What to ask for instead of a larger budget: nothing that would not help.

    Every prefill moves whole MLPs, so that core neurons, and fewer of them, help only where a later phase is too large.
    """
    shorter = "ask for fewer rows or tokens"
    if sum(part.nbytes for part in plan.parts if "prefill" in part.phases and part.name in _OF_ANY_CALL) > plan.budget:
        wide = request.params.dtype.itemsize > 2
        return f"take a smaller model{' or a 16-bit dtype' if wide else ''}, as any prefill of this one needs more"
    if plan.phase_bytes("prefill") > plan.budget:
        return f"{shorter}, as the prefill moves whole MLPs, whatever is kept"
    if not isinstance(request.chooser, Chooser | AllNeurons):
        return f"give fewer neurons, or {shorter}"
    chooser = request.chooser if isinstance(request.chooser, Chooser) else CoreConfig(beta=1.0)
    lower = _largest_ratios(request, plan, chooser)
    if lower is None:
        return f"{shorter}, as no keep ratio fits"
    ratios = " with ".join(f"{name}={ratio:g}" for name, ratio in lower.items())
    return f"{'keep less' if chooser is request.chooser else 'choose core neurons'}, {ratios} fits"


def _largest_ratios(request: Request, plan: Plan, chooser: Chooser) -> dict[str, float] | None:
    """Keep ratios, in hundredths below the chooser's own, at which a request fits; None where none does.

    They are the largest, as larger ratios need more. Where a chooser has several, none is above the one that is tried,
    and only those that it lowers are named.
    """
    params, common = shapes_on_host(request.params), sum(p.nbytes for p in plan.parts if p.phases == PHASES)
    own = _ratios(chooser, request)

    def lower(hundredth: int) -> dict[str, Any]:
        return {name: hundredth / RATIOS for name, ratio in own.items() if ratio > hundredth / RATIOS}

    def narrower(hundredth: int) -> Request:
        return replace(request, chooser=replace(chooser, **lower(hundredth)))

    @functools.cache
    def fits(hundredth: int) -> bool:
        return plan_request(narrower(hundredth), plan.budget).needed <= plan.budget

    tried = range(ceil(max(own.values()) * RATIOS) - 1, 0, -1)
    possible = [h for h in tried if common + _least_after_prefill(params, narrower(h)) <= plan.budget]
    # Each that is tried compiles programs. One of the first fits in most cases; else they are halved.
    reach = 1
    while reach < len(possible) and not fits(possible[reach - 1]):
        reach *= 2
    place = bisect_left(possible, True, reach // 2, min(reach, len(possible)), key=fits)
    return lower(possible[place]) if place < len(possible) else None


def _ratios(chooser: Chooser, request: Request) -> dict[str, float]:
    """The keep ratios that a request's weights depend on, by the names of the chooser's settings."""
    named = {name: getattr(chooser, name, None) for name in ("beta", "gamma")}
    in_use = named if request.groups is not None else {"beta": named["beta"]}
    return {name: ratio for name, ratio in in_use.items() if ratio is not None}


def _least_after_prefill(params: Params, request: Request) -> int:
    """Bytes that compaction and decoding need at least: all MLPs that a request decodes with, and what moves beside."""
    narrowing = request.to_narrow
    layers = [mlp_bytes(layer.mlp) for layer in _narrowed(params, narrowing).layers]
    gathered = [size for size, kept in zip(layers, narrowing.kept, strict=True) if kept is not None]
    whole = [mlp_bytes(layer.mlp) for layer in params.layers] if request.lossless else []
    return (sum(layers) if gathered else 0) + 2 * max([*gathered, *whole], default=0)


def _bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _narrowed(params: Params, narrowing: ToNarrow) -> Params:
    """The shapes of `params` once they are narrowed."""
    return narrowed_shapes(params, _indices(narrowing), _offsets(narrowing, params), narrowing.linear)


def _indices(narrowing: ToNarrow) -> tuple[Array | None, ...]:
    sets = () if narrowing.sets == 1 else (narrowing.sets,)
    return tuple(None if kept is None else _shape((*sets, kept), jnp.int32) for kept in narrowing.kept)


def _offsets(narrowing: ToNarrow, params: Params) -> tuple[Array | None, ...]:
    sets = () if narrowing.sets == 1 else (narrowing.sets,)
    shape = _shape((*sets, params.config.hidden_size), jnp.float32)
    return tuple(shape if there else None for there in narrowing.offsets)


def _shape(shape: tuple[int, ...], dtype: Any) -> Array:
    """A shape without data, typed for what reads shapes only."""
    stands: Any = jax.ShapeDtypeStruct(shape, dtype)
    return stands


def _shapes_of(tree: Any) -> Any:
    """Shapes and types in place of the arrays of a tree."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@dataclass(frozen=True)
class _Prefill:
    """The shapes and the temporaries of a request's prefill.

    Attributes:
        rows: shapes of what it makes.
        logits: bytes of the first token's.
        hidden: bytes of hidden states.
        sums: bytes of the sums of all observed layers.
        temporaries: bytes that its programs need besides arrays, at most.
    """

    rows: Rows
    logits: int
    hidden: int
    sums: int
    temporaries: int


def _prefill_of(request: Request, params: Params) -> _Prefill:
    """The prefill of a request, `params` being shapes."""
    config, prompts, rest = params.config, request.prompts, without_layers(params)
    ints, tokens = _shape((request.rows,), jnp.int32), _shape(prompts.tokens.shape, jnp.int32)
    past = (_shape((request.rows, config.num_kv_heads, request.positions, config.head_size), params.dtype),) * 2
    x = embed_tokens.eval_shape(rest, tokens, ints, capacity=request.positions)
    earlier = {} if request.past is None else dict(zip(request.observed, _shapes_of(request.past.sums), strict=True))
    layers = [_layer_of_prefill(request, params, l, x, past, earlier.get(l)) for l in range(config.num_layers)]
    cache = KVCache((past[0],) * config.num_layers, (past[1],) * config.num_layers)
    history = _shape((request.rows, request.positions), jnp.int32) if request.looks_back else None
    sampling = make_sampling(config, request.rows, request.drawing, request.max_new_tokens)
    last = (rest, x, ints, ints, cache, sampling, history)
    rows, logits = first_token.eval_shape(*last)
    # By then no MLP is on its way: the two that the phase counts make room for as many bytes of temporaries.
    moving = 2 * mlp_bytes(params.layers[0].mlp)
    drawing = temporary_bytes(first_token, *last) - moving
    # And when a cache grows, none is yet, nor are there hidden states.
    growing = _outgrown(request) - moving - _bytes(x)
    return _Prefill(
        rows=rows,
        logits=_bytes(logits),
        hidden=_bytes(x),
        sums=sum(sums for sums, _ in layers),
        temporaries=max(drawing, growing, *(temporaries for _, temporaries in layers)),
    )


def _outgrown(request: Request) -> int:
    """Bytes of an earlier turn's cache that are there beside its successor: one array's, where that has no room."""
    cache = None if request.past is None else request.past.cache
    return 0 if cache is None or cache.capacity >= request.capacity else leaf_bytes(cache.keys[0])


def _layer_of_prefill(
    request: Request, params: Params, l: int, x: Array, past: tuple[Array, Array], earlier: Any
) -> tuple[int, int]:
    """Bytes of the sums of layer `l`, and of the temporaries of reading and ranking it.

    `earlier` are the sums of the turns before, which the program is compiled for; None for none.
    """
    layer, seen, observer = params.layers[l], l in request.observed, request.observer
    ints = _shape((request.rows,), jnp.int32)
    tokens, lengths = request.prompts.tokens, request.prompts.lengths
    reading = pass_of_prefill(params, tokens, lengths, lengths, observer, request.observed, request.filled, {})
    own = observer.of_layer(l) if observer is not None and seen else None
    arguments = (without_layers(params), layer, x, past, earlier, ints, ints, own)
    static = {"like": first_alike(params.config)[l], "filled": reading.filled, "size": reading.size}
    sums = _bytes(through_layer.eval_shape(*arguments, **static)[2]) if seen else 0
    return sums, max(temporary_bytes(through_layer, *arguments, **static), _ranking_bound(layer.mlp, sums))


def _ranking_bound(mlp: Mlp, sums: int) -> int:
    """Bytes that ranking a layer needs at most: a float32 copy of the down projection, and the sums a few times."""
    if not sums:
        return 0
    copy = 0 if mlp.down.weight.dtype == jnp.float32 else 4 * mlp.down.weight.size
    return copy + 4 * sums


def _state(request: Request, rows: Rows, prefill: _Prefill) -> int:
    """Bytes of what is small: rows without their cache, the first logits, sums and what they are made by."""
    return _bytes(rows) - _bytes(rows.cache) + prefill.logits + prefill.sums + _bytes(_own(request.observer))


def _own(observer: Any) -> Any:
    """An observer without the fits that are the calibration's."""
    return replace(observer, fits=None) if getattr(observer, "fits", None) is not None else observer


def _drafted(request: Request) -> int:
    """Tokens that are drafted for a verification at most."""
    return draft_size(request.params.token_embedding, request.rows, streams=True) if request.lossless else 0


def _step_temporaries(weights: Params, rows: Rows) -> int:
    """Bytes that a decode step of weights on the device needs besides these and rows."""
    return temporary_bytes(decode, weights, rows, _shape((), jnp.int32))


def _streamed_temporaries(params: Params, rows: Rows) -> int:
    """Bytes that a decode step needs whose MLPs are moved, besides weights and rows."""
    x, layer = _streamed_layer(params, rows, 1)
    last = temporary_bytes(next_token, without_layers(params), replace(rows, cache=NO_CACHE), rows.cache, x)
    return _bytes(x) + max(layer, last - 2 * mlp_bytes(params.layers[0].mlp))


def _drafting_temporaries(params: Params, narrow: Params | None, rows: Rows, size: int) -> int:
    """Bytes that drafting `size` tokens and verifying them needs besides weights and rows."""
    loop = begun.eval_shape(nothing_drafted(rows, size), size=size)
    drafting = (narrow, loop, _shape((2,), jnp.float32), _shape((), jnp.int32))
    drafted, *made = draft_next.eval_shape(*drafting, size=size)
    x, layer = _streamed_layer(params, rows, size + 1)
    kept = temporary_bytes(keep, without_layers(params), without_cache(drafted), *made, rows.cache, x)
    # No MLP is on its way while something is drafted or kept.
    alone = max(temporary_bytes(draft_next, *drafting, size=size), _bytes((made, x)) + kept)
    reading = _bytes((made, x)) + layer
    return _bytes(loop) - _bytes(rows) + max(reading, alone - 2 * mlp_bytes(params.layers[0].mlp))


def _streamed_layer(params: Params, rows: Rows, tokens: int) -> tuple[Array, int]:
    """The hidden states of a streamed pass over so many tokens per row, and the bytes that a layer of it needs."""
    rest, B = without_layers(params), rows.token.shape[0]
    ints = _shape((B,), jnp.int32)
    x = embed_tokens.eval_shape(rest, _shape((B, tokens), jnp.int32), ints, capacity=rows.cache.capacity)
    past = rows.cache.keys[0], rows.cache.values[0]
    static = {"like": 0, "filled": None, "size": tokens}
    return x, temporary_bytes(through_layer, rest, params.layers[0], x, past, None, ints, ints, None, **static)


def temporary_bytes(program: Any, *arguments: Any, **static: Any) -> int:
    """Bytes that a compiled program needs besides its arguments: temporaries, and results in memory of their own.

    A program is compiled once for this and for running it.
    """
    analysis = program.lower(*arguments, **static).compile().memory_analysis()
    if analysis is None:
        return 0
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
