"""The device: what it is called, and whether it has the memory for what a call needs before any work is done."""

import os
import platform
import subprocess
from pathlib import Path

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from coreinfer_jax.errors import CoreInferError

_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Bytes this process's first device can still give, on a CPU those of memory and swap; None where nobody says."""
    device = jax.local_devices()[0]
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


_CAP = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def cap_allocator(size: int) -> None:
    """Let JAX take no more than `size` bytes of an NVIDIA GPU's memory in this process, before it has begun to use one.

    Where there is no such GPU nothing is capped, and a fraction that the user has set stays.
    """
    total = _nvidia_bytes()
    if total is not None and _CAP not in os.environ:
        os.environ[_CAP] = f"{min(1.0, size / total):.6f}"


def _nvidia_bytes() -> int | None:
    """The memory of the first NVIDIA GPU as its driver's tool tells it; JAX cannot be asked before it takes memory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return int(told[0]) * 2**20 if told and told[0].isdigit() else None


# Of the host's free memory, how much weights may take that the device copies from by itself.
_PINNED_SHARE = 0.8


def pinned_memory(size: int) -> Sharding | None:
    """Host memory from which the default device copies by itself, with room for `size` bytes.

    None where there is none: on a CPU, whose memory the host shares; and where the host has too little, so that weights
    are read from their file each time.
    """
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    free = _free_host_bytes()
    if device.platform == "cpu" or "pinned_host" not in kinds or free is None or size > _PINNED_SHARE * free:
        return None
    return SingleDeviceSharding(device, memory_kind="pinned_host")


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
