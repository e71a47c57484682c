"""Label-free signs of health of features: rank, spread, and dependence on known representations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from mvmr.data.images import ImageSource, subset
from mvmr.data.loading import plain_batches
from mvmr.data.view_ops import as_float, normalise
from mvmr.data.view_recipes import VIEW_RECIPES
from mvmr.errors import nearest
from mvmr.evaluation.features import features_of
from mvmr.evaluation.spectra import (
    alignment,
    alpha_req,
    dimension_std,
    effective_dimension,
    entropy_rank,
    lidar,
    uniformity,
)
from mvmr.evaluation.view_features import several_views, view_features
from mvmr.evaluation.workplace import Workplace
from mvmr.losses.distance_correlation import distance_correlation
from mvmr.nets.cards import Encoder
from mvmr.ops.projection import Projection
from mvmr.ops.random import permutation
from mvmr.representations import HOG, LocalStd, Pixels, Scattering
from mvmr.representations.base import Representation
from mvmr.types import RunError, Section, UserError

FIXED: dict[str, type[Representation]] = {"pixels": Pixels, "hog": HOG, "local_std": LocalStd, "scattering": Scattering}
"""The representations of the plain image that features are compared with, with their default settings."""
WIDEST = 16384
"""Representations wider than this are compared through a random projection to it: distances keep to about 1 %."""


class DiagnosticsConfig(Section):
    """Settings of `diagnostics`; the numbers of images and views are those of RankMe's and LiDAR's papers."""

    split: Literal["pretrain", "train", "test"] = "pretrain"
    """Whose images are looked at; pretrain: all that there are to train on, which data sets without labels have too."""
    images: int = Field(default=25_600, ge=8)
    """Plain images of the spectra and deviations; all where there are fewer."""
    pair_images: int = Field(default=2000, ge=8)
    """Of these, for what looks at every pair: uniformity and dependence."""
    representations: tuple[str, ...] = tuple(FIXED)
    """What dependence is measured on; () leaves it out."""
    view_images: int = Field(default=1000, ge=0)
    """LiDAR's n, for alignment too; 0 leaves both out."""
    views: int = Field(default=50, ge=2)
    """LiDAR's q, random views of each image."""
    recipe: str = "simclr"
    """The views: the first kind of this key of VIEW_RECIPES. Compare encoders under the same views only."""
    flip: bool = True
    """false: no mirror images among them, for digits, letters and whatever else has a left and a right."""
    delta: float = Field(default=1e-4, gt=0)
    """LiDAR's delta, added to the variance of views in every direction."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of images and of their views."""

    @field_validator("representations")
    @classmethod
    def _fixed(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FIXED:
                raise ValueError(f"no fixed representation {name!r}{nearest(name, FIXED)}; known: {', '.join(FIXED)}")
        return names

    @field_validator("recipe")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in VIEW_RECIPES:
            raise ValueError(f"no views {name!r}{nearest(name, VIEW_RECIPES)}; known: {', '.join(VIEW_RECIPES)}")
        return name


def splits(config: DiagnosticsConfig) -> tuple[str, str]:
    """Whose images `diagnostics` is given: those of the one split that it looks at."""
    return config.split, config.split


def diagnostics(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: DiagnosticsConfig, workplace: Workplace
) -> dict[str, float]:
    """{"rankme", "alpha", "alpha_r2", "effective_dim", "embedding_std", "std_mean", "std_least", "uniformity",
    "dependence/NAME" ..., "lidar", "alignment"} of an encoder's features; no label is read.

    Looks at `test` where config.split is test, else at `train`, whatever it is; for pretrain give that split there.
    "alpha" and "alpha_r2" are left out where features have too few directions for the fit (see `alpha_req`). On the
    CPU a pure function of its arguments. Raises UserError for images too small for a representation or fewer than 8,
    RunError when features are not finite.
    """
    source = test if config.split == "test" else train
    if len(source) < 8:
        raise UserError(f"diagnostics needs 8 images, and {source.name} has {len(source)}; take more")
    # Shuffled, so that the first so many are a sample too where files lie class by class.
    order = permutation(config.seed, 0, len(source))[: config.images]
    size = encoder.card.image_size
    told = None if workplace.progress is None else partial(workplace.progress, f"features of {source.name}")
    plain = subset(source, order)
    x = features_of(encoder, plain, workers=workplace.workers, device=workplace.device, progress=told).x  # [N, D]
    pairs = subset(source, order[: config.pair_images])
    metrics = spread(x) | {"uniformity": uniformity(x[: len(pairs)])}
    for name in config.representations:
        rows = fixed_rows(name, encoder, pairs, workplace)
        metrics[f"dependence/{name}"] = dependence(x[: len(pairs)], rows)
    if config.view_images:
        chosen = order[: config.view_images]
        settings = several_views(config.recipe, size=size, count=config.views, flip=config.flip)
        views = view_features(encoder, source, chosen, settings, workplace, seed=config.seed)  # [n, q, D]
        metrics |= {"lidar": lidar(views, delta=config.delta), "alignment": alignment(views)}
    if any(math.isnan(value) for value in metrics.values()):
        raise RunError(f"features of {source.name} are not finite: the encoder has diverged")
    return metrics


def spread(x: Tensor) -> dict[str, float]:
    """What `diagnostics` says of features [N, D] alone, without pairs of images or views."""
    deviations = dimension_std(x)
    law = alpha_req(x)
    return {
        "rankme": rankme(x),
        **({} if law is None else {"alpha": law.exponent, "alpha_r2": law.r2}),
        "effective_dim": effective_dimension(x),
        "embedding_std": embedding_std(x),
        "std_mean": deviations.mean().item(),
        "std_least": deviations.min().item(),
    }


def fixed_rows(name: str, encoder: Encoder, source: ImageSource, workplace: Workplace) -> Tensor:
    """A fixed representation [n, F] float32 of every image, normalised as the encoder's; F is at most WIDEST.

    Raises UserError where the images are too small for it.
    """
    card, representation = encoder.card, FIXED[name]()
    projection: Projection | None = None
    rows = []
    try:
        for _, images in plain_batches(source, batch_size=64, size=card.image_size, workers=workplace.workers):
            made = representation(normalise(as_float(images.to(workplace.device)), card.mean, card.std))
            projection = projection or Projection(made.shape[1], WIDEST)
            rows.append(projection(made).cpu())
    except UserError as error:
        raise UserError(f"diagnostics.representations: leave {name} out ({error})") from None
    return torch.cat(rows)


def rankme(x: Tensor) -> float:
    """RankMe (Garrido et al., ICML 2023, Eq. 1): exp of the entropy of the normalised singular values of x [N, D].

    From 1 (all features on one line through the origin) to min(N, D) (equal singular values). Not centred, as in the
    paper. NaN when a feature is not finite, 0 when all are zero.
    """
    if not bool(torch.isfinite(x).all()):
        return math.nan
    return entropy_rank(torch.linalg.svdvals(x.double()))


def embedding_std(x: Tensor) -> float:
    """Mean over dimensions of the deviation of L2-normalised features [N, D], times sqrt(D) (Chen and He, CVPR 2021).

    In [0, 1]: about 1 when directions are spread evenly, 0 when all images have the same one. NaN when a feature is not
    finite.
    """
    unit = functional.normalize(x.double(), dim=1)
    return unit.std(dim=0, correction=0).mean().item() * math.sqrt(x.shape[1])


def dependence(x: Tensor, representation: Tensor) -> float:
    """Unbiased squared distance correlation of features [N, D] and a representation [N, ...] of the same images.

    About 0 without dependence (it may fall a little below), 1 at most. Needs N >= 4.
    """
    return float(distance_correlation(x, representation, power=2, estimator="u"))


# Of 48 ResNets with random weights (18 to 50 layers, all stems, quarter and full width) on CIFAR-10, the least
# deviation was 0.046 and the least RankMe 4.9; of 36 on 16-pixel digits, which leave the last stages one pixel, 0.023
# and 1.37. A constant with 1 % of noise has a deviation of 0.01; features on a line have a RankMe of 1.00.
LEAST_STD = 0.01
LEAST_RANK = 1.25


def collapse_warning(diagnostics: Mapping[str, float], dim: int) -> str | None:
    """What is wrong with features of `dim` dimensions in a sentence, or None; reads "embedding_std" and "rankme".

    Either may be missing. Only states that no healthy encoder passes through are named, not a merely low rank.
    """
    std, rank = diagnostics.get("embedding_std"), diagnostics.get("rankme")
    if any(value is not None and math.isnan(value) for value in (std, rank)):
        return "features are not finite: the encoder has diverged; lower the learning rate"
    if std is not None and std < LEAST_STD and dim > 1:
        return (
            f"features have collapsed to a point: all images have nearly the same one (deviation {std:.1e}, healthy is "
            f"0.1 to 1); lower the learning rate or raise the weight of the variance term"
        )
    if rank is not None and rank < LEAST_RANK and dim > 2:
        return (
            f"features have collapsed to a line: RankMe is {rank:.2f} of {dim} dimensions; lower the learning rate or "
            "raise the weight of the terms that spread features"
        )
    return None
