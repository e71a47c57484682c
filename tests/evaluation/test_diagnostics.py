from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.diagnostics import collapse_warning, dependence, embedding_std, rankme
from mvmr.evaluation.features import extract
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, random_encoder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def orthonormal(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(*values: float) -> Tensor:
    d = len(values)
    return orthonormal(40, d) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ orthonormal(d, d).T


def measured(x: Tensor) -> dict[str, float]:
    return {"embedding_std": embedding_std(x), "rankme": rankme(x)}


def warning(x: Tensor) -> str | None:
    return collapse_warning(measured(x), x.shape[1])


def test_rankme_of_known_spectra() -> None:
    assert rankme(orthonormal(64, 16)) == pytest.approx(16, rel=1e-4)
    assert rankme(orthonormal(16, 16)[:5]) == pytest.approx(5, rel=1e-4)  # fewer images than dimensions
    assert rankme(torch.randn(30, 1) * torch.randn(1, 20)) == pytest.approx(1, abs=1e-4)
    assert rankme(with_spectrum(2, 1, 1)) == pytest.approx(2**1.5, rel=1e-5)  # entropy of 1/2, 1/4, 1/4
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    assert rankme(with_spectrum(*(7 * p).tolist())) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)


def test_rankme_has_the_papers_epsilon() -> None:
    p = torch.tensor([1 + 1e-7, 1e-7, 1e-7], dtype=torch.float64)
    expected = torch.exp(-(p * p.log()).sum()).item()
    found = rankme(with_spectrum(3, 0, 0))
    assert found - 1 == pytest.approx(expected - 1, rel=1e-3)
    assert found > 1


def test_rankme_of_scaled_turned_and_degenerate_features() -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    assert rankme(1e-3 * x @ orthonormal(8, 8)) == pytest.approx(rankme(x), rel=1e-6)
    assert rankme(torch.zeros(5, 3)) == 0.0
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan]])))


def test_embedding_std_of_known_distributions() -> None:
    axes = torch.cat([torch.eye(12), -torch.eye(12)])
    assert embedding_std(axes) == pytest.approx(1.0)
    assert embedding_std(3.7 * axes) == pytest.approx(1.0)  # lengths do not matter
    assert embedding_std(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.01)
    assert embedding_std(torch.ones(10, 5)) == pytest.approx(0.0, abs=1e-12)
    assert embedding_std(torch.rand(10, 1) * torch.randn(1, 5)) == pytest.approx(0.0, abs=1e-6)
    one_or_other = torch.eye(4)[[0, 0, 1, 1]]  # two of four dimensions, each 0 or 1 half of the time
    assert embedding_std(one_or_other) == pytest.approx(2 * 0.5 / 4 * math.sqrt(4))


def u_centred(x: Tensor) -> list[list[float]]:
    """Szekely and Rizzo (2014), Eq. 2.2, one entry at a time."""
    n, rows = len(x), x.flatten(1).tolist()
    a = [[math.dist(p, q) for q in rows] for p in rows]
    sums, total = [sum(row) for row in a], sum(map(sum, a))
    return [
        [
            0.0 if i == j else a[i][j] - (sums[i] + sums[j]) / (n - 2) + total / ((n - 1) * (n - 2))
            for j in range(n)
        ]
        for i in range(n)
    ]  # fmt: skip


