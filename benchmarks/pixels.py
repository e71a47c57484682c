"""What the raw pixels of a data set are worth under kNN and linear_fast: the baseline that needs no encoder.

python benchmarks/pixels.py digits
python benchmarks/pixels.py cifar10 --root DIR
"""

from __future__ import annotations

import argparse

from mvmr.data.sources import ArraySource, DataConfig, open_source
from mvmr.evaluation.knn import KNNConfig, knn
from mvmr.evaluation.linear import LinearFastConfig, linear_fast
from mvmr.types import Features

DRAWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--root")
    arguments = parser.parse_args()
    config = DataConfig(name=arguments.data, root=arguments.root)
    sources = [open_source(config, split, size=32) for split in ("train", "test")]
    assert all(isinstance(source, ArraySource) for source in sources), "needs images of one size, held in memory"
    train, test = (Features(s.images.flatten(1).float() / 255, s.labels, s.classes) for s in sources)
    few = [linear_fast(train, test, LinearFastConfig(labels_per_class=10, seed=seed))["top1"] for seed in range(DRAWS)]
    print(f"{arguments.data}: {train.x.shape[1]} pixel values")
    print(f"kNN                                        {knn(train, test, KNNConfig())['top1']:.1f}")
    print(f"linear_fast                                {linear_fast(train, test, LinearFastConfig())['top1']:.1f}")
    print(f"linear_fast, 10 labels a class, {DRAWS} draws    {sum(few) / DRAWS:.1f}")


if __name__ == "__main__":
    main()
