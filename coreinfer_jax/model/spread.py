"""`spread`: a model's weights over the devices of a mesh."""

from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.shards import check_mesh, place, shards_of
from coreinfer_jax.model.weights import Layer, Linear, Params, check_dense


def spread(params: Params, mesh: Mesh) -> Params:
    """`params` over the devices of `mesh`: each holds its own heads, neurons and rows of the vocabulary.

    All of the package computes with them as with those of one device, which hold the same numbers. Where there are
    fewer key/value heads than devices, several of these hold the same one.

    Args:
        params: dense weights on one device.
        mesh: from `make_mesh`.

    Raises:
        CoreInferError: heads or neurons that so many devices cannot share equally; weights that are narrowed to core
            neurons, or spread already.
    """
    check_dense(params)
    check_on_device(params, "spread")
    if params.mesh is not None:
        raise CoreInferError(
            f"params are spread over {params.shards} devices already: give those of one device, or load them with mesh="
        )
    config = spread_config(params.config, mesh)
    times = config.num_kv_heads // params.config.num_kv_heads
    layers = tuple(_with_heads(layer, params.config.num_kv_heads, times) for layer in params.layers)
    whole = replace(params, layers=layers, config=config, mesh=mesh)
    placed: Params = place(whole.weights, mesh)
    return replace(placed, calibration=spread_calibration(params.calibration, mesh))


def spread_calibration(known: Any, mesh: Mesh) -> Any:
    """What is known of neurons (a `Calibration`, or None), each device that of its own; gains stay on the host."""
    return None if known is None else replace(place(known, mesh), gains=known.gains)


def spread_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model as it is over devices: with at least one key/value head for each.

    Raises:
        CoreInferError: as `spread`.
    """
    check_mesh(mesh)
    n, N, G = shards_of(mesh), config.num_heads, config.num_kv_heads
    wrong = []
    if N % n:
        wrong.append(f"{N} query heads")
    if max(G, n) % min(G, n):
        wrong.append(f"{G} key/value heads")
    if config.mlp_size % n:
        wrong.append(f"{config.mlp_size} MLP neurons")
    if wrong:
        fitting = [size for size in range(1, N + 1) if _fits(config, size)]
        raise CoreInferError(
            f"tensor={n}: {n} devices cannot share {' and '.join(wrong)} equally; "
            f"this model can be spread over {', '.join(map(str, fitting))}"
        )
    return replace(config, num_kv_heads=max(G, n))


def _fits(config: ModelConfig, n: int) -> bool:
    G = config.num_kv_heads
    return config.num_heads % n == 0 and config.mlp_size % n == 0 and max(G, n) % min(G, n) == 0


def _with_heads(layer: Layer, heads: int, times: int) -> Layer:
    if times == 1:
        return layer
    key, value = (
        Linear(
            weight=repeated(linear.weight, heads, times),
            bias=None if linear.bias is None else repeated(linear.bias, heads, times),
        )
        for linear in (layer.attention.key, layer.attention.value)
    )
    return replace(layer, attention=replace(layer.attention, key=key, value=value))


def repeated(rows: Any, heads: int, times: int) -> Any:
    """Rows of `heads` (G) heads, an array [G H, ...] of NumPy or JAX, each head's `times` behind each other."""
    return rows.reshape(heads, -1).repeat(times, axis=0).reshape(-1, *rows.shape[1:])
