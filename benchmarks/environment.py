"""What a measurement was made on, recorded with it."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from coreinfer_jax.device import hardware

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """Date, hardware, versions and git revision (marked when anything but results is changed and not committed)."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("coreinfer_jax", "jax", "jaxlib")} | {"python": _python()},
        "git_revision": _revision(),
    }


def read_results(name: str) -> list[dict[str, Any]]:
    """All committed results of a measurement, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def _python() -> str:
    return platform.python_version()


def _revision() -> str:
    """The commit, marked where anything but results has changed since; `unknown` outside a repository."""
    try:
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return _git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
