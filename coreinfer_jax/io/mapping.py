"""Which stored tensor fills which leaf of `Params`, with everything that does not fit reported at once."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from coreinfer_jax.errors import CoreInferError, listed, shown_name
from coreinfer_jax.io.tensors import StoredTensor, StoredTensors
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import family_of
from coreinfer_jax.model.host import HostArray
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import named_leaves

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# Values looked at, or cast, at once.
CHUNK = 1 << 24


def parse_dtype(dtype: object) -> np.dtype:
    """`float32`, `bfloat16` or `float16`, as a name or anything NumPy takes for one of them."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name  # type: ignore[call-overload]
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise CoreInferError(f"dtype={shown_name(name)}: give {', '.join(DTYPES)}")
    return DTYPES[name]


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every leaf of a model's `Params`."""
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract_params(config, jnp.dtype(jnp.float32)))}


def map_tensors(stored: StoredTensors, config: ModelConfig, where: str) -> dict[str, StoredTensor]:
    """Leaf name -> stored tensor, for every leaf of the model.

    Args:
        stored: a checkpoint's tensors.
        config: the model its config.json describes.
        where: named in errors.

    Raises:
        CoreInferError: tensors missing, left over or of the wrong shape, all in one error; a tied output projection
            that differs from the embedding.
    """
    check_layers(config, len(stored.tensors), where)
    available = _without_prefix(stored, where)
    available = {name: tensor for name, tensor in available.items() if not _ignored(name, config)}
    if config.tied:
        available = _untie(available, config, where)
    wanted = source_names(config)
    missing = sorted(set(wanted.values()) - set(available))
    extra = sorted(set(available) - set(wanted.values()))
    found = _filled(available, wanted, leaf_shapes(config))
    check_fit(found, config, missing, extra, where)
    return found


