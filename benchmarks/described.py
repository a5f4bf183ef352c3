"""Devices that programs are compiled for without having one."""

from dataclasses import dataclass

import jax
from jax.experimental import topologies

from coreinfer_jax.errors import CoreInferError


@dataclass(frozen=True)
class Described:
    """A device.

    Attributes:
        platform: `cuda`, the only one whose programs `benchmarks.hlo` can read.
        bandwidth: of its memory, bytes per second, as its maker states it.
        target: its description in XLA's text format.
    """

    platform: str
    bandwidth: float
    target: str


def _hopper(name: str, memory: int, bandwidth: int) -> Described:
    """A GPU of NVIDIA's compute capability 9.0; figures of the SXM boards in NVIDIA's data sheets."""
    target = f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}" """
    return Described("cuda", bandwidth, target)


DEVICES = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": _hopper("NVIDIA H200", 150_754_820_096, 4_800_000_000_000),
}


_REMEDY = "pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm"


def placed_on(name: str) -> jax.sharding.SingleDeviceSharding:
    """A placement on the device of this name.

    Raises:
        CoreInferError: the plugin that compiles for it is not installed.
    """
    device = DEVICES[name]
    try:
        found = topologies.get_topology_desc(platform=device.platform, topology="1x1x1", target_config=device.target)
    except Exception as error:  # what a missing plugin raises differs by platform
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise CoreInferError(f"--device {name}: JAX cannot compile for it here ({told[0]}); {_REMEDY}") from error
    return jax.sharding.SingleDeviceSharding(found.devices[0])
