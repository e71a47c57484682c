"""Runs of the command that are killed at a step, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT = 120


def command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mvmr", "train", str(config), "--out", str(out), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def steps_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def kill_at(step: int, config: Path, out: Path, with_signal: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """Start a run and signal its whole process group once `step` is logged; its exit status and standard error."""
    process = subprocess.Popen(
        command(config, out), env=environment(), start_new_session=True, stderr=subprocess.PIPE,
        # A shell's background jobs ignore SIGINT, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while steps_done(out) < step:
        assert process.poll() is None, f"the run ended before step {step}: {process.communicate()[1].decode()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, with_signal)
    _, error = process.communicate(timeout=TIMEOUT)
    return process.returncode, error.decode()


def finish(config: Path, out: Path, *more: str) -> None:
    done = subprocess.run(
        command(config, out, *more), env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
