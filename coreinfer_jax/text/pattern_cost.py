"""Which regular expressions of tokenizers cut any text in time that follows from its length."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import prod

# Ways in which one attempt at a match may go that do not depend on the text: options, alternatives, bounded repeats.
_MOST_WAYS = 1000
_LONGEST, _DEEPEST = 10_000, 8

_ATOM = re.compile(
    r"\\[pP]\{\^?\w+\}|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[sSdDwWhHrntfve]|\\[^\w\s]|[^\\\[\](){}?*+|^$]", re.DOTALL
)
_ANCHOR = re.compile(r"[\^$]")
_GROUP = re.compile(r"\((?:\?(?:i?:|=|!))?(?!\?)")
_COUNT = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
# The second plus keeps a run from being given back, but not from being tried at every character of it.
_QUANTIFIER = re.compile(r"([?*+])\+?")
_ENDLESS = 1 << 32


@dataclass(frozen=True)
class _Item:
    """A part of a sequence: what it is, how often it comes, and, of a group, its alternatives."""

    text: str
    least: int = 1
    most: int = 1
    alternatives: tuple[tuple["_Item", ...], ...] = ()
    looks: bool = False

    @property
    def endless(self) -> bool:
        return self.most == _ENDLESS

    @property
    def may_fail(self) -> bool:
        return self.least > 0


@lru_cache(maxsize=256)
def is_linear(pattern: str) -> bool:
    r"""Whether cutting a text at a pattern takes time in proportion to the text, which backtracking may not.

    So it is where only single characters or classes repeat without end, not groups; and where a run that is taken in
    vain (by `\s*[\r\n]+` on spaces) is taken whole by a next alternative (`\s+`), so that no character of it begins
    another attempt. A pattern of which that is not seen may do no harm either.
    """
    if len(pattern) > _LONGEST:
        return False
    try:
        alternatives, rest = _alternatives(pattern, 0)
    except ValueError:
        return False
    return (
        not rest
        and _ways(alternatives) <= _MOST_WAYS
        and all(map(_repeats_simply, chain(*alternatives)))
        and all(_ends_at_once(alternatives, number) for number in range(len(alternatives)))
    )


# ---------------------------------------------------------------------------- reading a pattern


def _alternatives(rest: str, depth: int) -> tuple[list[tuple[_Item, ...]], str]:
    """What a pattern, or a group of one, chooses from, and what is behind it; ValueError: of a kind not known here."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    found: list[tuple[_Item, ...]] = []
    while True:
        sequence = []
        while rest and rest[0] not in "|)":
            item, rest = _item(rest, depth)
            sequence.append(item)
        found.append(tuple(sequence))
        if not rest.startswith("|"):
            return found, rest
        rest = rest[1:]


def _item(rest: str, depth: int) -> tuple[_Item, str]:
    if anchor := _ANCHOR.match(rest):
        return _Item(anchor[0]), rest[1:]
    if group := _GROUP.match(rest):
        alternatives, behind = _alternatives(rest[group.end() :], depth + 1)
        if not behind.startswith(")"):
            raise ValueError("a group without its end")
        text, rest = rest[: len(rest) - len(behind) + 1], behind[1:]
        inner = _Item(text, alternatives=tuple(alternatives), looks=group[0] in ("(?=", "(?!"))
    else:
        text = _class(rest) if rest.startswith("[") else _matched(_ATOM, rest)
        inner, rest = _Item(text), rest[len(text) :]
    return _quantified(inner, rest)


def _class(rest: str) -> str:
    """The set of characters, sets within it included, at the start of `rest`."""
    depth, position = 0, 0
    while position < len(rest):
        character = rest[position]
        if character == "\\":
            position += len(_matched(_ATOM, rest[position:]))
            continue
        if character == "[":
            depth += 1
            position += 1 + rest.startswith("^", position + 1)
            if rest.startswith("]", position):
                raise ValueError("a set that begins with its end")
            continue
        depth -= character == "]"
        position += 1
        if not depth:
            return rest[:position]
    raise ValueError("a set without its end")


def _matched(what: re.Pattern[str], rest: str) -> str:
    found = what.match(rest)
    if found is None:
        raise ValueError("not known here")
    return found[0]


def _quantified(item: _Item, rest: str) -> tuple[_Item, str]:
    """`item` as often as the quantifier at the start of `rest` says, if there is one."""
    if quantifier := _QUANTIFIER.match(rest):
        least, most = {"?": (0, 1), "*": (0, _ENDLESS), "+": (1, _ENDLESS)}[quantifier[1]]
        end = quantifier.end()
    elif count := _COUNT.match(rest):
        if not count[1] and not count[3]:
            raise ValueError("a count of nothing")
        least = int(count[1] or 0)
        most = least if not count[2] else int(count[3]) if count[3] else _ENDLESS
        end = count.end()
    elif rest.startswith("{"):
        raise ValueError("not known here")
    else:
        return item, rest
    if item.looks or rest[end : end + 1] in ("?", "*", "+", "{"):
        raise ValueError("a quantifier of a quantifier, or of nothing")
    return _Item(item.text, least, most, item.alternatives), rest[end:]


# ---------------------------------------------------------------------------- what it costs


def _ways(alternatives: Sequence[Sequence[_Item]]) -> int:
    """In how many ways a match may go, apart from runs without end."""
    return sum(prod(map(_ways_of, sequence)) for sequence in alternatives)


def _ways_of(item: _Item) -> int:
    within = _ways(item.alternatives) if item.alternatives else 1
    return within if item.endless else within * (item.most - item.least + 1)


def _repeats_simply(item: _Item) -> bool:
    """Whether groups are not repeated, and hold no runs without end."""
    inner = list(chain(*item.alternatives))
    return not item.alternatives or (
        item.most <= 1 and not any(one.endless for one in inner) and all(map(_repeats_simply, inner))
    )


def _ends_at_once(alternatives: Sequence[Sequence[_Item]], number: int) -> bool:
    """Whether an alternative takes no run in vain, or at most one, which the next ones take whole."""
    sequence = alternatives[number]
    in_vain = [item for item, behind in _with_rest(sequence) if item.endless and _any_fails(behind)]
    if not in_vain:
        return True
    run = in_vain[0].text
    for following in alternatives[number + 1 :]:
        if _takes(following, run):
            return len(in_vain) == 1
        if not (following and following[0].text == run and following[0].endless):
            return False
    return False


def _with_rest(sequence: Sequence[_Item]) -> Iterator[tuple[_Item, Sequence[_Item]]]:
    return ((item, sequence[number + 1 :]) for number, item in enumerate(sequence))


def _any_fails(sequence: Sequence[_Item]) -> bool:
    return any(item.may_fail for item in sequence)


def _takes(sequence: Sequence[_Item], run: str) -> bool:
    """Whether a sequence matches wherever a run of `run` begins, all of it."""
    needed = [item for item in sequence if item.may_fail]
    return [(item.text, item.least, item.endless) for item in needed] == [(run, 1, True)]
