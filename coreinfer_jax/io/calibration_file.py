"""The file beside a model's weights with what texts said of its neurons, and the setting found for it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import MOST_VOCABULARY, new_file, parse_json, read_back, read_bytes
from coreinfer_jax.io.held import load_arrays
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.sparsity.allocate import PARTS
from coreinfer_jax.sparsity.calibration import LINEAR_UP_TO, Calibration, Explained
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import chooser_of, settings_of
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.rules import Sums

CALIBRATION = "coreinfer-calibration.safetensors"
# Those that come with the package, of models that do not.
SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "calibrations"
VERSION = "3"
# Those before linear neurons are read as well.
READ_VERSIONS = ("2", VERSION)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# What is summed up of each neuron, and of all tokens.
_OF_NEURONS, _OF_TOKENS = ("total", "squares"), ("tokens", "weight")
# Of linear neurons, in 16 bits: fits are no more exact than that.
_HALF = ("directions", "slopes", "written")


def write_calibration(
    directory: Path, config: ModelConfig, fingerprint: str, calibration: Calibration, facts: Mapping[str, Any]
) -> None:
    """Write what was found for the model in `directory`; the file appears whole, in place of one that was there.

    Args:
        directory: of the model.
        config: of the model.
        fingerprint: of its stored weights.
        calibration: what was found.
        facts: how, in JSON's terms.

    Raises:
        CoreInferError: the disk is full or not writable; what was found is nothing that `read_calibration` takes.
    """
    arrays = _sums_as_arrays("layers", calibration.prior)
    if calibration.linear is not None:
        arrays |= _sums_as_arrays("unexplained", calibration.linear.prior)
        for l, fit in enumerate(calibration.linear.fits):
            arrays |= {f"linear.{l}.{name}": np.asarray(getattr(fit, name), np.float16) for name in _HALF}
            arrays[f"linear.{l}.constants"] = np.asarray(fit.constants, np.float32)
    assert calibration.gains is not None, "what calibrate finds is whole"
    arrays["gains"] = np.asarray(calibration.gains, np.float32)
    core = None if calibration.core is None else settings_of(calibration.core)
    metadata = {
        "format": "coreinfer_jax calibration",
        "version": VERSION,
        "model": fingerprint,
        "tokenizer": _tokenizer_digest(directory),
        "core": json.dumps(core),
        "linear_up_to": json.dumps(None if calibration.linear is None else calibration.linear.up_to),
        "facts": json.dumps(facts),
    }
    with new_file(directory / CALIBRATION) as partial:
        save_file(arrays, partial, metadata=metadata)
        with read_back(directory / CALIBRATION):
            _checked_file(partial, config)


def _sums_as_arrays(where: str, sums: Sequence[Sums]) -> dict[str, np.ndarray]:
    return {
        f"{where}.{l}.{name}": np.asarray(array, np.float32)
        for l, own in enumerate(sums)
        for name, array in own.items()
    }


def read_calibration(directory: Path, config: ModelConfig, fingerprint: Callable[[], str]) -> Calibration | None:
    """What lies in the directory of a model, or else comes with the package for it; None for none.

    Args:
        directory: of the model.
        config: of the model.
        fingerprint: gives that of the model, where it is needed.

    Raises:
        CoreInferError: it belongs to another model, is damaged, or of another version.
    """
    path = directory / CALIBRATION
    if not path.is_file():
        shipped = _shipped(config, fingerprint)
        return None if shipped is None else _checked_file(shipped, config)[1]
    metadata, calibration, _ = _checked_file(path, config)
    found = fingerprint()
    if metadata["model"] != found:
        raise CoreInferError(
            f"{path}: is of the model with fingerprint {shown_name(metadata['model'])}, but this one's is {found}; "
            "remove it, or calibrate this model"
        )
    if metadata["tokenizer"] != _tokenizer_digest(directory):
        raise CoreInferError(f"{path}: was made with another tokenizer than is there now; calibrate again or remove it")
    return calibration


def read_facts(
    directory: Path, config: ModelConfig, fingerprint: Callable[[], str]
) -> tuple[dict[str, Any] | None, Mapping[str, Any]] | None:
    """The setting found for a model, flat, and how; None where there is no calibration.

    Arguments and errors are those of `read_calibration`, but another model's calibration is not refused.
    """
    own = directory / CALIBRATION
    path = own if own.is_file() else _shipped(config, fingerprint)
    if path is None:
        return None
    _, calibration, facts = _checked_file(path, config)
    return None if calibration.core is None else settings_of(calibration.core), facts


def _shipped(config: ModelConfig, fingerprint: Callable[[], str]) -> Path | None:
    """The calibration that comes with the package for this model. Most models are told apart by their sizes."""
    for path in sorted(SHIPPED.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            sizes = [file.get_slice(name).get_shape() for name in ("gains", "layers.0.total")]
            if sizes == [[config.num_layers, PARTS], [config.mlp_size]] and file.metadata()["model"] == fingerprint():
                return path
    return None


def _checked_file(path: Path, config: ModelConfig) -> tuple[Mapping[str, str], Calibration, dict[str, Any]]:
    """What a file says of itself, what it holds, and how that was found: whatever is read or written is checked here.

    Raises:
        CoreInferError: it is damaged, of another version, or of a model of other sizes.
    """
    metadata, arrays = _read(path)
    try:
        return metadata, _calibration(metadata, arrays, config), _facts(metadata, config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    try:
        metadata, arrays = load_arrays(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error
    if metadata.get("format") != "coreinfer_jax calibration" or metadata.get("version") not in READ_VERSIONS:
        found = f"format {shown(metadata.get('format'))}, version {shown(metadata.get('version'))}"
        raise CoreInferError(
            f"{path}: {found}; this release reads versions {' and '.join(READ_VERSIONS)}, calibrate again or remove it"
        )
    if not {"model", "tokenizer", "core", "facts"} <= set(metadata):
        raise _damaged(path, ValueError("its header is incomplete"))
    return metadata, arrays


def _tokenizer_digest(directory: Path) -> str:
    """SHA-256 of the vocabulary in `directory`; templates and names of special tokens change nothing of it."""
    digest = hashlib.sha256()
    for name in VOCABULARY_FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + _vocabulary_bytes(directory / name))
    return digest.hexdigest()


def _vocabulary_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_VOCABULARY)
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; make it readable") from error


def _damaged(path: Path, error: Exception) -> CoreInferError:
    return CoreInferError(f"{path}: damaged calibration ({shown_name(str(error))}); calibrate again or remove it")


def _core(metadata: Mapping[str, str]) -> Chooser | None:
    settings = parse_json(metadata["core"])
    return None if settings is None else chooser_of(settings)


def _facts(metadata: Mapping[str, str], config: ModelConfig) -> dict[str, Any]:
    """How a calibration was found; raises ValueError or the like unless that can be told to people."""
    facts = dict(parse_json(metadata["facts"]))
    kept, linear = facts.get("kept_neurons") or (), facts.get("linear_neurons") or ()
    bounds, speed = facts.get("bound", {}), facts.get("speed") or {"core": 0, "all": 0, "dtype": "", "device": ""}
    numbers = [*(bound for bound in bounds.values() if bound is not None), speed["core"], speed["all"]]
    texts = [facts.get("data", ""), speed["dtype"], speed["device"]]
    if not all(type(count) is int and 0 <= count <= config.mlp_size for count in (*kept, *linear)):
        raise ValueError("its facts hold numbers of neurons that are none")
    if not all(type(number) in (int, float) for number in numbers) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its facts hold a bound, a time or a name that is none")
    np.array(numbers, np.float64)  # raises for integers of hundreds of digits, which cannot be shown
    return facts


def _calibration(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray], config: ModelConfig) -> Calibration:
    prior = _sums("layers", arrays, config)
    gains = _checked(arrays["gains"], (config.num_layers, PARTS))
    if (np.diff(gains, axis=1) > 0).any():
        raise ValueError("gains that rise along a layer")
    return Calibration(prior, gains, _core(metadata), _explained(metadata, arrays, config))


def _sums(where: str, arrays: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[Sums, ...]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_OF_NEURONS, (config.mlp_size,)) | dict.fromkeys(_OF_TOKENS, ())
    found = tuple(
        {name: jnp.asarray(_checked(arrays[f"{where}.{l}.{name}"], shape)) for name, shape in shapes.items()}
        for l in range(config.num_layers)
    )
    # A layer that writes nothing gives its tokens no weight.
    if not all((sums["tokens"] > 0) & (sums["weight"] >= 0) & (sums["squares"] >= 0).all() for sums in found):
        raise ValueError("sums over no tokens, or negative ones")
    return found


def _explained(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray], config: ModelConfig) -> Explained | None:
    """The linear neurons that a file holds; None for none, as in those of version 2."""
    if "linear.0.directions" not in arrays:
        return None
    r, D, F = len(arrays["linear.0.directions"]), config.hidden_size, config.mlp_size
    shapes = {"directions": (r, D), "slopes": (r, F), "written": (D, r)}
    fits = tuple(
        LinearFit(
            constants=jnp.asarray(_checked(arrays[f"linear.{l}.constants"], (F,))),
            **{
                name: jnp.asarray(_checked(arrays[f"linear.{l}.{name}"], shape, np.float16))
                for name, shape in shapes.items()
            },
        )
        for l in range(config.num_layers)
    )
    up_to = float(json.loads(metadata.get("linear_up_to", str(LINEAR_UP_TO))))
    if not 0 <= up_to <= 1:
        raise ValueError(f"linear neurons up to {up_to} of a layer")
    return Explained(fits, _sums("unexplained", arrays, config), up_to)


def _checked(array: np.ndarray, shape: tuple[int, ...], dtype: type[np.floating[Any]] = np.float32) -> np.ndarray:
    """Raise ValueError unless these are finite numbers of the shape and type."""
    if array.shape != shape or array.dtype != dtype or not np.isfinite(array).all():
        raise ValueError(f"an array of shape {array.shape}, {array.dtype}, for {shape} finite {np.dtype(dtype)}")
    return array
