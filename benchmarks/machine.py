"""What figures were measured on."""

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
    """Versions of Python and of all packages that are measured, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _field(path: str, name: str) -> str:
    """The first value of a field in a file of fields, one a line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name]
    return found[0] if found else platform.machine()


def _distribution() -> str:
    """The name of the distribution, where it says one."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "unknown distribution"
