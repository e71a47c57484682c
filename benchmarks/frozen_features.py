"""Classifiers on frozen features at CIFAR's size: time, memory and agreement, against scikit-learn in the same run.

    python benchmarks/frozen_features.py [--train 50000] [--test 10000] [--width 512] [--threads 2] [--json FILE]
    python benchmarks/frozen_features.py --features TRAIN.npz TEST.npz

Features are those that `mvmr embed` wrote, or drawn: correlated, non-negative and heavy-tailed, as behind a ReLU, with
classes that overlap. `linear_fast` chooses its regularisation; scikit-learn's logistic regression is then fitted once
at that strength. Memory is what the process had at most, beyond what it had with the features in memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from mvmr.engine.environment import environment
from mvmr.evaluation.knn import KNNConfig, knn
from mvmr.evaluation.linear import LinearFastConfig, linear_fast
from mvmr.evaluation.regularisation import standardisation
from mvmr.types import Features


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.features:
        train, test = (read(path) for path in arguments.features)
    else:
        made = drawn_elsewhere(arguments.train + arguments.test, arguments.width)
        train, test = (
            Features(part, labels)
            for part, labels in zip(
                *(each.split([arguments.train, arguments.test]) for each in made), strict=True
            )
        )  # fmt: skip
    record: dict[str, Any] = {
        "train": list(train.x.shape), "test": list(test.x.shape), "threads": arguments.threads,
        "features": "file" if arguments.features else "drawn",
    }  # fmt: skip
    before = peak_mib()
    began = time.perf_counter()
    found = knn(train, test, KNNConfig())
    record["knn"] = {
        "seconds": time.perf_counter() - began, "top1": found["top1"], "peak_beyond_features_mib": peak_mib() - before,
    }  # fmt: skip
    report("kNN", record["knn"])
    with threadpool_limits(arguments.threads):
        record["scikit_learn_knn"] = neighbours(train, test)
        report("scikit-learn's kNN, exact, the same votes", record["scikit_learn_knn"])
        began = time.perf_counter()
        ours = linear_fast(train, test, LinearFastConfig())
        record["linear_fast"] = {"seconds": time.perf_counter() - began, "top1": ours["top1"], "l2": ours["l2"]}
        report("linear_fast, with the choice of l2", record["linear_fast"])
        began = time.perf_counter()
        fixed = linear_fast(train, test, LinearFastConfig(l2=ours["l2"]))
        record["linear_fast_fixed"] = {"seconds": time.perf_counter() - began, "top1": fixed["top1"]}
        report("linear_fast, at that l2", record["linear_fast_fixed"])
        record["scikit_learn"] = logistic(train, test, ours["l2"])
        report("scikit-learn's logistic regression, at that l2", record["scikit_learn"])
    ratio = record["linear_fast_fixed"]["seconds"] / record["scikit_learn"]["seconds"]
    print(f"linear_fast / scikit-learn, time at one l2: {ratio:.2f}")
    print(f"difference in top-1: {ours['top1'] - record['scikit_learn']['top1']:+.2f} points")
    print(f"kNN / scikit-learn, time: {record['knn']['seconds'] / record['scikit_learn_knn']['seconds']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**record, "environment": environment()}, indent=2) + "\n")


def neighbours(train: Features, test: Features) -> dict[str, float]:
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: np.ndarray) -> np.ndarray:
        similarity = 1 - distances
        return np.exp((similarity - similarity[:, :1]) / KNNConfig().temperature)

    began = time.perf_counter()
    judge = KNeighborsClassifier(KNNConfig().k, weights=weights, metric="cosine", algorithm="brute")
    score = judge.fit(train.x.numpy(), train.y).score(test.x.numpy(), test.y)
    return {"seconds": time.perf_counter() - began, "top1": 100 * score}


def logistic(train: Features, test: Features, l2: float) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    shift, scale = standardisation(train.x.double())
    x, x_test = (((part.x.double() - shift) * scale).numpy() for part in (train, test))
    began = time.perf_counter()
    judge = LogisticRegression(C=1 / l2, tol=1e-6, max_iter=5000).fit(x, train.y.numpy())
    return {"seconds": time.perf_counter() - began, "top1": 100 * judge.score(x_test, test.y.numpy())}


def drawn(count: int, width: int, *, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count, width] and labels [count]."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (count,), generator=generator)
    latent = torch.randn(count, 64, generator=generator) + 1.5 * torch.eye(classes, 64)[y]
    mixing = torch.randn(64, width, generator=generator)
    return (latent @ mixing / 8 + 0.5 * torch.randn(count, width, generator=generator)).relu_().square_(), y


def drawn_elsewhere(count: int, width: int) -> list[torch.Tensor]:
    """`drawn` by another process, so that what drawing needs is not in this one's peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        work = multiprocessing.get_context("spawn").Process(target=write_drawn, args=(folder, count, width))
        work.start()
        work.join()
        if work.exitcode:
            raise SystemExit(f"drawing features failed with status {work.exitcode}")
        return [torch.from_numpy(np.load(Path(folder, name))) for name in ("x.npy", "y.npy")]


def write_drawn(folder: str, count: int, width: int) -> None:
    x, y = drawn(count, width)
    np.save(Path(folder, "x.npy"), x.numpy())
    np.save(Path(folder, "y.npy"), y.numpy())


def read(path: Path) -> Features:
    with np.load(path) as file:
        return Features(torch.from_numpy(file["features"]), torch.from_numpy(file["labels"]))


def peak_mib() -> float:
    """The most that this process has had in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def report(title: str, values: dict[str, float]) -> None:
    print(
        title + ": " + ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in values.items()), flush=True
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--features", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
