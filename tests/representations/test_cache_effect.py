"""What the projection does to the loss: on photographs, distance correlation stays within 0.01 of the exact one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from mvmr.losses import distance_correlation
from mvmr.ops.projection import Projection
from mvmr.representations import HOG, LocalStd, Representation, Scattering
from mvmr.representations.base import IMAGENET_MEAN, IMAGENET_STD
from mvmr.representations.cache import CacheConfig


@cache
def crops(size: int = 32) -> Tensor:
    """256 random, normalised crops of scikit-learn's two photographs: [256, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    found = []
    for number in range(256):
        photo = photos[number % 2]
        top, left = (int(torch.randint(0, side - size + 1, (1,), generator=generator)) for side in photo.shape[1:])
        found.append(photo[:, top : top + size, left : left + size])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.stack(found) / 255 - mean) / std


def embeddings(images: Tensor) -> dict[str, Tensor]:
    """{what: [256, D]}: dependent on the images in very different degrees."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(256, 128),
        )  # fmt: skip
    pixels = images.flatten(1)
    signal = pixels @ torch.randn(pixels.shape[1], 32, generator=generator) / pixels.shape[1] ** 0.5
    noise = torch.randn(len(images), 32, generator=generator)
    with torch.no_grad():
        return {"net": net(images), "pixels": pixels, "signal and noise": signal + noise, "noise": noise}


@pytest.mark.parametrize(
    ("representation", "features"), [(Scattering(), 15552), (LocalStd(), 3072), (HOG(), 1152), (HOG(cell=4), 4608)]
)
def test_distance_correlation_stays_within_a_hundredth(representation: Representation, features: int) -> None:
    config = CacheConfig()
    assert (config.width, config.dtype) == (4096, "float16")
    exact = torch.cat([representation(part) for part in crops().split(32)])
    assert exact.shape == (256, features)
    kept = Projection(features, config.width)(exact).half().float()
    values, changes = [], []
    for embedding in embeddings(crops()).values():
        for power in (1, 2):
            values.append(float(distance_correlation(embedding, exact, power=power)))
            changes.append(abs(values[-1] - float(distance_correlation(embedding, kept, power=power))))
    assert max(values) - min(values) > 0.2, "the embeddings are alike, and show nothing"
    assert max(changes) <= (0.01 if features > config.width else 1e-4)
    # The test can fail: so narrow a projection does change it.
    narrow = Projection(features, 4)(exact)
    assert abs(float(distance_correlation(embeddings(crops())["net"], narrow)) - values[1]) > 0.01
