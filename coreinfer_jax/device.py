"""The device: what it is called, and whether it has the memory for what a call needs before any work is done."""

import os
import platform
from pathlib import Path

import jax

from coreinfer_jax.errors import CoreInferError

_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Bytes the default device can still give, on a CPU those of memory and swap; None where nobody says."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _free_host_bytes()
    usage = device.memory_stats()
    return None if usage is None else int(usage["bytes_limit"]) - int(usage["bytes_in_use"])


def _free_host_bytes() -> int | None:
    if not _MEMORY.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
    free = 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in lines)
    return min(free, _free_in_container(free))


def _free_in_container(free: int) -> int:
    """Bytes left of a container's limit, cached files counted as free; `free` where there is no limit."""
    paths = [_CONTAINER / name for name in ("memory.max", "memory.current", "memory.stat")]
    if not all(path.is_file() for path in paths):
        return free
    most, used, stat = (path.read_text(encoding="ascii") for path in paths)
    files = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith(("active_file", "inactive_file")))
    return int(most) - int(used) + files if most.strip().isdigit() else free


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse what cannot fit.

    Args:
        needed: bytes, of arrays and of programs' temporaries as far as they are foreseen: at least so many.
        what: needs them.
        remedy: to be read after "free: ".

    Raises:
        CoreInferError: the device has fewer.
    """
    free = free_bytes()
    if free is not None and needed > free:
        raise CoreInferError(f"{what}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; {remedy}")


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