def test_dependence_is_the_unbiased_squared_distance_correlation() -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    y = (x[:, :2].sin() + 0.1 * torch.randn(40, 2, dtype=torch.float64)).reshape(40, 1, 2)
    a, b = u_centred(x), u_centred(y)

    def product(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(s * t for left, right in zip(p, q, strict=True) for s, t in zip(left, right, strict=True))

    assert dependence(x, y) == pytest.approx(product(a, b) / math.sqrt(product(a, a) * product(b, b)), abs=1e-10)
    assert dependence(x, 5 - 2 * x) == pytest.approx(1.0)
    assert dependence(x, torch.ones(40, 3)) == 0.0
    independent = [dependence(torch.randn(60, 20), torch.randn(60, 30)) for _ in range(20)]
    assert abs(sum(independent) / 20) < 0.02  # the biased estimate would say 0.5


def test_collapse_to_a_point_is_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (16, 128, 512):
        constant = torch.randn(1, dim, generator=generator)
        for noise in (0.0, 1e-6, 1e-3):
            sentence = warning(constant + noise * torch.randn(256, dim, generator=generator))
            assert sentence is not None
            assert "collapsed to a point" in sentence
        assert "collapsed to a point" in str(warning(torch.rand(256, 1, generator=generator) * constant))


def test_collapse_to_a_line_is_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (16, 128, 512):
        line = torch.randn(256, 1, generator=generator) * torch.randn(1, dim, generator=generator)
        for noise in (0.0, 1e-4):
            sentence = warning(line + noise * torch.randn(256, dim, generator=generator))
            assert sentence is not None
            assert f"collapsed to a line: RankMe is 1.0{sentence[sentence.index('1.0') + 3]} of {dim}" in sentence


def test_divergence_is_reported() -> None:
    assert "not finite" in str(warning(torch.full((10, 8), math.nan)))


def test_what_is_missing_is_not_judged() -> None:
    assert collapse_warning({}, 128) is None
    assert collapse_warning({"rankme": 1.01, "dependence/hog": 0.3}, 2) is None  # two dimensions have no room
    assert "line" in str(collapse_warning({"rankme": 1.01}, 128))


def natural_images(count: int) -> Tensor:
    """Images with the 1/f amplitude of natural ones and colours that vary together: [N, 3, 32, 32] uint8."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(32)[:, None].square() + torch.fft.fftfreq(32)[None].square()
    amplitude = 1 / frequency.sqrt().clamp_min(1 / 32)
    grey, colour = (
        torch.randn(count, 1, 32, 32, generator=generator),
        torch.randn(count, 3, 32, 32, generator=generator),
    )
    pattern = torch.fft.ifft2(torch.fft.fft2(grey + 0.3 * colour) * amplitude).real
    return (120 + 60 * pattern / pattern.std()).clamp(0, 255).to(torch.uint8)


def encoder_of(config: EncoderConfig, dim: int, seed: int) -> Encoder:
    card = EncoderCard(
        encoder=config, dim=dim, image_size=32, mean=(0.48,) * 3, std=(0.25,) * 3, method="mvmr", data="x", version="0",
    )  # fmt: skip
    return random_encoder(card, seed)


@pytest.mark.parametrize("stem", ["cifar", "mvmr", "imagenet"])
@pytest.mark.parametrize("zero_init", [True, False])
def test_random_encoders_are_no_collapse(stem: str, zero_init: bool) -> None:
    encoder = encoder_of(EncoderConfig(width=0.25, stem=stem, zero_init_residual=zero_init), 128, seed=0)
    images = natural_images(64)
    x = extract(encoder, [(torch.arange(64), images)], device="cpu")
    assert warning(x) is None, measured(x)


def test_a_trained_encoder_is_no_collapse_and_a_ruined_one_is() -> None:
    digits = load_digits()
    grey = torch.tensor(digits.images[:256] * 15.9).to(torch.uint8)[:, None]
    images = functional.interpolate(grey, 16).expand(-1, 3, -1, -1)
    y = torch.tensor(digits.target[:256])
    encoder = encoder_of(EncoderConfig(width=0.125, stem="mvmr"), 64, seed=0).train()
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(40):
        loss = functional.cross_entropy(head(encoder(images)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    x = extract(encoder, [(torch.arange(256), images)], device="cpu")
    assert warning(x) is None, measured(x)
    last = encoder.backbone.layer4[1]
    torch.nn.init.zeros_(last.bn2.weight)  # the last block adds a constant that drowns what it is given
    torch.nn.init.constant_(last.bn2.bias, 1e4)
    assert "collapsed to a point" in str(warning(extract(encoder, [(torch.arange(256), images)], device="cpu")))
