"""Runs of the command that are killed at a step, and resumed.

Each run is a process of its own, forked from one that has imported everything (Python's forkserver), because imports
take seconds and the runs of tests do not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

TIMEOUT = 120

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mvmr.cli", "mvmr.engine.train", "torchvision", "tensorboard", "sklearn.datasets"])


def command(words: list[str], log: Path) -> None:
    """In the new process: `mvmr` with these words, both outputs to a file."""
    os.setsid()  # a group of its own, with its loader's workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell's background job runs the tests
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["mvmr", *words]
    from mvmr.cli import main

    main()


@contextmanager
def started(config: Path, out: Path, *more: str) -> Iterator[tuple[BaseProcess, Path]]:
    """A run that has been started, and the file with what it says."""
    log = out.with_suffix(".log")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the forkserver when it starts
    process = _context.Process(target=command, args=(["train", str(config), "--out", str(out), *more], log))
    process.start()
    try:
        yield process, log
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def steps_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def kill_at(step: int, config: Path, out: Path, with_signal: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """Start a run and signal its whole process group once `step` is logged; its exit status and what it said."""
    with started(config, out) as (process, log):
        deadline = time.monotonic() + TIMEOUT
        while steps_done(out) < step:
            assert process.is_alive(), f"the run ended before step {step}: {log.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert process.pid is not None
        os.killpg(process.pid, with_signal)
        process.join(TIMEOUT)
        assert process.exitcode is not None, "the run goes on"
        return process.exitcode, log.read_text()


def finish(config: Path, out: Path, *more: str) -> None:
    with started(config, out, *more) as (process, log):
        process.join(TIMEOUT)
        assert process.exitcode == 0, f"exit status {process.exitcode}: {log.read_text()}"
