from __future__ import annotations

import torch

from mvmr.representations import Pixels


def test_pixels_are_the_image():
    images = torch.randn(2, 3, 5, 7)
    features = Pixels()(images)
    assert features.shape == (2, 105)
    assert torch.equal(features.view(2, 3, 5, 7), images)
