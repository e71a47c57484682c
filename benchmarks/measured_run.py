"""Trains a recipe in a process of its own, so that its time and its peak memory are its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvmr.types import Result


def trained(recipe: str, settings: Sequence[str], run: Path, *, threads: int) -> dict[str, float]:
    """Trains into `run`, its output into RUN.log: minutes on the clock, minutes of processor time, peak gigabytes.

    SystemExit where the command fails.
    """
    words = [sys.executable, "-m", "mvmr", "train", recipe, *settings, "--out", str(run)]
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with open(f"{run}.log", "w") as log:
        process = subprocess.Popen(words, env={**os.environ, **limits}, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recipe}: training failed, see {log.name}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {
        "minutes": (time.monotonic() - started) / 60,
        "processor_minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "peak_gigabytes": kilobytes / 2**20,
    }


def watched(run: Path) -> dict[str, Any]:
    """What the run has logged of itself: images per second (the median), and RankMe and std of the last time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "rankme" in line][-1]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return {
        "images_per_second": statistics.median(speeds),
        "rankme": last["rankme"],
        "embedding_std": last["embedding_std"],
    }


def top1_of(results: Sequence[Result], *, random: bool = False) -> dict[str, float]:
    """{evaluation: top-1 in percent} of the encoder that was given, or of the one with random weights."""
    return {r.evaluation: r.metrics["top1"] for r in results if (r.encoder == "random") == random}
