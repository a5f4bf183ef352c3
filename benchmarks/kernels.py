"""One row times one weight, in the forms that a decode step could take: how fast each reads every weight of a model.

A program multiplies the row by many weights of one shape in turn, together larger than any cache, again and again in
one loop, so that neither the cache nor the start of the program decides. Every form is compared with NumPy first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm import tqdm

from benchmarks import mosaic
from benchmarks.environment import environment, read_results, spread
from benchmarks.memory import bandwidth
from benchmarks.profile import matrices
from benchmarks.shapes import shape_config, shape_fields
from benchmarks.tables import made_on, markdown
from coreinfer_jax.checks import check_fraction
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.backends import DECODE_OPTIONS, matmul
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.sparsity.narrow import narrowed_shapes
from coreinfer_jax.sparsity.votes import kept_neurons

# Bytes of weights that a loop's turn reads, several times a GPU's cache, and at most so many weights.
TURN_BYTES, MOST_WEIGHTS = 1 << 29, 32
# Bytes that a measured call reads: some milliseconds on a GPU.
CALL_BYTES = {"cpu": 1 << 30, "gpu": 1 << 34}
# Sums in float32 come this close to exact ones, as a share of the sum of the products' sizes.
TOLERANCE = 2e-5
CHECKED_ROWS = 256


@dataclass(frozen=True)
class Form:
    """A way to multiply one row by a weight.

    Attributes:
        product: x [1, in] times weight [out, in]: float32 [1, out].
        options: of the compiler, besides those of every decode program.
        on_cpu: whether a CPU has it too.
        fits: whether it takes a weight.
    """

    product: Callable[[Array, Array], Array]
    options: Mapping[str, str | bool | int] = field(default_factory=dict)
    on_cpu: bool = False
    fits: Callable[[jax.ShapeDtypeStruct], bool] = lambda weight: True


def _as_decoding(x: Array, weight: Array) -> Array:
    return matmul(x[None], weight)[0]


def _matrix_product(x: Array, weight: Array) -> Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _two_rows(x: Array, weight: Array) -> Array:
    # Of a single row XLA makes a vector, for which cuBLAS is given a float32 copy of the weight, in every turn.
    return _matrix_product(jnp.concatenate([x, x]), weight)[:1]


FORMS: dict[str, Form] = {
    "as decoding": Form(_as_decoding, on_cpu=True),  # on a GPU: products and their sums
    "matrix product": Form(_matrix_product, on_cpu=True),
    "cuBLAS": Form(_two_rows, {"xla_gpu_enable_triton_gemm": False}),
    # 0 lets XLA choose in how many parts the inputs are multiplied, which are then added up by a second kernel.
    "not split": Form(_matrix_product, {"xla_gpu_experimental_force_split_k": 1}),
    "Mosaic GPU": Form(mosaic.matvec, fits=mosaic.fits),
}


def measure(model: str, layers: int | None, dtype: str, keep: float, rounds: int) -> Iterator[dict[str, Any]]:
    """A result for every shape of the model's weights, the largest share of a step first.

    Raises:
        CoreInferError: an unknown model, a keep ratio that is no share, fewer than one round, or forms that failed,
            after all others were measured.
    """
    check_fraction("--keep", keep)
    if rounds < 1:
        raise CoreInferError(f"--rounds {rounds}: give at least 1")
    config = shape_config(shape_fields(model, layers))
    common = environment() | {
        "benchmark": "kernels",
        "model": model,
        "layers": config.num_layers,
        "model_layers": shape_config(shape_fields(model, None)).num_layers,
        "dtype": dtype,
        "keep": keep,
        "rounds": rounds,
    }
    failed = []
    for (out, size), counts in shapes(config, dtype, keep).items():
        weight = jax.ShapeDtypeStruct((out, size), jnp.dtype(dtype))
        found, failures = _of_shape(weight, rounds)
        failed += [f"{out} x {size}, {failure}" for failure in failures]
        yield common | {"shape": f"{out} x {size}"} | counts | found
    if failed:
        raise CoreInferError(f"left out: {'; '.join(failed)}")


def shapes(config: ModelConfig, dtype: str, keep: float) -> dict[tuple[int, int], dict[str, int]]:
    """Every [out, in] that a step multiplies by, and how often it does so with all neurons and with core neurons."""
    params = abstract_params(config, jnp.dtype(dtype))
    L, D, K = config.num_layers, config.hidden_size, kept_neurons(keep, config.mlp_size)
    indices: Any = (jax.ShapeDtypeStruct((K,), jnp.int32),) * L
    offsets: Any = (jax.ShapeDtypeStruct((D,), jnp.float32),) * L
    kept = narrowed_shapes(params, indices, offsets)
    whole, narrowed = matrices(params), matrices(kept)
    either = whole | narrowed
    by_bytes = sorted(either, key=lambda shape: -either[shape][1])
    return {
        _sizes(shape): {
            "matrices_all": whole.get(shape, (0, 0))[0],
            "matrices_kept": narrowed.get(shape, (0, 0))[0],
        }
        for shape in by_bytes
    }


def _sizes(shape: str) -> tuple[int, int]:
    out, size = shape.split(" x ")
    return int(out), int(size)


def _of_shape(weight: jax.ShapeDtypeStruct, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """What every form reaches with weights like `weight`, and why some failed."""
    one = weight.size * weight.dtype.itemsize
    count = min(MOST_WEIGHTS, max(2, -(-TURN_BYTES // one)))
    turns = max(1, CALL_BYTES[_kind()] // (one * count))
    seconds, failures = _measured(weight, count, turns, rounds)
    plain = bandwidth()
    speeds = {name: [turns * count * one / second for second in own] for name, own in seconds.items()}
    forms = {
        name: {
            "gb_per_second": spread([speed / 1e9 for speed in own]),
            "bandwidth_share": spread([speed / plain for speed in own]),
        }
        for name, own in speeds.items()
    }
    sizes = {"weights": count, "turns": turns, "bytes_per_weight": one, "plain_gb_per_second": plain / 1e9}
    return sizes | {"forms": forms}, failures


def _measured(
    weight: jax.ShapeDtypeStruct, count: int, turns: int, rounds: int
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of every round and form, each reading `count` weights `turns` times, and why some failed."""
    x = jax.random.normal(jax.random.key(count), (1, weight.shape[1]), weight.dtype)
    weights = tuple(_random(key, weight.shape, weight.dtype) for key in range(count))
    before = [jnp.zeros((1, weight.shape[0]), jnp.float32)] * count
    loops: dict[str, Any] = {}
    failures = []
    for name, form in FORMS.items():
        if form.fits(weight) and (form.on_cpu or _kind() == "gpu"):
            loop = program(form)
            try:
                _check(x, weights, loop(x, weights, before, 1))
            except Exception as error:  # what Pallas, Mosaic and XLA raise where they cannot compile differs
                failures.append(f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
            else:
                loops[name] = partial(loop, x, weights, before, turns)
    names, seconds = list(loops), {name: list[float]() for name in loops}
    bar = tqdm(total=rounds * len(names), desc=f"{weight.shape[0]} x {weight.shape[1]}", disable=None)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            seconds[name].append(_seconds(loops[name]))
            bar.update()
    bar.close()
    return seconds, failures


def _kind() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def program(form: Form) -> Any:
    """The jitted loop of a form: `_turns` without its first argument."""
    options = DECODE_OPTIONS | dict(form.options)
    return jax.jit(partial(_turns, form.product), compiler_options=options)


def _turns(
    product: Callable[[Array, Array], Array], x: Array, weights: Sequence[Array], before: Sequence[Array], turns: Array
) -> list[Array]:
    """The products of x [1, in] with every weight, made anew `turns` times.

    Each waits for the one before, the first of a turn for the last of the turn before. So none are joined, and none is
    taken out of the loop.
    """

    def turn(_: Array, made: list[Array]) -> list[Array]:
        row, last, new = x, made[-1], []
        for weight in weights:
            row, last = lax.optimization_barrier((row, last))
            new.append(last)
            last = product(row, weight)
        return [*new[1:], last]

    return lax.fori_loop(0, turns, turn, list(before))


def _check(x: Array, weights: Sequence[Array], made: Sequence[Array]) -> None:
    """Raise a CoreInferError unless what was `made` is near NumPy's products, of rows all over each weight."""
    for weight, product in zip(weights, made, strict=True):
        rows = np.unique(np.linspace(0, weight.shape[0] - 1, CHECKED_ROWS).astype(int))
        exact = np.asarray(weight[rows], np.float64) * np.asarray(x, np.float64)
        off = np.abs(np.asarray(product[0, rows], np.float64) - exact.sum(axis=1)) / np.abs(exact).sum(axis=1)
        if not off.max() <= TOLERANCE:
            raise CoreInferError(f"differs from NumPy by {off.max():.1e} of the products' sizes")


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key: int, shape: tuple[int, int], dtype: Any) -> Array:
    return jax.random.normal(jax.random.key(key), shape, dtype) * jnp.asarray(0.02, dtype)


