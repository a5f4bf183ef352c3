"""What the programs of generating would move on a device that is not there: compiled for it, and read.

Nothing runs. A bound of time is what the moved bytes take at the device's bandwidth, and a stated cost for each kernel.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.described import DEVICES, placed_on
from benchmarks.environment import environment, read_results
from benchmarks.hlo import Kernel, all_kernels, loop_kernels
from benchmarks.shapes import shape_config, shape_fields
from benchmarks.tables import made_on, markdown
from coreinfer_jax.engine.options import GREEDY, Drawing
from coreinfer_jax.engine.programs import decode, no_sums, prefill
from coreinfer_jax.engine.rows import first_drawn
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.model.cache import bucket, cache_bytes, init_cache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.sparsity.narrow import gather_core, multiple_of, narrowed_bytes, narrowed_shapes
from coreinfer_jax.sparsity.ranking import rank
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.sparsity.votes import kept_neurons

DTYPE = jnp.dtype("bfloat16")
PROGRAMS = ("decode", "prefill", "selection", "gather")


@dataclass(frozen=True)
class Asked:
    """What is compiled.

    Attributes:
        device: one of `DEVICES`.
        model: name of a shape, or a config.json.
        layers: of the model; None for all.
        keeps: keep ratios; None for all neurons.
        rows: batch size.
        per_row: whether each of several rows has core neurons of its own.
        prompt_tokens: of a prefill.
        capacity: positions that the cache has room for.
        programs: some of `PROGRAMS`.
        sampled: whether decode draws its tokens, in place of taking the most probable.
    """

    device: str
    model: str
    layers: int | None = None
    keeps: tuple[float | None, ...] = (None, 0.4, 0.2)
    rows: int = 1
    per_row: bool = True
    prompt_tokens: int = 512
    capacity: int = 2048
    programs: tuple[str, ...] = PROGRAMS
    sampled: bool = False


@dataclass(frozen=True)
class Program:
    """A jitted function and what it is compiled for.

    Attributes:
        function: as `jax.jit` gives it.
        arguments: arrays, or their shapes.
        needed: bytes that it has to read and write.
        static: arguments by name.
        kernels: of its text, those that `needed` is about.
    """

    function: Any
    arguments: tuple[Any, ...]
    needed: int
    static: Mapping[str, Any] = field(default_factory=dict)
    kernels: Callable[[str], list[Kernel]] = all_kernels


def measure(asked: Asked) -> Iterator[dict[str, Any]]:
    """Results of every program for each keep ratio: of a prefill once for all, and once where nothing is observed.

    Raises:
        CoreInferError: an unknown model, or a device that JAX cannot compile for here.
    """
    on = placed_on(asked.device)
    config = shape_config(shape_fields(asked.model, asked.layers))
    params: Params = _placed(abstract_params(config, DTYPE), on)
    common = environment() | {
        "benchmark": "compile",
        "platform": DEVICES[asked.device].platform,
        "device": asked.device,
        "model": asked.model,
        "layers": config.num_layers,
        "dtype": DTYPE.name,
        "rows": asked.rows,
        "per_row": asked.per_row and asked.rows > 1,
        "capacity": asked.capacity,
        "prompt_tokens": asked.prompt_tokens,
        "sampled": asked.sampled,
    }
    ratios = [keep for keep in asked.keeps if keep is not None]
    cases: dict[str, tuple[Callable[..., Program], Sequence[float | None]]] = {
        "decode": (_decode, asked.keeps),
        "prefill": (_prefill, (None, *ratios[-1:])),
        "selection": (_selection, ratios),
        "gather": (_gathering, ratios),
    }
    for name in asked.programs:
        make, keeps = cases[name]
        for keep in keeps:
            read = _read(make(asked, params, keep), asked.device, config, on)
            yield common | {"program": name, "keep": keep} | read


def _placed(tree: Any, on: jax.sharding.Sharding) -> Any:
    """The shapes of all arrays of a tree, which are to lie `on` a device."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=on), tree)


