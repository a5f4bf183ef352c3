"""Rotary positions in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

from coreinfer_jax.errors import shown, shown_name
from coreinfer_jax.model.config import Rope
from coreinfer_jax.model.config_fields import Fields, is_count, is_number

ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"
# What `rope_problems` checks. Settings may state the original length, or config.json beside them.
ROPE_CHECKED = (*ROPE_FIELDS, _ORIGINAL)
KINDS = ("default", "linear", "llama3")
# The numbers that each kind of scaling must state.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": (),
}
_LISTS = ("short_factor", "long_factor")
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, *_NUMBERS["llama3"]}
_OF_LONGROPE = (*_LISTS, "factor", "attention_factor")


def rope_problems(fields: Fields, kinds: tuple[str, ...] = KINDS, is_partial: bool = False) -> list[str]:
    """What is not implemented or contradicts itself, each in a few words.

    Args:
        fields: of config.json.
        kinds: of scaling that the family has.
        is_partial: whether a part of each head may be all that rotates.
    """
    given = [name for name in ROPE_FIELDS if fields.get(name)]
    found = [*_part_problems(fields)] if is_partial else []
    found += [problem for name in given for problem in _problems(name, fields[name], kinds, is_partial)]
    if found:
        return found
    stated = [_stated(fields[name]) for name in given]
    bases = [base for base in (fields.get("rope_theta"), *(one.get("rope_theta") for one in stated)) if base]
    if any(_scaling(one) != _scaling(stated[0]) for one in stated):
        found.append("rope_parameters and rope_scaling together, which disagree (keep one)")
    if any(base != bases[0] for base in bases):
        found.append(f"rope_theta={' and '.join(map(shown, bases))} together (keep one)")
    found += [problem for name in given for problem in _original_problems(fields, name)]
    return found or [problem for name in given for problem in _longrope_problems(fields, name)]


def _part_problems(fields: Fields) -> list[str]:
    """What is wrong with the share of a head's entries that rotate."""
    *parts, _ = _parts(fields)
    if all(part == parts[0] <= 1 for part in parts) and rotated_pairs(fields) != 0:
        return []
    return [f"partial_rotary_factor={' and '.join(map(shown, parts))}"]


def _original_problems(fields: Fields, spelling: str) -> list[str]:
    """What is wrong with the length that the unscaled model was trained with, for those kinds that need it."""
    settings = _stated(fields[spelling])
    if _kind(settings) not in ("llama3", "longrope"):
        return []
    places = [fields, *(fields[name] for name in ROPE_FIELDS if fields.get(name))]
    lengths = [one[_ORIGINAL] for one in places if one.get(_ORIGINAL) is not None]
    if not all(map(is_count, lengths)):
        return [f"{spelling} with {_ORIGINAL}={' and '.join(map(shown, lengths))} (give a whole number above 0)"]
    if _kind(settings) == "llama3" and _ORIGINAL in fields and _ORIGINAL not in settings:
        return [f"{_ORIGINAL}={lengths[0]} beside {spelling} of type 'llama3' (state it within)"]
    return [f"{_ORIGINAL}={' and '.join(map(shown, lengths))} together (keep one)"] if len(set(lengths)) > 1 else []


def _longrope_problems(fields: Fields, spelling: str) -> list[str]:
    """What is wrong with the settings that only LongRoPE has."""
    settings = _stated(fields[spelling])
    if _kind(settings) != "longrope":
        return []
    found = []
    if all(one.get(_ORIGINAL) is None for one in (fields, settings)):
        found.append(f"{spelling} of type 'longrope' without a whole number {_ORIGINAL!r}")
    for name in _LISTS:
        factors = settings.get(name)
        if not isinstance(factors, list) or not factors or not all(map(is_number, factors)):
            found.append(f"{spelling} of type 'longrope' without a list of numbers {name!r}")
        elif len(factors) != (pairs := rotated_pairs(fields)):
            found.append(f"{spelling}.{name} of {len(factors)} numbers, for heads of {pairs} pairs")
    return found + [
        f"{spelling}.{name}={shown(settings[name])}"
        for name in ("factor", "attention_factor")
        if not is_number(settings.get(name, 1))
    ]


