"""How much a random projection of the hand-crafted features changes distance correlation, on photographs.

    python benchmarks/projection.py [--width N] [--sizes 32,96] [--draws 2] [--json FILE]

256 random crops of scikit-learn's two sample photographs, four embeddings that depend on them in different degrees, and
for each representation the largest |change| of distance correlation (the paper's ratio and its root) between exact
features and what the cache keeps of them: projected to `width`, in float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from mvmr.engine.environment import environment
from mvmr.losses import distance_correlation
from mvmr.ops.projection import Projection
from mvmr.representations import HOG, LocalStd, Scattering
from mvmr.representations.cache import CacheConfig
from mvmr.types import IMAGENET_MEAN, IMAGENET_STD

KINDS = {"scattering": Scattering(), "local_std": LocalStd(), "hog": HOG(), "hog, cell 4": HOG(cell=4)}


def main() -> None:
    arguments = parse()
    table = {}
    for size in map(int, arguments.sizes.split(",")):
        for name, representation in KINDS.items():
            changes = []
            for draw in range(arguments.draws):
                images = crops(size, draw)
                exact = torch.cat([representation(part) for part in images.split(32)])
                kept = Projection(exact.shape[1], arguments.width)(exact).half().float()
                for embedding in embeddings(images, draw).values():
                    for power in (1, 2):
                        before, after = (float(distance_correlation(embedding, x, power=power)) for x in (exact, kept))
                        changes.append(abs(after - before))
            table[f"{name} at {size} px"] = max(changes)
            print(f"{name} at {size} px ({exact.shape[1]} features): {max(changes):.5f}", flush=True)
    if arguments.json:
        record = {"width": arguments.width, "draws": arguments.draws, "largest_change": table}
        arguments.json.write_text(json.dumps({**record, "environment": environment()}, indent=2) + "\n")


def crops(size: int, draw: int) -> Tensor:
    """256 random, normalised crops [256, 3, size, size]."""
    generator = torch.Generator().manual_seed(draw)
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    found = []
    for number in range(256):
        photo = photos[number % 2]
        top, left = (int(torch.randint(0, side - size + 1, (1,), generator=generator)) for side in photo.shape[1:])
        found.append(photo[:, top : top + size, left : left + size])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.stack(found) / 255 - mean) / std


@torch.no_grad()
def embeddings(images: Tensor, draw: int) -> dict[str, Tensor]:
    """{what: [256, D]}: dependent on the images in very different degrees."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        net = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(256, 128),
        )  # fmt: skip
        pixels = images.flatten(1)
        signal = pixels @ torch.randn(pixels.shape[1], 32) / pixels.shape[1] ** 0.5
        noise = torch.randn(len(images), 32)
    return {"net": net(images), "pixels": pixels, "signal and noise": signal + noise, "noise": noise}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=CacheConfig().width)
    parser.add_argument("--sizes", default="32,96,224")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
