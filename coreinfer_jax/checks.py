"""Checks of single settings, each with the one line that a user reads."""

import re
from collections.abc import Sequence
from numbers import Real

import numpy as np
from jax import Array

from coreinfer_jax.errors import CoreInferError, shown


def check_fraction(name: str, value: float) -> None:
    """Refuse a share outside (0, 1]; `not` catches NaN as well."""
    if not isinstance(value, Real) or not 0 < value <= 1:
        raise CoreInferError(f"{name}={shown(value)}: give a share above 0 and at most 1")


def check_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1]; `not` catches NaN as well."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise CoreInferError(f"{name}={shown(value)}: give a share from 0 to 1")


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Refuse what is no number from `least` to `most`; `not` catches NaN as well."""
    if not isinstance(value, Real) or not least <= value <= most:
        raise CoreInferError(f"{name}={shown(value)}: give a number from {least:g} to {_power(most)}")


def _power(value: float) -> str:
    return f"{value:g}".replace("e+0", "e")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CoreInferError(f"{name}={shown(value)}: give a whole number of at least {least}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise CoreInferError(f"{name}={shown(value)}: give True or False")


def check_name(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a name that is none of `known`."""
    if not isinstance(value, str) or value not in known:
        raise CoreInferError(f"{name}={shown(value)}: give {', '.join(map(repr, known))}")


_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base ** (i + 1)
    for base, ending in ((1000, "b"), (1024, "ib"))
    for i, prefix in enumerate("kmgt")
}


def parse_bytes(name: str, value: object) -> int:
    """Bytes, of a whole number or of text such as `12GiB`, `800 MB` or `0.5TiB`.

    Raises:
        CoreInferError: none of these, or nothing.
    """
    found = (
        re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(value))
        if not isinstance(value, bool)
        else None
    )
    unit = None if found is None else _UNITS.get(found[2].lower())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size < 1:
        raise CoreInferError(f"{name}={shown(value)}: give bytes, as a whole number or such as 12GiB or 800MB")
    return size


def check_finite(finite: Array | np.bool_, what: str = "logits") -> None:
    """Refuse to go on from logits, or other numbers named in `what`, that are not all `finite`, bool []."""
    if not bool(finite):
        raise CoreInferError(
            f"{what} are NaN or infinite: check the checkpoint, or use --dtype float32 (dtype='float32')"
        )
