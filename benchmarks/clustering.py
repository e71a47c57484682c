"""k-means alone: time, memory and objective, against scikit-learn's on a part of the rows in the same run.

    python benchmarks/clustering.py [--rows 200000] [--clusters 3000] [--part 20000] [--threads 2] [--json FILE]
    python benchmarks/clustering.py --features FILE.npz [--clusters 100] [--part 50000]

Rows are drawn from a mixture and normalised, as DeepCluster's whitened features are, or read from the file that
`mvmr embed` wrote (and whitened and normalised as there). Both start from the same rows, and move the centroids equally
often. Memory is what the process had at most, beyond what it had when the rows were made.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvmr.engine.environment import environment
from mvmr.ops.kmeans import drawn_rows, kmeans
from mvmr.ops.whitening import whitening_of


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    x = rows_of(arguments.features) if arguments.features else made_rows(arguments.rows, arguments.width)
    index = torch.arange(len(x))
    record: dict[str, Any] = {"rows": len(x), "width": x.shape[1], "clusters": arguments.clusters}
    record |= {"threads": arguments.threads, "memory_setting_mib": arguments.memory}

    before, began = peak_mib(), time.perf_counter()
    start = drawn_rows(x, index, arguments.clusters, seed=0)
    found = kmeans(x, start, iterations=arguments.iterations, memory=arguments.memory)
    seconds, moves = time.perf_counter() - began, len(found.inertia) - 1
    record["whole"] = {
        "seconds": seconds,
        "assignments": moves + 1,
        "seconds_per_assignment": seconds / (moves + 1),
        "rows_mib": x.nbytes / 2**20,
        "peak_beyond_rows_mib": peak_mib() - before,
        "empty_clusters": int((found.sizes == 0).sum()),
        "objective": [value / len(x) for value in (found.inertia[0], found.inertia[-1])],
    }
    report("all rows", record["whole"])
    record["part"] = compared(x[: arguments.part], arguments)
    report(f"{record['part']['rows']} rows, against scikit-learn", record["part"])
    if arguments.json:
        arguments.json.write_text(json.dumps({**record, "environment": environment()}, indent=2) + "\n")


def compared(x: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both implementations on the same rows, from one start, one after the other."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    start = drawn_rows(x, torch.arange(len(x)), arguments.clusters, seed=0)
    began = time.perf_counter()
    ours = kmeans(x, start, iterations=arguments.iterations, memory=arguments.memory)
    ours_seconds = time.perf_counter() - began
    settings: dict[str, Any] = {"n_init": 1, "max_iter": arguments.iterations, "tol": 0.0, "algorithm": "lloyd"}
    with threadpool_limits(arguments.threads):
        began = time.perf_counter()
        theirs = KMeans(len(start), init=start.numpy(), **settings).fit(x.numpy())
        theirs_seconds = time.perf_counter() - began
        default = KMeans(len(start), init="k-means++", random_state=0, **settings).fit(x.numpy())
    return {
        "rows": len(x),
        "assignments": len(ours.inertia),
        "scikit_learn_iterations": int(theirs.n_iter_),
        "seconds": ours_seconds,
        "scikit_learn_seconds": theirs_seconds,
        "objective": ours.inertia[-1] / len(x),
        "objective_over_scikit_learns_from_the_same_start": ours.inertia[-1] / float(theirs.inertia_),
        "objective_over_scikit_learns_from_k_means_plus_plus": ours.inertia[-1] / float(default.inertia_),
    }


def made_rows(count: int, width: int) -> Tensor:
    """[count, width] of norm 1 around 5,000 directions, made in parts, so that nothing larger was ever in memory."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5000, width, generator=generator)
    x = torch.empty(count, width)
    for part in x.split(10_000):
        own = centres[torch.randint(len(centres), (len(part),), generator=generator)]
        part.copy_(torch.nn.functional.normalize(own + torch.randn(part.shape, generator=generator), dim=1))
    return x


def rows_of(file: Path) -> Tensor:
    """Features that `mvmr embed` wrote, whitened and of norm 1, as DeepCluster has them."""
    x = torch.from_numpy(np.load(file)["features"])
    return torch.nn.functional.normalize(whitening_of(x, 256)(x), dim=1)


def peak_mib() -> float:
    """The most that this process has had in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def report(title: str, values: dict[str, Any]) -> None:
    print(title)
    for name, value in values.items():
        text = value if isinstance(value, int | list) else f"{value:.5g}"
        print(f"  {name.replace('_', ' ')}: {text}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=3000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--part", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=64)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
