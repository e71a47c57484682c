"""How much memory a trial takes, how much there is, and whether an error says that there was too little."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch.utilities.memory import is_oom_error

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
KNOWN_AS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA or Python says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in KNOWN_AS)


def resident() -> int | None:
    """Bytes of this process that are in memory; None where the system does not tell."""
    try:
        import resource

        return int((PROC / "self/statm").read_text().split()[1]) * resource.getpagesize()
    except (ImportError, OSError):
        return None


def available() -> int | None:
    """Bytes that this process can still take before the system must end it: of the machine, and of its control groups.

    None where the system does not tell (anything but Linux).
    """
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*free, *_left_in_groups()])) if free else None


def _left_in_groups() -> Iterator[int]:
    """What is left of every memory limit on this process, in either version of Linux's control groups."""
    try:
        groups = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUP / "memory" if controllers else CGROUP
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):  # a limit above holds for all below it
            if group == root.parent:
                break
            limit, used = (_number(group / f"memory.{name}") for name in names)
            if limit is not None and used is not None:
                yield limit - used + _reclaimable(group / "memory.stat")


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _reclaimable(file: Path) -> int:
    """Bytes of files' contents that count as used and that the kernel gives back when memory is short."""
    try:
        pairs = dict(line.split(None, 1) for line in file.read_text().splitlines() if " " in line)
    except OSError:
        return 0
    return int(pairs.get("total_inactive_file", pairs.get("inactive_file", 0)))


class PeakMemory:
    """The most memory in use between start() and stop(): of a GPU as its allocator counts, else of this process."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._sampled = self._highest_before = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, device: torch.device) -> None:
        """Begin; whatever was measured before is forgotten."""
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif resident() is not None:
            self._sampled, self._highest_before = 0, _highest()
            self._done.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> int | None:
        """Bytes at the peak; None where nothing was started or the system does not tell."""
        if self._device is not None and self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._thread is None:
            return None
        self._done.set()
        self._thread.join()
        self._thread = None
        # The system's own mark is exact where it rose; where it did not, an earlier trial or another job was higher.
        highest = _highest()
        return highest if highest > self._highest_before else self._sampled

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, resident() or 0)
            if self._done.wait(0.005):
                return


def _highest() -> int:
    """The most bytes that this process ever had in memory."""
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
