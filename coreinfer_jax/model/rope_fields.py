"""Rotary positions in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""

from collections.abc import Mapping
from typing import Any

from coreinfer_jax.errors import shown, shown_name
from coreinfer_jax.model.config import Rope
from coreinfer_jax.model.config_fields import Fields, is_number

ROPE_FIELDS = ("rope_parameters", "rope_scaling")
# The numbers that each kind of scaling must state.
_NUMBERS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_ORIGINAL = "original_max_position_embeddings"
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, *_NUMBERS["llama3"]}


def rope_problems(fields: Fields) -> list[str]:
    """What is not implemented or contradicts itself, each in a few words."""
    given = [name for name in ROPE_FIELDS if fields.get(name)]
    found = [problem for name in given for problem in _problems(name, fields[name])]
    if found:
        return found
    stated = [_stated(fields[name]) for name in given]
    bases = [base for base in (fields.get("rope_theta"), *(one.get("rope_theta") for one in stated)) if base]
    if any(_scaling(one) != _scaling(stated[0]) for one in stated):
        found.append("rope_parameters and rope_scaling together, which disagree (keep one)")
    if any(base != bases[0] for base in bases):
        found.append(f"rope_theta={' and '.join(map(shown, bases))} together (keep one)")
    return found


def _problems(spelling: str, settings: object) -> list[str]:
    if not isinstance(settings, Mapping):
        return [f"{spelling}={shown(settings)} (give an object)"]
    settings = _stated(settings)
    kind = _kind(settings)
    found = []
    if kind == "default" and settings.get("factor", 1.0) != 1.0:
        found.append(f"{spelling} with a factor but without a type")
    if not isinstance(kind, str) or kind not in _NUMBERS:
        found.append(f"{spelling} of type {shown(kind)} (only {', '.join(map(repr, _NUMBERS))})")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"{spelling} with partial_rotary_factor={shown(settings['partial_rotary_factor'])}")
    found += [
        f"{spelling}.{name}={shown(settings[name])} (give a number above 0)"
        for name in ("rope_theta", _ORIGINAL)
        if not is_number(settings.get(name, 1))
    ]
    if kind == "llama3" and settings.get("low_freq_factor") == settings.get("high_freq_factor"):
        found.append(f"{spelling} with low_freq_factor equal to high_freq_factor")
    wanted = _NUMBERS.get(str(kind), ())
    found += [
        f"{spelling} of type {kind!r} without a number {name!r}" for name in wanted if not is_number(settings.get(name))
    ]
    return found + [f"{spelling}.{shown_name(name)}={shown(settings[name])}" for name in settings if name not in _KNOWN]


def _stated(settings: Fields) -> Fields:
    """Settings without those that are null, which is how absence is written."""
    return {name: value for name, value in settings.items() if value is not None}


def _kind(settings: Fields) -> Any:
    return settings.get("rope_type", settings.get("type", "default"))


def _scaling(settings: Fields) -> list[object]:
    """All that settings without problems say of scaling."""
    kind = _kind(settings)
    return [kind, *(settings[name] for name in _NUMBERS[kind]), settings.get(_ORIGINAL) if kind == "llama3" else None]


def read_rope(fields: Fields, default_theta: float) -> Rope:
    """The rotary positions that fields without problems state."""
    given = [_stated(fields[name]) for name in ROPE_FIELDS if fields.get(name)]
    bases = [base for base in (fields.get("rope_theta"), *(one.get("rope_theta") for one in given)) if base]
    theta = float(bases[0] if bases else default_theta)
    settings = given[0] if given else {}
    kind = _kind(settings)
    if kind == "default":
        return Rope(theta=theta)
    scaled: dict[str, Any] = {name: float(settings[name]) for name in _NUMBERS[kind]}
    if kind == "llama3":
        original = settings.get(_ORIGINAL) or fields.get("max_position_embeddings", 2048)
        return Rope(theta=theta, scaling="llama3", original_max_positions=int(original), **scaled)
    return Rope(theta=theta, scaling="linear", **scaled)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The same in the older spelling, which every release of transformers reads."""
    return {"rope_theta": rope.theta, "rope_scaling": _written_scaling(rope)}


def _written_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling = {"rope_type": rope.scaling} | {name: getattr(rope, name) for name in _NUMBERS[rope.scaling]}
    return scaling | ({_ORIGINAL: rope.original_max_positions} if rope.scaling == "llama3" else {})
