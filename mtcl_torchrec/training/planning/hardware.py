"""What ranks run on: memory and bandwidths of known devices, and of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mtcl_torchrec.config import ShardingConfig
from mtcl_torchrec.schema import ConfigError, nearest

if TYPE_CHECKING:
    import torch

GB = 1e9  # bytes


@dataclass(frozen=True)
class Hardware:
    """One device, its share of a host and of the network.

    Args:
        kind: torch's name for the device.
        memory_gb: of one device, 10⁹ bytes; 0 on a CPU, whose ranks live in host memory.
        host_memory_gb: of one host.
        memory_gb_s, host_memory_gb_s: what one rank reads from device and from host memory, 10⁹ bytes a second.
        host_link_gb_s: between one device and its host, in one direction.
        intra_host_gb_s, inter_host_gb_s: what one rank sends to ranks of its host and of others, in one direction.
    """

    kind: Literal["cuda", "cpu"]
    memory_gb: float
    host_memory_gb: float
    memory_gb_s: float
    host_memory_gb_s: float
    host_link_gb_s: float
    intra_host_gb_s: float
    inter_host_gb_s: float


# Datasheet figures.  Memory: the gigabytes that the device is sold with, taken as 10⁹ bytes (a driver reports some
# percent more).  NVLink: half of the total that is advertised, which counts both directions.  Host memory and network:
# the maker's own eight-GPU server, one network port a GPU.  Host memory bandwidth: one socket's, shared by four ranks.
#   h200  NVIDIA H200 SXM datasheet; HGX/DGX H200: NVLink 900 GB/s, ConnectX-7 400 Gb/s a GPU, PCIe 5.0 x16, 2 TB
#   h100  NVIDIA H100 SXM 80 GB datasheet; DGX H100 likewise
#   b200  NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s over 8 GPUs, NVLink 1.8 TB/s, ConnectX-7, 2 TB
#   a100  NVIDIA A100 SXM datasheet: 2,039 and 1,555 GB/s, NVLink 600 GB/s, PCIe 4.0; DGX A100: ConnectX-6 200 Gb/s
#   l40s  NVIDIA L40S datasheet: 864 GB/s, no NVLink, PCIe 4.0 x16; a 100 Gb/s port a GPU
#   v100  NVIDIA V100 SXM2 32 GB datasheet: 900 GB/s, NVLink 300 GB/s, PCIe 3.0; DGX-1: four 100 Gb/s ports for 8 GPUs
#   cpu   a rank with TorchRec's own figure for a CPU's memory, gloo over loopback, and 10 Gb/s between hosts
KNOWN = {
    "h200": Hardware("cuda", 141, 2000, 4800, 75, 64, 450, 50),
    "h100": Hardware("cuda", 80, 2000, 3350, 75, 64, 450, 50),
    "b200": Hardware("cuda", 180, 2000, 8000, 75, 64, 900, 50),
    "a100-80": Hardware("cuda", 80, 2000, 2039, 50, 32, 300, 25),
    "a100-40": Hardware("cuda", 40, 1000, 1555, 50, 32, 300, 25),
    "l40s": Hardware("cuda", 48, 1000, 864, 50, 32, 32, 12.5),
    "v100": Hardware("cuda", 32, 512, 900, 30, 16, 150, 6.25),
    "cpu": Hardware("cpu", 0, 256, 0, 54.8, 0, 5, 1.25),
}


def known_hardware(name: str) -> Hardware:
    """The hardware of a name such as ``"h200"``.

    Raises:
        ConfigError: there is no such name.

    Example:
        >>> known_hardware("h200").memory_gb
        141
    """
    if name not in KNOWN:
        raise ConfigError(f"no device {name!r} is known{nearest(name, KNOWN)}; there are {', '.join(KNOWN)}")
    return KNOWN[name]


def this_hardware(device: torch.device) -> Hardware:
    """This machine's: its memory as it is, the bandwidths of the known device that it is or is most like."""
    host_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    if device.type == "cpu":
        return replace(KNOWN["cpu"], host_memory_gb=host_gb)
    import torch  # the datasheets above are read without it

    about = torch.cuda.get_device_properties(device)
    name = about.name.lower()
    like = next((known for known in KNOWN if known.split("-")[0] in name), "a100-80")
    return replace(KNOWN[like], memory_gb=about.total_memory / GB, host_memory_gb=host_gb)


def configured(hardware: Hardware, sharding: ShardingConfig) -> Hardware:
    """The hardware with the memory that a configuration says it has."""
    if sharding.device_memory_gb is not None and hardware.kind == "cuda":
        hardware = replace(hardware, memory_gb=sharding.device_memory_gb)
    if sharding.host_memory_gb is not None:
        hardware = replace(hardware, host_memory_gb=sharding.host_memory_gb)
    return hardware
