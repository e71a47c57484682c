"""Two small sources of images that several tests read."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.data.images import ArraySource, FileSource


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """22 images of several shapes."""
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(0)
    for number in range(22):
        pixels = generator.integers(0, 256, (10 + number % 5, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return FileSource(folder, sorted(os.listdir(folder)), None, name="own/pretrain")


@pytest.fixture
def array() -> ArraySource:
    images = torch.arange(22, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return ArraySource(images, None, name="digits/pretrain")