def _seconds(call: Callable[[], Any]) -> float:
    began = perf_counter()
    jax.block_until_ready(call())
    return perf_counter() - began


def table() -> str:
    """The newest results of every model, type and machine, for docs/performance.md."""
    newest: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for result in read_results("kernels"):
        if result["hardware"].endswith("cpu"):
            continue
        key = (result["model"], str(result["layers"]), result["dtype"], str(result["keep"]), result["hardware"])
        newest.setdefault(key, {})[result["shape"]] = result
    if not newest:
        return "Nothing was measured on a GPU yet."
    return "\n\n".join(_table(list(results.values())) for results in newest.values())


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["forms"]))
    first = results[0]
    rows = [["weight, out x in", "all neurons", f"keep {first['keep']:g}", "copies, GB/s", *names]]
    for result in results:
        cells = [_cell(result["forms"].get(name)) for name in names]
        counts = [str(result[count]) for count in ("matrices_all", "matrices_kept")]
        rows.append([result["shape"], *counts, f"{result['plain_gb_per_second']:.0f}", *cells])
    for what, count in (("all neurons", "matrices_all"), (f"keep {first['keep']:g}", "matrices_kept")):
        rows.append([f"all products of a step, {what}: ms", "", "", "", *(_sum(results, count, n) for n in names)])
    title = f"{first['model']} shape, {first['layers']} layers, {first['dtype']}, {first['rounds']} rounds"
    return f"{markdown(rows)}\n\n{title}; {made_on(*results)}"


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['gb_per_second']['median']:.0f}, {found['bandwidth_share']['median']:.0%}"


def _sum(results: Sequence[Mapping[str, Any]], count: str, name: str) -> str:
    """Milliseconds of all products of a step in one form; empty where a shape lacks it."""
    used = [result for result in results if result[count]]
    if any(name not in result["forms"] for result in used):
        return ""
    speeds = [result["forms"][name]["gb_per_second"]["median"] for result in used]
    seconds = [r[count] * r["bytes_per_weight"] / 1e9 / speed for r, speed in zip(used, speeds, strict=True)]
    return f"{1000 * sum(seconds):.2f}"
