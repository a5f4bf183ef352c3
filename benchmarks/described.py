"""Devices that programs are compiled for without having one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jax.experimental import topologies

from coreinfer_jax.errors import CoreInferError

# What a GPU's kernel costs beside what it moves: launching, and filling the device. Measured kernels on an H200 that
# move next to nothing take 1 to 2 microseconds. A TPU launches nothing: it runs the instructions of a program itself.
_LAUNCH_SECONDS = 1.5e-6


@dataclass(frozen=True)
class Described:
    """A device.

    Attributes:
        platform: JAX's name for its kind, `cuda` or `tpu`.
        bandwidth: of its memory, bytes per second, as its maker states it.
        kernel_seconds: what a kernel costs beside what it moves.
        description: of a system with it, as JAX's `get_topology_desc` takes one.
        variables: of the environment, which its compiler reads.
    """

    platform: str
    bandwidth: float
    kernel_seconds: float
    description: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)


# What all GPUs of a compute capability have: arithmetic units per core, and what a core holds of threads and of bytes
# of shared memory. From the table of the CUDA C++ Programming Guide, "Compute Capabilities".
_CAPABILITIES = {
    "major: 8": (64, 2048, 167936),
    "major: 8 minor: 9": (128, 1536, 102400),
    "major: 9 feature_extension: ACCELERATED_FEATURES": (128, 2048, 233472),
}
# Of a core's shared memory, kept by the system for each block.
_RESERVED = 1024


def _gpu(name: str, capability: str, cores: int, l2_cache: int, ghz: float, memory: int, bandwidth: int) -> Described:
    units, threads, shared = _CAPABILITIES[capability]
    target = f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads} core_count: {cores}
  fpus_per_core: {units} shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - _RESERVED} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: {l2_cache} clock_rate_ghz: {ghz} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}" """
    return Described("cuda", bandwidth, _LAUNCH_SECONDS, {"topology": "1x1x1", "target_config": target})


def _tpu(topology: str, accelerator: str, bandwidth: float) -> Described:
    """One chip of a system of this topology."""
    variables = {
        # It would ask a service of Google's machines what it runs on, and complain where there is none.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": accelerator,
        # It would keep chips, of which there are none, to one process.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return Described("tpu", bandwidth, 0.0, {"topology_name": topology}, variables)


_HOPPER = "major: 9 feature_extension: ACCELERATED_FEATURES"
_MIB, _GIB = 1 << 20, 1 << 30
# GPUs: cores, caches, clocks, memory and bandwidth of the SXM boards in NVIDIA's data sheets of the H100, the H200 and
# the A100 80GB, and of the "NVIDIA Ada GPU Architecture" paper for the GeForce RTX 4090; memory as the first three
# report it. TPUs: "HBM bandwidth per chip" in Google's pages "TPU v5e" and "TPU v6e" of the Cloud TPU documentation.
DEVICES = {
    "h100": _gpu("NVIDIA H100 80GB HBM3", _HOPPER, 132, 50 * _MIB, 1.98, 84_942_979_072, 3_352_320_000_000),
    "h200": _gpu("NVIDIA H200", _HOPPER, 132, 50 * _MIB, 1.98, 150_754_820_096, 4_800_000_000_000),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", "major: 8", 108, 40 * _MIB, 1.41, 85_100_068_864, 2_039_040_000_000),
    "rtx-4090": _gpu(
        "NVIDIA GeForce RTX 4090", "major: 8 minor: 9", 128, 72 * _MIB, 2.52, 24 * _GIB, 1_008_000_000_000
    ),
    "v5e": _tpu("v5e:2x2", "v5litepod-4", 819e9),
    "v5e-8": _tpu("v5e:2x4", "v5litepod-8", 819e9),
    "v6e": _tpu("v6e:2x2", "v6e-4", 1640e9),
}


def placed_on(name: str) -> jax.sharding.SingleDeviceSharding:
    """A placement on the device of this name; call it before JAX is asked for devices or compiles anything.

    Raises:
        CoreInferError: the plugin that compiles for it is not installed.
    """
    return jax.sharding.SingleDeviceSharding(devices_of(name)[0])


def devices_of(name: str, hosts: int = 1, per_host: int = 1) -> list[jax.Device]:
    """The devices of a system with so many GPUs of this name, or of a TPU's own system; as `placed_on`."""
    device = DEVICES[name]
    # The plugins would look for devices of their own, and JAX refuses to go on without them.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    # JAX writes programs for a device that is not there to its cache, but cannot read them back.
    jax.config.update("jax_enable_compilation_cache", False)
    for variable, value in device.variables.items():
        os.environ.setdefault(variable, value)
    try:
        description = dict(device.description)
        if "topology" in description:
            description["topology"] = f"1x{hosts}x{per_host}"
        found = topologies.get_topology_desc(platform=device.platform, **description)
    except Exception as error:  # what a missing plugin raises differs by platform
        told = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "pip install '.[aot]'"
        raise CoreInferError(f"--device {name}: JAX cannot compile for it here ({told[0]}); {remedy}") from error
    devices: list[jax.Device] = found.devices
    return devices
