"""OSS's projection head, one network read with and without dropout (Choi, Kang, Oh, NeurIPS 2021, Section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvmr.nets.multicrop import encode_views
from mvmr.ops.dropout import dropped, kept_units
from mvmr.ops.layers import mlp

VIEWS = 1 << 16
"""More views than an image ever has: numbers of masks count views within networks."""


class DropoutHead(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: [n, dim] -> [n, out]; under the parameter names of SwAV's projector.

    `with_dropout` is h^drop, which shares the weights: dropout follows each Linear ("linear", as the paper says), or
    the ReLU and the last Linear ("relu"). rates: of the two. tracks_statistics: False keeps batch norm's running
    statistics as they are in that pass. number: tells the masks of several heads apart.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        rates: tuple[float, float],
        after: Literal["linear", "relu"] = "linear",
        tracks_statistics: bool = True,
        number: int = 0,
    ):
        super().__init__(*mlp(widths, bias=True))
        self.rates, self.after, self.tracks_statistics, self.number = rates, after, tracks_statistics, number
        self.widths = tuple(widths[1:])

    def with_dropout(self, features: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """h^drop of V views of B images: [V, B, dim], index [B], key [2] -> [V, B, out].

        Every view of every image has masks of its own, which depend on the key and the image's index alone.
        """
        first, norm, relu, last = self
        with _statistics_untouched(norm, self.tracks_statistics):
            x = first(features.flatten(0, 1))  # [V B, hidden]
            if self.after == "linear":
                x = relu(norm(self._dropped(x, 0, features, index, key)))
            else:
                x = self._dropped(relu(norm(x)), 0, features, index, key)
            return self._dropped(last(x), 1, features, index, key).unflatten(0, features.shape[:2])

    def _dropped(self, x: Tensor, layer: int, features: Tensor, index: Tensor, key: Tensor) -> Tensor:
        rate = self.rates[layer]
        if rate == 0.0:
            return x
        streams = [(self.number * VIEWS + view) * 2 + layer for view in range(len(features))]
        kept = [kept_units(key, index, stream, width=self.widths[layer], rate=rate) for stream in streams]
        return dropped(x, torch.cat(kept), rate)


class Branch(nn.Module):
    """An encoder and its head, as teacher and student of OSS are; the settings are those of `DropoutHead`."""

    def __init__(
        self,
        encoder: nn.Module,
        widths: Sequence[int],
        *,
        rates: tuple[float, float],
        after: Literal["linear", "relu"],
        tracks_statistics: bool,
        number: int,
    ):
        super().__init__()
        self.encoder, self.dim = encoder, widths[0]
        self.projector = DropoutHead(
            widths, rates=rates, after=after, tracks_statistics=tracks_statistics, number=number
        )

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """Features of all views, as `encode_views` has them: [V, B, C, H, W] of every stream -> [all V, B, dim]."""
        return encode_views(self.encoder, streams)

    def project(self, features: Tensor) -> Tensor:
        """The head h of all views at once: [V, B, dim] -> [B, V, out]."""
        return self.projector(features.flatten(0, 1)).unflatten(0, features.shape[:2]).transpose(0, 1)

    def project_with_dropout(self, features: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """The same with dropout, h^drop: [V, B, dim], index [B], key [2] -> [B, V, out]."""
        return self.projector.with_dropout(features, index, key).transpose(0, 1)


@contextmanager
def _statistics_untouched(norm: nn.Module, tracked: bool) -> Iterator[None]:
    if tracked or not isinstance(norm, _BatchNorm):
        yield
        return
    momentum, batches = norm.momentum, norm.num_batches_tracked
    norm.momentum = 0.0
    norm.num_batches_tracked = None if batches is None else batches.clone()
    try:
        yield
    finally:
        norm.momentum, norm.num_batches_tracked = momentum, batches
