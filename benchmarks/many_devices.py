"""What a decode step of a model over many devices reads, keeps and tells: compiled for systems that are not there.

Programs of two and of three layers are compiled and read, and what a layer adds is counted as often as the model has
layers. A bound of time is what a device reads at its bandwidth, and a stated cost for each time that devices wait for
one another.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from benchmarks.described import DEVICES, devices_of
from benchmarks.environment import environment, read_results
from benchmarks.hlo import array_bytes
from benchmarks.shapes import shape_config, shape_fields
from benchmarks.tables import made_on, markdown
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.rows import first_drawn
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.shards import AXIS, specs
from coreinfer_jax.model.spread import spread_config
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.narrow import narrowed_shapes
from coreinfer_jax.sparsity.votes import kept_neurons

DTYPE, CAPACITY, LAYERS = jnp.dtype("bfloat16"), 4096, (2, 3)
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\(")
# Seconds that devices of one host wait for each other's few kilobytes, and those of several: assumed, not measured.
WITHIN, ACROSS = 15e-6, 30e-6


@dataclass(frozen=True)
class System:
    """A model, and the devices that it is spread over."""

    model: str
    device: str
    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        """All of them."""
        return self.hosts * self.per_host


SYSTEMS = (
    System("llama-2-70b", "h100", 1, 8),
    System("llama-3.1-405b", "h100", 4, 8),
    System("llama-3.1-8b", "v5e-8", 1, 8),
)
KEEPS = (None, 0.4)


def measure(systems: tuple[System, ...] = SYSTEMS) -> Iterator[dict[str, Any]]:
    """One result per system and keep ratio; None is all neurons."""
    for system in systems:
        for keep in KEEPS:
            few, more = (read(system, keep, layers) for layers in LAYERS)
            L = shape_config(shape_fields(system.model, None)).num_layers
            whole = {name: few[name] + (L - LAYERS[0]) * (more[name] - few[name]) for name in few}
            described = {"model": system.model, "device": system.device, "hosts": system.hosts, "keep": keep}
            yield environment() | described | {"devices": system.devices, "layers": L} | whole


def read(system: System, keep: float | None, layers: int) -> dict[str, int]:
    """Of a decode step with so many layers: bytes that a device holds, times that devices wait, bytes they tell."""
    weights, rows = _arguments(system, keep, layers)
    platform = DEVICES[system.device].platform
    compiled = decode.trace(weights, rows, np.int32(0)).lower(lowering_platforms=(platform,)).compile()
    told = COLLECTIVE.findall(compiled.as_text())
    return {
        "bytes_per_device": int(compiled.memory_analysis().argument_size_in_bytes),
        "sums": sum(kind == "all-reduce" for _, kind, _ in told),
        "others": sum(kind != "all-reduce" for _, kind, _ in told),
        "told_bytes": sum(array_bytes(shape) for shape, _, _ in told),
    }


def _arguments(system: System, keep: float | None, layers: int) -> tuple[Params, Any]:
    """Weights and rows as shapes, where they are to lie."""
    found = np.array(devices_of(system.device, system.hosts, system.per_host))
    mesh = Mesh(found, (AXIS,), axis_types=(AxisType.Auto,))
    config = spread_config(shape_config(shape_fields(system.model, layers)), mesh)
    params: Params = _placed(replace(abstract_params(config, DTYPE), mesh=mesh), mesh)
    if keep is not None:
        indices = jax.ShapeDtypeStruct((kept_neurons(keep, config.mlp_size, system.devices),), jnp.int32)
        offsets = jax.ShapeDtypeStruct((config.hidden_size,), jnp.float32)
        sets: tuple[Any, Any] = (indices,) * layers, (offsets,) * layers
        params = _placed(narrowed_shapes(params, *sets), mesh)

    def rows() -> Any:
        cache, none = init_cache(config, 1, CAPACITY, DTYPE), jnp.zeros(1, jnp.int32)
        sampling = make_sampling(config, 1, GREEDY, CAPACITY)
        return first_drawn(cache, jnp.zeros((1, config.vocab_size)), none, none, sampling)

    return params, _placed(jax.eval_shape(rows), mesh)


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs(tree),
    )


def table() -> str:
    """What each system holds, tells and is bound by."""
    newest = {(own["model"], own["device"], own["keep"]): own for own in read_results("many-devices")}
    head = ["model", "devices", "neurons", "GB per device", "sums over devices per token", "KB told per token"]
    rows = [[*head, "bound, ms per token"]]
    for result in newest.values():
        kept = "all" if result["keep"] is None else f"{result['keep']:.0%}"
        hosts = "" if result["hosts"] == 1 else f" on {result['hosts']} hosts"
        waits = (result["sums"] + result["others"]) * (WITHIN if result["hosts"] == 1 else ACROSS)
        reading = result["bytes_per_device"] / DEVICES[result["device"]].bandwidth
        rows.append(
            [
                result["model"],
                f"{result['devices']} {result['device'].partition('-')[0]}{hosts}",
                kept,
                f"{result['bytes_per_device'] / 1e9:.1f}",
                f"{result['sums']}",
                f"{result['told_bytes'] / 1e3:.0f}",
                f"{1000 * (reading + waits):.1f}",
            ]
        )
    told = f"bfloat16, one row, a cache of {CAPACITY} positions; compiled with {LAYERS[0]} and {LAYERS[1]} layers"
    return f"{markdown(rows)}\n\n{told}; {made_on(*newest.values())}"