def _read(program: Program, device: str, config: ModelConfig, on: jax.sharding.Sharding) -> dict[str, Any]:
    """What a program does, from its text once it is compiled."""
    described = DEVICES[device]
    began = perf_counter()
    traced = program.function.trace(*_placed(program.arguments, on), **program.static)
    compiled = traced.lower(lowering_platforms=(described.platform,)).compile()
    seconds = perf_counter() - began
    found = program.kernels(compiled.as_text())
    moved = sum(kernel.read + kernel.written for kernel in found)
    kernels = sum(not kernel.is_transfer for kernel in found)
    return {
        "bytes_needed": program.needed,
        "bytes_moved": moved,
        "kernels": kernels,
        "kernels_per_layer": kernels / config.num_layers,
        "weight_copies": [f"{kernel.name} {kernel.source}".strip() for kernel in found if kernel.copies],
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "compile_seconds": seconds,
        "bound_seconds": moved / described.bandwidth + kernels * described.kernel_seconds,
    }


def _decode(asked: Asked, params: Params, keep: float | None) -> Program:
    """One decode step, which reads all weights and the whole cache."""
    config = params.config
    weights = params if keep is None else narrowed_shapes(params, *_core(asked, config, keep))

    def rows() -> Any:
        cache, none = init_cache(config, asked.rows, asked.capacity, DTYPE), jnp.zeros(asked.rows, jnp.int32)
        drawing = Drawing(jax.random.key(0), 0.8, 40, 0.9) if asked.sampled else GREEDY
        sampling = make_sampling(config, asked.rows, drawing, asked.capacity)
        return first_drawn(cache, jnp.zeros((asked.rows, config.vocab_size)), none, none, sampling)

    needed = weight_bytes_per_step(weights, asked.rows) + cache_bytes(config, asked.rows, asked.capacity, DTYPE)
    return Program(decode, (weights, jax.eval_shape(rows), np.int32(0)), needed, kernels=loop_kernels)


def _core(asked: Asked, config: ModelConfig, keep: float) -> tuple[Any, Any]:
    """Shapes of core neurons and offsets, the same for every layer."""
    sets = (asked.rows,) if asked.per_row and asked.rows > 1 else ()
    indices = jax.ShapeDtypeStruct((*sets, kept_neurons(keep, config.mlp_size)), jnp.int32)
    offsets = jax.ShapeDtypeStruct((*sets, config.hidden_size), jnp.float32)
    return (indices,) * config.num_layers, (offsets,) * config.num_layers


def _prefill(asked: Asked, params: Params, keep: float | None) -> Program:
    """A prefill, which reads all weights and writes the prompts' keys and values; it observes nothing without a ratio.

    What else it moves, activations above all, depends on how it is compiled.
    """
    config, B, T = params.config, asked.rows, bucket(asked.prompt_tokens)
    lengths, tokens = np.full(B, asked.prompt_tokens, np.int32), np.zeros((B, T), np.int32)
    observer, sums = (None, []) if keep is None else _observed(asked, params, keep)
    cache = jax.eval_shape(partial(init_cache, config, B, asked.capacity, DTYPE))
    sampling = jax.eval_shape(lambda: make_sampling(config, B, GREEDY, asked.capacity))
    arguments = (params, tokens, lengths, lengths, cache, sums, sampling, observer)
    needed = weight_bytes_per_step(params, B * T) + cache_bytes(config, B, T, DTYPE)
    return Program(prefill, arguments, needed, {"observed": tuple(range(len(sums))), "filled": T})


def _observed(asked: Asked, params: Params, keep: float) -> tuple[Any, Any]:
    """What the default rule observes of a prefill, and the shapes of its sums of every layer."""
    B, T = asked.rows, bucket(asked.prompt_tokens)
    tokens, config = np.zeros((B, T), np.int32), params.config
    chooser = CoreConfig(beta=keep)
    counted = chooser.counted(tokens, np.full(B, asked.prompt_tokens, np.int32), 0, config)
    observer = chooser.observer(counted, params)
    sums = jax.eval_shape(partial(no_sums, layers=config.num_layers), observer, params.layers[0], tokens)
    return observer, sums


