"""environment.json: what a run was computed with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mvmr import __version__

LIBRARIES = ("torch", "torchvision", "lightning", "timm", "numpy", "pillow", "pydantic", "scikit-learn", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, machine, devices, commit and command."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "mvmr": __version__,
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def version_of(library: str) -> str | None:
    """Its installed version, or None."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree that runs, with "+" when it is changed; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        # Without this check, a package installed inside some other project's tree would report that project's commit.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
