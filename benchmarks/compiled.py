"""What the programs of generating would move on a device that is not there: compiled for it, and read.

Nothing runs. A bound of time is what the moved bytes take at the device's bandwidth, and a stated cost for each kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.described import DEVICES, placed_on
from benchmarks.environment import environment, read_results
from benchmarks.hlo import loop_kernels
from benchmarks.shapes import shape_config, shape_fields
from benchmarks.tables import made_on, markdown
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import decode, no_sums, prefill
from coreinfer_jax.engine.rows import first_drawn
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.model.cache import bucket, cache_bytes, init_cache
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, weight_bytes_per_step
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.narrow import narrowed_shapes
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.sparsity.votes import kept_neurons

# What a kernel costs beside what it moves: launching, and filling the device. Measured kernels on an H200 that move
# next to nothing take 1 to 2 microseconds.
KERNEL_SECONDS = 1.5e-6
DTYPE = jnp.dtype("bfloat16")


@dataclass(frozen=True)
class Asked:
    """What is compiled.

    Attributes:
        device: one of `DEVICES`.
        model: name of a shape, or a config.json.
        layers: of the model; None for all.
        keeps: keep ratios, beside all neurons.
        rows: batch size.
        prompt_tokens: of a prefill.
        capacity: positions that the cache has room for.
    """

    device: str
    model: str
    layers: int | None = None
    keeps: tuple[float, ...] = (0.4, 0.2)
    rows: int = 1
    prompt_tokens: int = 512
    capacity: int = 2048


def measure(asked: Asked) -> Iterator[dict[str, Any]]:
    """Results of decode, with all neurons and each keep ratio, and of prefill, plain and choosing neurons.

    Raises:
        CoreInferError: an unknown model, or a device that JAX cannot compile for here.
    """
    config = shape_config(shape_fields(asked.model, asked.layers))
    place = partial(jax.tree.map, partial(_abstract, placed_on(asked.device)))
    params: Params = place(abstract_params(config, DTYPE))
    common = environment() | {
        "benchmark": "compile",
        "platform": DEVICES[asked.device].platform,
        "device": asked.device,
        "model": asked.model,
        "layers": config.num_layers,
        "dtype": DTYPE.name,
        "rows": asked.rows,
    }
    for keep in (None, *asked.keeps):
        yield common | {"program": "decode", "keep": keep} | _decode(asked, params, keep, place)
    for keep in (None, *asked.keeps[-1:]):
        yield common | {"program": "prefill", "keep": keep} | _prefill(asked, params, keep, place)


Place = Callable[[Any], Any]


def _abstract(on: jax.sharding.Sharding, array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=on)


def _compiled(program: Any, platform: str, *arguments: Any, **static: Any) -> tuple[Any, float]:
    began = perf_counter()
    compiled = program.trace(*arguments, **static).lower(lowering_platforms=(platform,)).compile()
    return compiled, perf_counter() - began


def _decode(asked: Asked, params: Params, keep: float | None, place: Place) -> dict[str, Any]:
    """Of one decode step."""
    config, device = params.config, DEVICES[asked.device]
    if keep is not None:
        L, D, K = config.num_layers, config.hidden_size, kept_neurons(keep, config.mlp_size)
        indices = (place(jax.ShapeDtypeStruct((K,), jnp.int32)),) * L
        params = narrowed_shapes(params, indices, (place(jax.ShapeDtypeStruct((D,), jnp.float32)),) * L)

    def rows() -> Any:
        cache, none = init_cache(config, asked.rows, asked.capacity, DTYPE), jnp.zeros(asked.rows, jnp.int32)
        sampling = make_sampling(config, asked.rows, GREEDY, asked.capacity)
        return first_drawn(cache, jnp.zeros((asked.rows, config.vocab_size)), none, none, sampling)

    steps = jax.ShapeDtypeStruct((), jnp.int32)
    program, seconds = _compiled(decode, device.platform, place(params), place(jax.eval_shape(rows)), place(steps))
    kernels = loop_kernels(program.as_text())
    needed = weight_bytes_per_step(params, asked.rows) + cache_bytes(config, asked.rows, asked.capacity, DTYPE)
    moved = sum(kernel.read + kernel.written for kernel in kernels)
    return {
        "bytes_needed": needed,
        "bytes_moved": moved,
        "kernels": len(kernels),
        "kernels_per_layer": len(kernels) / config.num_layers,
        "weight_copies": [f"{kernel.name} {kernel.source}".strip() for kernel in kernels if kernel.copies],
        "temporary_bytes": _temporary_bytes(program),
        "compile_seconds": seconds,
        "bound_seconds": moved / device.bandwidth + len(kernels) * KERNEL_SECONDS,
    }


def _prefill(asked: Asked, params: Params, keep: float | None, place: Place) -> dict[str, Any]:
    """Of a prefill: temporaries alone, as it has no loop."""
    config, B, T = params.config, asked.rows, bucket(asked.prompt_tokens)
    chooser: Chooser | None = None if keep is None else CoreConfig(beta=keep)
    lengths, tokens = np.full(B, asked.prompt_tokens, np.int32), np.zeros((B, T), np.int32)
    observed: tuple[int, ...] = () if chooser is None else chooser.observed_layers(config, None)
    observer = None
    if chooser is not None:
        observer = chooser.observer(chooser.counted(tokens, lengths, 0, config), config.mlp_size)

    def past() -> Any:
        return init_cache(config, B, asked.capacity, DTYPE)

    sums: Any = []
    if observer is not None:
        sums = jax.eval_shape(partial(no_sums, layers=len(observed)), observer, params.layers[0], tokens)
    sampling = jax.eval_shape(lambda: make_sampling(config, B, GREEDY, asked.capacity))
    arguments = (params, tokens, lengths, lengths, jax.eval_shape(past), sums, sampling, observer)
    platform = DEVICES[asked.device].platform
    program, seconds = _compiled(prefill, platform, *place(arguments), observed=observed, filled=T)
    return {
        "prompt_tokens": asked.prompt_tokens,
        "temporary_bytes": _temporary_bytes(program),
        "compile_seconds": seconds,
    }


def _temporary_bytes(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def table() -> str:
    """Decode steps of the last results, for docs/performance.md."""
    results = {(r["device"], r["model"], r["keep"]): r for r in read_results("compile") if r["program"] == "decode"}
    head = ("needed, GB", "moved, GB", "kernels per layer", "temporaries, MB", "bound, ms", "to all neurons")
    rows = [["compiled for", "neurons", *head]]
    for (device, model, keep), found in results.items():
        gain = results[device, model, None]["bound_seconds"] / found["bound_seconds"]
        rows.append(
            [
                f"{device}, {model}",
                "all" if keep is None else f"{keep:.0%}",
                f"{found['bytes_needed'] / 1e9:.2f}",
                f"{found['bytes_moved'] / 1e9:.2f}",
                f"{found['kernels_per_layer']:.1f}",
                f"{found['temporary_bytes'] / 1e6:.1f}",
                f"{1000 * found['bound_seconds']:.2f}",
                "" if keep is None else f"x {gain:.2f}",
            ]
        )
    return f"{markdown(rows)}\n\n{made_on(*results.values())}"
