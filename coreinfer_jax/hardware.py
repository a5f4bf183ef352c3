"""What a measurement was made on, in words."""

import os
import platform
from pathlib import Path

import jax


def usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """The processor, the cores this process may use, and the kind of JAX's device."""
    cores = usable_cores()
    return f"{_processor()}, {cores} core{'' if cores == 1 else 's'}, {jax.devices()[0].device_kind}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
