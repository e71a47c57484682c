"""Nearest images against scikit-learn's, and their sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import nn

from mvmr.data.images import ArraySource
from mvmr.evaluation import neighbours as module
from mvmr.evaluation.attention import GAP
from mvmr.evaluation.neighbours import neighbour_sheet, neighbours, write_neighbours
from mvmr.evaluation.sheets import CAPTION
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.types import UserError


def test_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(60, 5, generator=generator), 3 * torch.randn(9, 5, generator=generator)
    distance, index = NearestNeighbors(n_neighbors=7, metric="cosine").fit(x.numpy()).kneighbors(queries.numpy())
    similarity, found = neighbours(x, queries, 7)
    assert (found.numpy() == index).all()
    np.testing.assert_allclose(similarity.numpy(), 1 - distance, atol=1e-5)
    monkeypatch.setattr(module, "BLOCK", 1)
    assert torch.equal(neighbours(x, queries, 7)[1], found)
    own = torch.tensor([5, 0, 59])
    _, others = neighbours(x, x[own], 4, own=own)
    _, with_self = neighbours(x, x[own], 5)
    assert torch.equal(with_self, torch.cat([own[:, None], others], dim=1))


def test_equally_near_ones_come_in_order_and_all_can_be_asked_for() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    similarity, found = neighbours(x, x[:1], 3, own=torch.tensor([0]))
    assert found.tolist() == [[1, 3, 2]]
    assert similarity.tolist() == [[1.0, 1.0, 0.0]]
    assert neighbours(x, x[:1], 4)[1].tolist() == [[0, 1, 3, 2]]
    with pytest.raises(UserError, match="k=4: an image has 3 others to be near to; take 1 to 3"):
        neighbours(x, x[:1], 4, own=torch.tensor([0]))
    with pytest.raises(UserError, match="k=0"):
        neighbours(x, x[:1], 0)


def test_sheet_has_a_row_a_query(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    near = images[torch.tensor([[2, 3], [4, 5]])]
    similarity = torch.tensor([[0.98765, 0.5], [1.0, -0.25]])
    file = write_neighbours(tmp_path / "new" / "near.png", images[:2], near, similarity, side=32)
    with Image.open(file) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * (32 + CAPTION) + GAP, 3 * 32 + 2 * GAP, 3)
    large = images.permute(0, 2, 3, 1).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    for row, numbers in enumerate([[0, 2, 3], [1, 4, 5]]):
        for column, number in enumerate(numbers):
            top, left = row * (32 + CAPTION + GAP), column * (32 + GAP)
            assert (sheet[top : top + 32, left : left + 32] == large[number]).all()
            below = sheet[top + 32 : top + 32 + CAPTION, left : left + 32]
            assert (below < 128).any()  # text
    other = write_neighbours(tmp_path / "other.png", images[:2], near, similarity - 0.1, side=32)
    assert other.read_bytes() != file.read_bytes()
    with pytest.raises(ValueError, match=r"\[M, k\] are needed"):
        write_neighbours(tmp_path / "x.png", images[:2], near, similarity[:, :1])


def test_sheets_of_sources(tmp_path: Path) -> None:
    card = EncoderCard(
        encoder=EncoderConfig(), dim=48, image_size=4, mean=(0.5,) * 3, std=(0.2,) * 3, method="none", data="none",
        version="0",
    )  # fmt: skip
    encoder = Encoder(nn.Flatten(), card)
    gallery = ArraySource(torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8), None, name="drawn/train")
    queries = ArraySource(torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8), None, name="drawn/test")
    positions = torch.tensor([3, 0])
    x, asked = encoder(gallery.images), encoder(queries.images)[positions]
    for given, features, own, source in ((queries, asked, None, queries), (None, x[positions], positions, gallery)):
        file = neighbour_sheet(encoder, gallery, tmp_path / "a.png", positions=positions, queries=given, k=3)
        similarity, found = neighbours(x, features, 3, own=own)
        expected = write_neighbours(tmp_path / "b.png", source.images[positions], gallery.images[found], similarity)
        assert file.read_bytes() == expected.read_bytes()
