"""Where a vision transformer looks: the class token's attention in its last block (DINO, Caron et al., ICCV 2021,
Figures 1 and 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mvmr.nets.cards import Encoder
from mvmr.ops.modes import evaluating
from mvmr.types import UserError

GAP = 4
"""White pixels between the pictures of a sheet."""
DIMMED = 0.15
"""Brightness that is left to patches outside the mass that is kept."""
HEAT = ((0.0, (0, 0, 4)), (0.25, (87, 16, 110)), (0.5, (188, 55, 84)), (0.75, (249, 142, 9)), (1.0, (252, 255, 164)))
"""Colours from the least to the greatest value of a map, interpolated linearly."""


@torch.no_grad()
def class_attention(encoder: nn.Module, images: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the class token in the last block: [B, 3, H, W] -> [B, heads, tokens], rows sum to 1.

    encoder: a loaded `Encoder`, which takes images as they are, or a timm vision transformer, which takes normalised
    ones. Tokens are in the network's order: prefix tokens (class, registers), then patches row by row. Computed from
    what the block's attention receives, because timm's fused attention returns no weights; in eval mode, in float32
    outside autocast, and the encoder is afterwards as before. Raises UserError for an encoder without a class token
    (a ResNet, a pooled transformer) or with another kind of attention, and for images of a size that it does not take.
    """
    net = encoder.backbone if isinstance(encoder, Encoder) else encoder
    attention = _last_attention(net)
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        with evaluating(encoder), torch.autocast(images.device.type, enabled=False):
            encoder(images)
            return _row_of_the_class_token(attention, seen[0])
    except AssertionError as error:  # timm's refusal of a size
        raise UserError(
            f"the encoder does not take images of {images.shape[-2]} x {images.shape[-1]} pixels ({error}); resize "
            "them, or train with encoder.any_size=true, and take multiples of the patch size"
        ) from None
    finally:
        handle.remove()


def attention_maps(encoder: nn.Module, images: Tensor) -> Tensor:
    """`class_attention` to the patches alone, as pictures: [B, 3, H, W] -> [B, heads, h, w]; errors likewise.

    Values are in [0, 1]; what a map's sum lacks to 1 went to the prefix tokens.
    """
    rows = class_attention(encoder, images)
    net: Any = encoder.backbone if isinstance(encoder, Encoder) else encoder
    height, width = net.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return rows[..., net.num_prefix_tokens :].unflatten(-1, (height, width))


def keep_mass(maps: Tensor, mass: float) -> Tensor:
    """The patches with the highest values that hold a share `mass` of a map: [..., h, w] -> bool [..., h, w].

    The paper's masks keep 0.6. Raises ValueError for a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; it must be in (0, 1]")
    values, order = maps.double().flatten(-2).sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # the sum of what is higher
    kept = before < mass * values.sum(-1, keepdim=True) * (1 - 1e-12)
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(maps.shape)


def write_attention(
    path: str | Path, images: Tensor, maps: Tensor, *, mass: float | None = None, side: int = 128
) -> Path:
    """Write a PNG with one row an image: the image, the mean of its maps over heads, the map of each head.

    images: [B, 3, H, W], uint8 or float in [0, 1]. maps: [B, heads, h, w]. Each map has its own scale, from its least
    to its greatest value; with `mass`, the image is shown instead, dark where `keep_mass` leaves a patch out. side:
    pixels of a picture's shorter side. Raises ValueError for shapes that do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or maps.ndim != 4 or len(maps) != len(images) or len(images) == 0:
        raise ValueError(f"[B, 3, H, W] and [B, heads, h, w] are needed, not {list(images.shape)}, {list(maps.shape)}")
    scale = side / min(images.shape[-2:])
    size = round(images.shape[-1] * scale), round(images.shape[-2] * scale)  # width, height
    whole = maps.float().cpu()
    cells = torch.cat([whole.mean(1, keepdim=True), whole], dim=1)  # [B, 1 + heads, h, w]
    sheet = Image.new(
        "RGB",
        ((size[0] + GAP) * (cells.shape[1] + 1) - GAP, (size[1] + GAP) * len(images) - GAP),
        color=(255, 255, 255),
    )
    for row, image in enumerate(images):
        picture = _picture(image, size)
        shown = [picture, *(_shown(picture, cell, mass) for cell in cells[row])]
        for column, each in enumerate(shown):
            sheet.paste(each, (column * (size[0] + GAP), row * (size[1] + GAP)))
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, format="PNG", optimize=True)
    return file


def _last_attention(net: nn.Module) -> Any:
    from timm.models.vision_transformer import Attention, VisionTransformer

    if not isinstance(net, VisionTransformer):
        raise UserError(
            f"attention maps are of vision transformers, and this encoder is a {type(net).__name__}; take an encoder "
            "trained with encoder.name=timm:vit_..., such as the recipe dino_vit_cpu makes"
        )
    if not net.has_class_token:
        raise UserError("this vision transformer has no class token, whose attention the maps show; take one that has")
    attention = getattr(net.blocks[-1], "attn", None)
    if type(attention) is not Attention:
        raise UserError(
            f"the last block's attention is of the kind {type(attention).__name__}, which has no maps here; take a "
            "plain vision transformer of timm, such as timm:vit_tiny_patch16_224"
        )
    return attention


def _row_of_the_class_token(attention: Any, x: Tensor) -> Tensor:
    """Its softmax over all tokens, from the attention's input [B, tokens, D]: [B, heads, tokens]."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))  # [B, tokens, 3, heads, d]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, tokens, d]
    q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
    return (q * attention.scale @ k.transpose(-2, -1)).float().softmax(-1).squeeze(2)


def _picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """[3, H, W], uint8 or float in [0, 1], enlarged without smoothing where it is small."""
    values = image.detach().cpu()
    if values.is_floating_point():
        values = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    kernel = Image.Resampling.NEAREST if min(image.shape[-2:]) < min(size) else Image.Resampling.LANCZOS
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()).resize(size, kernel)


def _shown(picture: Image.Image, cell: Tensor, mass: float | None) -> Image.Image:
    """One map [h, w] as colours, or as what it keeps of the picture."""
    if mass is None:
        span = (cell.max() - cell.min()).clamp(min=torch.finfo(cell.dtype).tiny)  # an even map stays dark
        share = ((cell - cell.min()) / span).numpy()
        stops = [stop for stop, _ in HEAT]
        channels = [np.interp(share, stops, [colour[c] for _, colour in HEAT]) for c in range(3)]
        colours = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
        return colours.resize(picture.size, Image.Resampling.NEAREST)
    kept = Image.fromarray(keep_mass(cell, mass).numpy().astype(np.uint8) * 255)
    dark = picture.point(lambda value: round(value * DIMMED))
    return Image.composite(picture, dark, kept.resize(picture.size, Image.Resampling.NEAREST))
