"""The software and the machine behind a number."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "transformers",
    "webdataset",
    "sentencepiece",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that numbers depend on; a library that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Operating system, processor, cores this process may use, memory (GiB) and GPU."""
    found = {"system": platform.system(), "processor": _processor()}
    found["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{num_bytes / 2**30:.0f} GiB"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
