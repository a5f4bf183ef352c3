"""The exception every user mistake raises, and how its line tells a value."""

import reprlib
from collections.abc import Sequence

# Names and the like that one error lists, which keeps its line below 10 000 characters.
MOST_LISTED = 30
# Long and nested values of files are told shortened.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


class CoreInferError(ValueError):
    """A mistake in what the caller passed or in the files it named.

    The message is one line that names the offending value and the remedy. The command line prints it and exits with
    status 2; from Python it is an ordinary `ValueError`.
    """


def shown(value: object) -> str:
    """`value` as an error tells it: on one line that is not too long, whatever a file or a caller held."""
    try:
        return " ".join(_SHORT.repr(value).splitlines())
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"


def shown_name(name: str) -> str:
    """A name out of a file: as it is, or as `shown` where that would spoil the line."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def listed(problems: Sequence[str], separator: str = ", ") -> str:
    """All that there is to say, as far as a line has room for it."""
    more = len(problems) - MOST_LISTED
    return separator.join(problems[:MOST_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def one_line(message: str) -> str:
    """`message` without line breaks, and without control characters, which names of files may hold."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
