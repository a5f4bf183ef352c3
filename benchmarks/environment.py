"""What a measurement was made on, recorded with it."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """Date, hardware, versions and git revision (marked when the tree holds uncommitted changes)."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{_processor()}, {_cores()} cores, {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("coreinfer_jax", "jax", "jaxlib")} | {"python": _python()},
        "git_revision": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cores() -> int:
    info = Path("/proc/cpuinfo").read_text()
    return info.count("processor\t")


def _python() -> str:
    return platform.python_version()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
