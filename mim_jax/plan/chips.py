"""Accelerators by name: memory, bandwidths and hosts, as the vendors publish them."""

import dataclasses
import difflib
from collections.abc import Mapping

from mim_jax.training.flops import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX sees it: one device.

    Attributes:
        name: as given to `--chip`.
        tflops: dense bfloat16 matrix products, 10^12 operations per second.
        memory: GiB.
        bandwidth: of the memory, GB/s.
        links: what a device sends to others of its domain, GB/s: over NVLink; of a TPU, over the
            links of one axis of the torus, in both directions.
        domain: devices that such links join: a server of GPUs, a pod of TPUs.
        network: what a device sends beyond its domain, GB/s: its network adapter.
        host: devices that one host feeds.
        cores: processors of that host: cores of a DGX, or vCPUs of a TPU VM. They have to decode
            the images.
    """

    name: str
    tflops: float
    memory: float
    bandwidth: float
    links: float
    domain: int
    network: float
    host: int
    cores: int


def _chip(name: str, kind: str, **figures: float) -> Chip:
    return Chip(name, PEAK_FLOPS[kind] / 1e12, **figures)  # type: ignore[arg-type]


_DGX_A100 = dict(domain=8, host=8, cores=128)  # 2 x AMD Rome 7742
_DGX_H100 = dict(domain=8, host=8, cores=112)  # 2 x Xeon 8480C

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # NVIDIA A100 data sheet (SXM): 40 GB at 1,555 GB/s or 80 GB at 2,039 GB/s; NVLink 600 GB/s,
        # half of it each way. DGX A100 user guide: an adapter of 200 Gb/s for each GPU.
        _chip("a100-40g", "A100", memory=40, bandwidth=1555, links=300, network=25, **_DGX_A100),
        _chip("a100-80g", "A100", memory=80, bandwidth=2039, links=300, network=25, **_DGX_A100),
        # NVIDIA H100 and H200 data sheets (SXM): 80 GB at 3.35 TB/s, 141 GB at 4.8 TB/s; NVLink
        # 900 GB/s, half of it each way. DGX H100 user guide: 400 Gb/s for each GPU.
        _chip("h100", "H100", memory=80, bandwidth=3350, links=450, network=50, **_DGX_H100),
        _chip("h200", "H200", memory=141, bandwidth=4800, links=450, network=50, **_DGX_H100),
        # Cloud TPU documentation, "TPU v4": 32 GiB at 1,200 GB/s, pods of 4,096 chips. Links:
        # 6 of 50 GB/s each way (Jouppi et al., 2023, "TPU v4", table 4), so 100 GB/s an axis. The
        # network is not published by chip; this takes v5p's. ct4p VM: 4 chips, 240 vCPUs.
        _chip(
            "v4",
            "TPU v4",
            memory=32,
            bandwidth=1200,
            links=100,
            domain=4096,
            network=6.25,
            host=4,
            cores=240,
        ),
        # "TPU v5e": 16 GB at 819 GB/s; links 400 GB/s in both directions over the 2 axes of a
        # torus; pods of 256; 2 x 100 Gb/s for 8 chips. ct5lp-hightpu-4t VM: 4 chips, 112 vCPUs.
        _chip(
            "v5e",
            "TPU v5e",
            memory=16,
            bandwidth=819,
            links=100,
            domain=256,
            network=3.125,
            host=4,
            cores=112,
        ),
        # "TPU v5p": 95 GiB at 2,765 GB/s; links 1,200 GB/s in both directions over 3 axes; jobs of
        # up to 6,144 chips in a pod; 50 Gb/s a chip. ct5p-hightpu-4t VM: 4 chips, 208 vCPUs.
        _chip(
            "v5p",
            "TPU v5p",
            memory=95,
            bandwidth=2765,
            links=200,
            domain=6144,
            network=6.25,
            host=4,
            cores=208,
        ),
        # "TPU v6e": 32 GB at 1,638 GB/s; links 800 GB/s in both directions over 2 axes; pods of
        # 256; 4 x 200 Gb/s for 8 chips. ct6e-standard-4t VM: 4 chips, 180 vCPUs.
        _chip(
            "v6e",
            "TPU v6e",
            memory=32,
            bandwidth=1638,
            links=200,
            domain=256,
            network=12.5,
            host=4,
            cores=180,
        ),
    )
}


def chip_of(text: str) -> Chip:
    """A chip by name, perhaps with other figures: `h100` or `h100,memory=94,tflops=835`.

    Raises:
        ValueError: for an unknown name or figure, with the nearest known one, or a bad number.
    """
    name, *changes = text.split(",")
    if name not in CHIPS:
        raise ValueError(
            f"unknown chip {name!r}; known are {', '.join(CHIPS)}.{_near(name, CHIPS)}"
        )
    kinds = {field.name: field.type for field in dataclasses.fields(Chip) if field.name != "name"}
    figures: dict[str, float] = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in kinds:
            raise ValueError(
                f"a chip has no {field!r}; known are {', '.join(kinds)}.{_near(field, kinds)}"
            )
        try:
            figures[field] = int(value) if kinds[field] is int else float(value)
        except ValueError:
            figures[field] = 0
        if figures[field] <= 0:
            raise ValueError(f"{change!r} of the chip {name} needs a number above 0.")
    return dataclasses.replace(CHIPS[name], name=text, **figures)  # type: ignore[arg-type]


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""
