"""Where a convolutional encoder finds what it finds: Grad-CAM (Selvaraju et al., ICCV 2017, Section 3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mvmr.data.images import ImageSource, subset
from mvmr.evaluation.features import placed
from mvmr.evaluation.head import Head
from mvmr.evaluation.sheets import heat, images_of, picture, write_sheet
from mvmr.nets.cards import Encoder
from mvmr.ops.modes import evaluating
from mvmr.types import UserError

Score = Callable[[Tensor], Tensor]
"""Features [B, D], with gradient, to the score [B] whose map is drawn."""


def grad_cam(encoder: nn.Module, images: Tensor, score: Score, *, layer: str = "layer4") -> Tensor:
    """Eqs. 1 and 2: ReLU of sum_k a_k A^k, a_k the mean over places of d score / d A^k: [B, 3, H, W] -> [B, h, w].

    A: [B, K, h, w], what the module named `layer` gives (at its last call, where it is called more than once); layer4
    is a ResNet's last stage. encoder: a loaded `Encoder`, which takes images as they are, or a network that takes
    normalised ones. Values are float32, 0 or more, in the score's units, and not scaled. In eval mode, in float32
    outside autocast; parameters get no gradient, frozen ones do no harm, and the encoder is afterwards as before.
    Raises UserError for a layer that is missing, not called, or does not give maps, ValueError for a score of another
    shape.
    """
    seen: list[Tensor] = []
    handle = _module(encoder, layer).register_forward_hook(lambda module, given, made: _cut(made, seen))
    try:
        with evaluating(encoder), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            values = score(encoder(images))
            if not seen:
                raise UserError(f"layer={layer}: is not called, or gives no maps [B, K, h, w]; {_advice(encoder)}")
            if values.shape != images.shape[:1]:
                raise ValueError(f"a score is [B], one number an image; this one is {list(values.shape)}")
            (slope,) = torch.autograd.grad(values.sum(), seen[-1:], materialize_grads=True)  # images do not mix
    finally:
        handle.remove()
    weights = slope.mean((2, 3), keepdim=True)  # [B, K, 1, 1]
    return (weights * seen[-1].detach()).sum(1).relu().float()


def class_score(head: Head, classes: Tensor | None = None) -> Score:
    """The head's score, before any softmax, of class `classes` [B] of each image; None: of the class it chooses."""

    def score(x: Tensor) -> Tensor:
        scores = head(x)  # [B, C]
        chosen = scores.argmax(1) if classes is None else classes.to(x.device)
        return scores.gather(1, chosen[:, None])[:, 0]

    return score


def similarity_to(features: Tensor) -> Score:
    """Cosine similarity with other images' features, [B, D] or one for all, [1, D]: no label and no head."""
    return lambda x: functional.cosine_similarity(x, features.detach().to(x), dim=1)


def write_cam(path: str | Path, images: Tensor, maps: Tensor, *, others: Tensor | None = None, side: int = 128) -> Path:
    """Write a PNG with one row an image: the image, its map, both in one, and of `others`, if given, its own.

    images: [B, 3, H, W], uint8 or float in [0, 1]; others likewise. maps: [B, h, w], 0 or more; each is scaled by its
    greatest value. side: pixels of a picture's shorter side. Raises ValueError for shapes that do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or maps.ndim != 3 or not len(maps) == len(images) > 0:
        raise ValueError(f"[B, 3, H, W] and [B, h, w] are needed, not {list(images.shape)} and {list(maps.shape)}")
    if others is not None and others.shape != images.shape:
        raise ValueError(f"others must be {list(images.shape)} as the images are, not {list(others.shape)}")
    rows = []
    for number, (image, values) in enumerate(zip(images, maps, strict=True)):
        shown = picture(image, side)
        greatest = values.max().clamp(min=torch.finfo(values.dtype).tiny)  # a map of zeros stays dark
        colours = heat(values / greatest, shown.size)
        row = [shown, colours, Image.blend(shown, colours, 0.5)]
        rows.append(row if others is None else [*row, picture(others[number], side)])
    return write_sheet(path, rows)


@torch.no_grad()
def cam_sheet(
    encoder: Encoder,
    source: ImageSource,
    positions: Tensor,
    path: str | Path,
    *,
    head: Head | None = None,
    like: Tensor | None = None,
    layer: str = "layer4",
) -> Path:
    """A `write_cam` sheet of the images at `positions` [B] of a source, on the CPU.

    With `head`, of the class that it chooses; with `like` [B], of the similarity to the images at those positions.
    Raises UserError where not one of the two is given, or lengths differ, and as `grad_cam` does.
    """
    if (head is None) == (like is None):
        raise UserError("give either a head, whose class is explained, or other images to be like")
    if like is not None and len(like) != len(positions):
        raise UserError(f"{len(positions)} images are to be compared with {len(like)}; give as many of each")
    size = encoder.card.image_size
    images = images_of(subset(source, positions), size)
    others = None if like is None else images_of(subset(source, like), size)
    with placed(encoder, "cpu"):
        if others is not None:
            with evaluating(encoder):
                score = similarity_to(encoder(others))
        else:
            assert head is not None
            score = class_score(head)
        maps = grad_cam(encoder, images, score, layer=layer)
    return write_cam(path, images, maps, others=others)


def _network(encoder: nn.Module) -> nn.Module:
    return encoder.backbone if isinstance(encoder, Encoder) else encoder


def _module(encoder: nn.Module, layer: str) -> nn.Module:
    try:
        return _network(encoder).get_submodule(layer)
    except AttributeError:
        raise UserError(f"layer={layer}: the encoder has no module of that name; {_advice(encoder)}") from None


def _advice(encoder: nn.Module) -> str:
    net = _network(encoder)
    names = ", ".join(name for name, _ in net.named_children())
    return f"a {type(net).__name__} has {names}; for vision transformers there are attention maps"


def _cut(made: Any, seen: list[Tensor]) -> Any:
    """The layer's output as the start of the graph: what comes before needs no gradient, and may be frozen."""
    if not isinstance(made, Tensor) or made.ndim != 4:
        return None
    start = made.detach().requires_grad_()
    seen.append(start)
    return start.clone()  # what follows may work in place
