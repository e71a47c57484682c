"""What the pixels of a data set are worth under kNN and linear_fast: the baseline that needs no network.

    python benchmarks/pixels.py digits
    python benchmarks/pixels.py cifar10 --root DIR

`mvmr evaluate representation:pixels` with five draws of few labels beside it.
"""

from __future__ import annotations

import argparse

from mvmr.api import evaluate

PIXELS = "representation:pixels"
DRAWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--root")
    arguments = parser.parse_args()
    where = {"data": arguments.data, "root": arguments.root}
    neighbours, linear = evaluate(PIXELS, **where, on=["knn", "linear_fast"])
    few = [
        evaluate(PIXELS, **where, on=["linear_fast"],
                 settings={"linear_fast.labels_per_class": 10, "linear_fast.seed": seed})[0].metrics["top1"]
        for seed in range(DRAWS)
    ]  # fmt: skip
    print(f"kNN                                        {neighbours.metrics['top1']:.1f}")
    print(f"linear_fast                                {linear.metrics['top1']:.1f}")
    print(f"linear_fast, 10 labels a class, {DRAWS} draws    {sum(few) / DRAWS:.1f}")


if __name__ == "__main__":
    main()
