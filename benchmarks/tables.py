"""How measured values and what they were measured on are written, on a terminal and in documents."""

from collections.abc import Mapping, Sequence
from typing import Any


def shown_range(values: Mapping[str, float] | None, digits: int) -> str:
    """A median with the least and the most, a dash for none."""
    if values is None:
        return "-"
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} .. {values['max']:.{digits}f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def made_on(*results: Mapping[str, Any]) -> str:
    """Hardware, versions, revisions and dates of all results."""
    versions = {name: number for result in results for name, number in result["versions"].items()}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    made = ", ".join(dict.fromkeys(f"{result['git_revision']} of {result['date']}" for result in results))
    hardware = " and ".join(dict.fromkeys(result["hardware"] for result in results))
    return f"{hardware}; {listed}; revision {made}."
