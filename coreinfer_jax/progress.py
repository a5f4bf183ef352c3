"""How long work shows its progress: a bar in a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

# Between two lines in a log, and before the first: work that takes less says nothing there.
SECONDS = 15
_LINE = "{desc}: {n_fmt} of {total_fmt} ({unit}), {elapsed} so far, {remaining} left"


class _Bar(tqdm):  # type: ignore[misc]  # tqdm is generic for type checkers alone
    # A thread that would refresh bars of slow steps; a line in a log is written by the steps themselves.
    monitor_interval = 0


class _Lines:
    """Standard error as a file on which each state of a bar is a line of its own."""

    def write(self, text: str) -> None:
        if shown := text.strip():
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Iterable[Item],
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    leave: bool = False,
    done: int = 0,
) -> "tqdm[Item]":
    """A bar over `items`, or over none and to be updated by hand, on standard error.

    Args:
        items: to go through.
        desc: what is being done.
        unit: what is counted, in the singular.
        total: how many there are, where `items` does not tell.
        leave: whether a terminal keeps the finished bar.
        done: how many were done before; the time that is left does not follow from them.
    """
    given: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": done}
    if sys.stderr.isatty():
        return _Bar(items, **given, leave=leave)
    return _Bar(
        items,
        **given,
        leave=False,
        file=_Lines(),
        delay=SECONDS,
        mininterval=SECONDS,
        miniters=1,
        bar_format=_LINE,
        position=0,  # with other bars open, too: below them it would move the cursor, and a log has none
    )
