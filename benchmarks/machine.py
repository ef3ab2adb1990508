"""The machine and the versions of packages that figures were measured with."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("devec", "torch", "peft", "safetensors", "transformers", "diffusers", "accelerate")


def machine(threads: int) -> dict[str, str]:
    """Processor, cores, memory and system (Linux)."""
    return {
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": f"{os.cpu_count()}, {threads} threads of torch",
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) * 1024 / 1e9:.0f} GB",
        "system": f"{_distribution()}, {platform.system()} {platform.release().split('-')[0]}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the measured packages that are installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def _field(path: str, name: str) -> str:
    """The first value of a field in a file with one field per line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    values = [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name]
    return values[0] if values else platform.machine()


def _distribution() -> str:
    """The name of the Linux distribution, if it is available."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "unknown distribution"
