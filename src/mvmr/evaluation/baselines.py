"""Fixed maps of the image in an encoder's place: what learning has to be better than."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvmr import __version__
from mvmr.errors import UserError, nearest
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.representations import REPRESENTATIONS, Representation, build_representations

PREFIX = "representation:"
"""Before the name of a representation, where an encoder is asked for."""


class FixedMap(nn.Module):
    """A representation as a backbone: normalised [B, 3, S, S] -> [B, F]."""

    def __init__(self, representation: Representation):
        super().__init__()
        self.representation = representation

    def forward(self, images: Tensor) -> Tensor:
        return self.representation(images).flatten(1)


def baseline_names() -> list[str]:
    """Representations that can stand in an encoder's place: those that are fixed and need no network."""
    return [name for name, kind in REPRESENTATIONS.items() if not (kind.varies or kind.learned)]


def baseline_encoder(name: str, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Encoder:
    """The encoder that is representation:NAME with its default settings, for images of that size and normalisation.

    Raises UserError for another name, and for images too small for it.
    """
    kind = name.removeprefix(PREFIX)
    if kind not in baseline_names():
        known = ", ".join(PREFIX + each for each in baseline_names())
        raise UserError(f"{name}: no such representation{nearest(kind, baseline_names())}; known: {known}")
    net = FixedMap(build_representations({kind: {}}, mean=mean, std=std)[kind])  # type: ignore[arg-type]
    dim = net(torch.zeros(1, 3, size, size)).shape[1]
    card = EncoderCard(
        encoder=EncoderConfig().model_copy(update={"name": name}), dim=dim, image_size=size, mean=mean, std=std,
        method="fixed", data="none", version=__version__,
    )  # fmt: skip
    return Encoder(net, card).eval()
