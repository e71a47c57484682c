"""What the projection does to the loss: on photographs, distance correlation stays within 0.01 of the exact one."""

from __future__ import annotations

import pytest
import torch
from projection import crops, embeddings

from mvmr.losses import distance_correlation
from mvmr.ops.projection import Projection
from mvmr.representations import HOG, LocalStd, Representation, Scattering
from mvmr.representations.cache import CacheConfig

IMAGES = crops(32, draw=0)
EMBEDDINGS = embeddings(IMAGES, draw=1)


@pytest.mark.parametrize(
    ("representation", "features"), [(Scattering(), 15552), (LocalStd(), 3072), (HOG(), 1152), (HOG(cell=4), 4608)]
)
def test_distance_correlation_stays_within_a_hundredth(representation: Representation, features: int) -> None:
    config = CacheConfig()
    assert (config.width, config.dtype) == (4096, "float16")
    exact = torch.cat([representation(part) for part in IMAGES.split(32)])
    assert exact.shape == (256, features)
    kept = Projection(features, config.width)(exact).half().float()
    values, changes = [], []
    for embedding in EMBEDDINGS.values():
        for power in (1, 2):
            values.append(float(distance_correlation(embedding, exact, power=power)))
            changes.append(abs(values[-1] - float(distance_correlation(embedding, kept, power=power))))
    assert max(values) - min(values) > 0.2, "the embeddings are alike, and show nothing"
    assert max(changes) <= (0.01 if features > config.width else 1e-4)
    # The test can fail: so narrow a projection does change it.
    narrow = Projection(features, 4)(exact)
    assert abs(float(distance_correlation(EMBEDDINGS["net"], narrow)) - values[1]) > 0.01