def _selection(asked: Asked, params: Params, keep: float) -> Program:
    """Ranking the neurons of all layers, which reads the sums, and the down projections for their norms."""
    config = params.config
    chooser, (_, sums) = CoreConfig(beta=keep), _observed(asked, params, keep)
    downs = [layer.mlp.down for layer in params.layers]
    static = {
        "rule": type(chooser.ranking),
        "kept": (kept_neurons(keep, config.mlp_size),) * config.num_layers,
        "compensated": chooser.compensation > 0,
    }
    needed = sum(down.matrix_bytes for down in downs) + sum(map(leaf_bytes, jax.tree.leaves(sums)))
    return Program(rank, (sums, None, downs, [None] * len(downs), np.float32(0), np.float32(0)), needed, static)


def _gathering(asked: Asked, params: Params, keep: float) -> Program:
    """Narrowing all layers, which reads the core neurons' weights and writes them, padded, where decode reads them."""
    indices, offsets = _core(asked, params.config, keep)
    dense = [layer.mlp for layer in params.layers]
    narrowed = [layer.mlp for layer in narrowed_shapes(params, indices, offsets).layers]
    sets, kept = narrowed[0].up.rows or 1, indices[0].shape[-1]
    written = sum(map(leaf_bytes, jax.tree.leaves(narrowed)))
    needed = narrowed_bytes(params, tuple(range(len(dense))), kept, sets) + written
    return Program(
        gather_core,
        (dense, list(indices), list(offsets), [None] * len(dense)),
        needed,
        {"multiple": multiple_of(params)},
    )


def table() -> str:
    """Decode steps and prefills, of each case the first result and the last, for docs/performance.md."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in read_results("compile"):
        found.setdefault((result["program"], *_case(result)), []).append(result)
    cases = [(name, results[0], results[-1]) for (name, *_), results in found.items()]
    steps = [(first, last) for name, first, last in cases if name == "decode"]
    head = ["compiled for", "neurons", "needed, GB", "moved, GB", "kernels per layer", "temporaries, MB"]
    rows = [[*head, "bound, ms", "to all neurons"]]
    for first, last in steps:
        dense = found["decode", *_case(last | {"keep": None})][-1]
        gain = dense["bound_seconds"] / last["bound_seconds"]
        rows.append(
            [
                *_case(last)[:2],
                f"{last['bytes_needed'] / 1e9:.2f}",
                *(_changed(first, last, *column) for column in _COLUMNS),
                f"{1000 * last['bound_seconds']:.2f}",
                "" if last["keep"] is None else f"x {gain:.2f}",
            ]
        )
    prefills = [["compiled for", "chooses neurons", "temporaries, MB"]]
    for first, last in ((first, last) for name, first, last in cases if name == "prefill"):
        chooses = "no" if last["keep"] is None else "yes"
        prefills.append([_case(last)[0], chooses, _changed(first, last, *_COLUMNS[-1])])
    made = "\n\n".join(
        f"{when}: {made_on(*results)}"
        for when, results in zip(("Before", "Now"), zip(*steps, strict=True), strict=True)
    )
    return f"{markdown(rows)}\n\nPrefills:\n\n{markdown(prefills)}\n\n{made}"


# What changes from version to version: a result's entry, its unit and its decimals.
_COLUMNS = (("bytes_moved", 1e9, 2), ("kernels_per_layer", 1.0, 1), ("temporary_bytes", 1e6, 1))


def _changed(first: Mapping[str, Any], last: Mapping[str, Any], entry: str, unit: float, decimals: int) -> str:
    before, now = (f"{result[entry] / unit:.{decimals}f}" for result in (first, last))
    return now if before == now else f"{before}, now {now}"


def _case(result: Mapping[str, Any]) -> tuple[str, str]:
    neurons = "all" if result["keep"] is None else f"{result['keep']:.0%}"
    return f"{result['device']}, {result['model']}{_other_than_usual(result)}", neurons


def _other_than_usual(result: Mapping[str, Any]) -> str:
    """What a result is of besides its device and model, where it is not what these are asked for without options."""
    usual = Asked(result["device"], result["model"])
    whole = shape_config(shape_fields(result["model"], None)).num_layers
    told = [] if result["layers"] == whole else [f"{result['layers']} of {whole} layers"]
    if result["rows"] > 1:
        told.append(f"{result['rows']} rows, {'a core set each' if result['per_row'] else 'one core set'}")
    told += [
        f"{name} {result[name]}"
        for name in ("capacity", "prompt_tokens", "sampled")
        if result[name] != getattr(usual, name)
    ]
    return "".join(f", {one}" for one in told)