def _filled(
    available: Mapping[str, StoredTensor], wanted: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """Leaf name -> its tensor, as far as there is one, or its rows of the tensor that it shares with other leaves."""
    leaves = {source: [leaf for leaf in wanted if wanted[leaf] == source] for source in shared_names(wanted)}
    found = {leaf: available[source] for leaf, source in wanted.items() if source in available}
    for source, parts in leaves.items():
        whole = available.get(source)
        if whole is None or not whole.shape:
            continue
        ends = [0, *accumulate(shapes[leaf][0] for leaf in parts)]
        ends[-1] = max(whole.shape[0], ends[-2])  # what is missing or left over shows in the last
        found |= {leaf: _rows(whole, *ends[i : i + 2]) for i, leaf in enumerate(parts)}
    return found


def shared_names(names: Mapping[str, str]) -> list[str]:
    """The names in checkpoints that hold several leaves."""
    return [name for name, leaves in Counter(names.values()).items() if leaves > 1]


def _rows(whole: StoredTensor, start: int, end: int) -> StoredTensor:
    """Rows `start` to before `end` of a tensor, and their share of its bytes."""
    rows, by_rows = end - start, whole.read_rows
    stored = whole.stored and (whole.stored[0], whole.stored[1] * rows // max(1, whole.shape[0]))
    found = StoredTensor((rows, *whole.shape[1:]), whole.dtype, lambda: whole.read()[start:end].copy(), stored)
    if by_rows is None:
        return found
    return replace(
        found,
        read=lambda: by_rows(start, end),
        read_rows=lambda first, last: by_rows(start + first, start + last),
    )


def check_layers(config: ModelConfig, tensors: int, where: str) -> None:
    """Refuse more layers than there are tensors, before any work that grows with their number."""
    if config.num_layers > tensors:
        raise CoreInferError(
            f"{where}: the weights do not fit config.json: {tensors} tensors cannot fill {config.num_layers} layers"
        )


def check_fit(
    found: Mapping[str, StoredTensor], config: ModelConfig, missing: list[str], extra: list[str], where: str
) -> None:
    """Refuse a checkpoint with tensors missing, left over or of the wrong shape, naming them all in one error."""
    shapes = leaf_shapes(config)
    problems = [f"missing {shown_name(name)}" for name in missing]
    problems += [f"unexpected {shown_name(name)}" for name in extra]
    problems += [
        f"{leaf} has shape {list(tensor.shape)} instead of {list(shapes[leaf])}"
        for leaf, tensor in found.items()
        if tensor.shape != shapes[leaf]
    ]
    if problems:
        raise CoreInferError(f"{where}: the weights do not fit config.json: {listed(_by_layer(problems), '; ')}")


def _by_layer(problems: list[str]) -> list[str]:
    """`problems` with those that differ only in the layer's number told once, with all its numbers."""
    layers: dict[str, list[str]] = {}
    for problem in problems:
        number = re.search(r"\blayers\.(\d+)\.", problem)
        template = problem if number is None else problem.replace(number[0], "layers.{l}.", 1)
        layers.setdefault(template, []).append("" if number is None else number[1])
    return [template.replace("{l}", listed(numbers, "|")) for template, numbers in layers.items()]


def _without_prefix(stored: StoredTensors, where: str) -> dict[str, StoredTensor]:
    """Tensors and aliases under names without a leading `model.`."""
    named = dict(stored.tensors)
    named |= {alias: stored.tensors[target] for alias, target in stored.aliases.items() if alias not in named}
    plain = {name.removeprefix("model."): tensor for name, tensor in named.items()}
    if len(plain) < len(named):
        twice = sorted(name for name in named if name.startswith("model.") and name.removeprefix("model.") in named)
        raise CoreInferError(
            f"{where}: {shown_name(twice[0])} is stored with and without its leading 'model.'; keep one"
        )
    return plain


def _ignored(name: str, config: ModelConfig) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family_of(config).ignored_tensors)


def _untie(available: dict[str, StoredTensor], config: ModelConfig, where: str) -> dict[str, StoredTensor]:
    """Without the output projection of a tied model, which may stand in for the embedding but must equal it."""
    names = family_of(config).tensors
    head = available.pop(names["unembedding"], None)
    if head is None:
        return available
    embedding = available.setdefault(names["token_embedding"], head)
    if embedding is not head and not _equal(embedding, head):
        raise CoreInferError(
            f"{where}: tie_word_embeddings is true but {names['unembedding']} differs from {names['token_embedding']}; "
            "set it to false in config.json if the model was trained untied"
        )
    return available


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    return first.shape == second.shape and np.array_equal(first.read(), second.read())


def source_names(config: ModelConfig) -> dict[str, str]:
    """Leaf name -> its name in the family's checkpoints."""
    table, names = family_of(config).tensors, {}
    for leaf in leaf_shapes(config):
        layer = re.match(r"layers\.(\d+)\.", leaf)
        template = leaf if layer is None else leaf.replace(layer[0], "layers.{l}.", 1)
        names[leaf] = table[template].format(l=layer[1] if layer else None)
    return names


def read_as(tensor: StoredTensor, name: str, dtype: np.dtype, where: str) -> np.ndarray:
    """A stored tensor in `dtype`. A large one is read and cast by rows, so that it is not held in both types.

    Raises:
        CoreInferError: it holds NaN or infinity, or values beyond the range of `dtype`.
    """
    if tensor.read_rows is None or prod(tensor.shape) <= CHUNK:
        return _cast(tensor.read(), name, dtype, where)
    array = np.empty(tensor.shape, dtype)
    rows = max(1, CHUNK // prod(tensor.shape[1:]))
    for begin in range(0, tensor.shape[0], rows):
        end = min(begin + rows, tensor.shape[0])
        array[begin:end] = _cast(tensor.read_rows(begin, end), name, dtype, where)
    return array


def host_array(tensor: StoredTensor, dtype: np.dtype, pinned: Array | None = None) -> HostArray:
    """A stored tensor in `dtype` that is read when it is needed; its values are looked at by nobody before."""

    def cast(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what is infinite then shows in the logits
            return array.astype(dtype, copy=False)

    by_rows = tensor.read_rows
    if by_rows is None:
        return HostArray(tensor.shape, dtype, lambda: cast(tensor.read()), pinned=pinned)

    def read_rows(begin: int, end: int) -> np.ndarray:
        return cast(by_rows(begin, end))

    return HostArray(tensor.shape, dtype, lambda: read_rows(0, tensor.shape[0]), read_rows, pinned)


def _cast(array: np.ndarray, name: str, dtype: np.dtype, where: str) -> np.ndarray:
    """`array` in `dtype`; raises as `read_as`."""
    if not all_finite(array):
        raise CoreInferError(f"{where}: {name} holds NaN or infinity; the checkpoint is damaged, download it again")
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not all_finite(cast):
        raise CoreInferError(f"{where}: {name} exceeds the range of {dtype}; choose bfloat16 or float32")
    return cast


def all_finite(array: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite, a slice at a time so that no large temporary arises."""
    flat = array.reshape(-1)
    return all(_finite(flat[i : i + CHUNK]) for i in range(0, flat.size, CHUNK))


def _finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # exponent bits all set; NumPy's isfinite is ten times slower here
        return bool(((values.view(np.uint16) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())


def count_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """Bytes of a model's weights in `dtype`."""
    return sum(prod(shape) for shape in leaf_shapes(config).values()) * dtype.itemsize