def rotated_pairs(fields: Fields) -> int | None:
    """How many pairs of a head's entries rotate; None where sizes are missing."""
    D, N = (fields.get(name) for name in ("hidden_size", "num_attention_heads"))
    H = fields.get("head_dim", D // N if is_count(D) and is_count(N) else None)
    return int(H * _parts(fields)[0]) // 2 if is_count(H) else None


def _parts(fields: Fields) -> list[float]:
    """The share of a head's entries that rotate, wherever it is stated; 1 in the end."""
    given = [fields, *(fields[name] for name in ROPE_FIELDS if isinstance(fields.get(name), Mapping))]
    stated = [one.get("partial_rotary_factor") for one in given]
    return [*(float(part) for part in stated if is_number(part)), 1.0]


def _problems(spelling: str, settings: object, kinds: tuple[str, ...], is_partial: bool) -> list[str]:
    if not isinstance(settings, Mapping):
        return [f"{spelling}={shown(settings)} (give an object)"]
    settings = _stated(settings)
    kind = _kind(settings)
    found = []
    if len({str(_usual(settings[name])) for name in ("rope_type", "type") if name in settings}) > 1:
        found.append(f"{spelling} with rope_type={shown(kind)} and type={shown(settings['type'])} (keep one)")
    if kind == "default" and settings.get("factor", 1.0) != 1.0:
        found.append(f"{spelling} with a factor but without a type")
    if kind not in kinds:
        found.append(f"{spelling} of type {shown(kind)} (only {', '.join(map(repr, kinds))})")
    part = settings.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not (is_partial and is_number(part)):
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
    known = _KNOWN | {*_OF_LONGROPE} if kind == "longrope" else _KNOWN
    return found + [f"{spelling}.{shown_name(name)}={shown(settings[name])}" for name in settings if name not in known]


def _stated(settings: Fields) -> Fields:
    """Settings without those that are null, which is how absence is written."""
    return {name: value for name, value in settings.items() if value is not None}


def _kind(settings: Fields) -> Any:
    return _usual(settings.get("rope_type", settings.get("type", "default")))


def _usual(kind: Any) -> Any:
    return "longrope" if kind == "su" else kind  # its name in the first releases of Phi-3


def _scaling(settings: Fields) -> list[object]:
    """All that settings without problems say of scaling."""
    kind = _kind(settings)
    names = (*_NUMBERS[kind], _ORIGINAL) if kind == "llama3" else _NUMBERS[kind]
    return [kind, *(settings.get(name) for name in (*names, *(_OF_LONGROPE if kind == "longrope" else ())))]


def read_rope(fields: Fields, default_theta: float) -> Rope:
    """The rotary positions that fields without problems state."""
    given = [_stated(fields[name]) for name in ROPE_FIELDS if fields.get(name)]
    bases = [base for base in (fields.get("rope_theta"), *(one.get("rope_theta") for one in given)) if base]
    theta = float(bases[0] if bases else default_theta)
    settings = given[0] if given else {}
    kind, part = _kind(settings), _parts(fields)[0]
    if kind == "default":
        return Rope(theta=theta, part=part)
    if kind == "longrope":
        return _read_longrope(fields, settings, theta)
    scaled: dict[str, Any] = {name: float(settings[name]) for name in _NUMBERS[kind]}
    if kind == "llama3":
        original = settings.get(_ORIGINAL) or fields.get("max_position_embeddings", 2048)
        return Rope(theta=theta, scaling="llama3", original_max_positions=int(original), **scaled)
    return Rope(theta=theta, scaling="linear", **scaled)


def _read_longrope(fields: Fields, settings: Fields, theta: float) -> Rope:
    original = fields.get(_ORIGINAL) or settings[_ORIGINAL]
    factor = settings.get("factor") or fields["max_position_embeddings"] / original
    usual = sqrt(1 + log(factor) / log(original)) if factor > 1 and original > 1 else 1.0
    return Rope(
        theta=theta,
        scaling="longrope",
        original_max_positions=original,
        part=_parts(fields)[0],
        short_factors=tuple(map(float, settings["short_factor"])),
        long_factors=tuple(map(float, settings["long_factor"])),
        attention_factor=float(settings.get("attention_factor", usual)),
    )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The same in the older spelling, which every release of transformers reads."""
    part = {} if rope.part == 1.0 else {"partial_rotary_factor": rope.part}
    return {"rope_theta": rope.theta, "rope_scaling": _written_scaling(rope), **part}


def _written_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    if rope.scaling == "longrope":
        factors = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        return {"rope_type": "longrope", **factors, "attention_factor": rope.attention_factor}
    scaling = {"rope_type": rope.scaling} | {name: getattr(rope, name) for name in _NUMBERS[rope.scaling]}
    return scaling | ({_ORIGINAL: rope.original_max_positions} if rope.scaling == "llama3" else {})
