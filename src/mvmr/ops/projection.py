"""A fixed random projection that keeps distances: the sparse Johnson-Lindenstrauss map called a count sketch.

Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002; Weinberger et al., "Feature hashing
for large scale multitask learning", 2009, Lemma 2 (unbiased norms and their variance).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.random import permutation, uniform

__all__ = ["PROJECTION_VERSION", "Projection"]

PROJECTION_VERSION = 1
"""Raised whenever the map changes, so that what was kept of the old one is not mixed with the new."""

_SIGN_STREAM = 0xFFFFFFFD
"""The stream of the signs; the streams of views are small numbers, the two above are `permutation` and loading's."""


class Projection:
    """(P x)_j = sum over the coordinates i of bucket j of s_i x_i: [B, F] float -> [B, width] float32.

    A random shuffle deals the F coordinates out to `width` buckets that differ by one coordinate at most; s_i is a
    random sign. E |P x|^2 = |x|^2, with a variance of about 2 |x|^4 / width where no coordinate dominates, and memory
    is O(F). A pure function of (features, width, seed), with the same bits on CPU and GPU and for any batch, because a
    bucket is added up one coordinate after another. The identity where features <= width.
    Raises ValueError for sizes below 1, and for rows of another length.
    """

    def __init__(self, features: int, width: int, seed: int = 0):
        if features < 1 or width < 1:
            raise ValueError(f"a projection needs features and width of at least 1, not {features} and {width}")
        self.features, self.width = features, min(features, width)
        self.is_identity = features <= width
        if self.is_identity:
            return
        order = permutation(seed, 0, features)
        draws = uniform(seed, 0, torch.arange(features), _SIGN_STREAM, 1)[:, 0]
        signs = torch.where(draws < 0.5, -1.0, 1.0).float()
        # One block a round of dealing: [coordinates dealt, at most width] of each.
        self._rounds = list(zip(order.split(width), signs.split(width), strict=True))
        self._device = torch.device("cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, width], on the device of x."""
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"this projection takes rows [B, {self.features}], not {list(x.shape)}")
        if self.is_identity:
            return x.float()
        if self._device != x.device:
            self._rounds = [(dealt.to(x.device), signs.to(x.device)) for dealt, signs in self._rounds]
            self._device = x.device
        projected = x.new_zeros(len(x), self.width, dtype=torch.float32)
        for dealt, signs in self._rounds:
            projected[:, : len(dealt)] += x.index_select(1, dealt).float().mul_(signs)
        return projected
