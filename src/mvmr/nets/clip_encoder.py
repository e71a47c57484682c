"""CLIP models of open_clip as encoders that also embed text, for zero-shot classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvmr.nets.cards import Encoder, EncoderCard, seeded
from mvmr.nets.clip import check_text_settings, clip_vector, imported_open_clip, name_parts, quietly
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.pretrained import OPEN_CLIP, open_clip_file
from mvmr.types import UserError

Fit = Literal["shortest", "squash"]


class ClipTowers(nn.Module):
    """Both towers: normalised images [B, 3, S, S] -> embeddings [B, D]; texts by `embed_texts`. Neither is normalised.

    tokenizer: texts -> tokens [P, context] int64. fit: whether images are resized by their shorter side and cut
    ("shortest") or to the square ("squash"). interpolation: with what.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        fit: Fit = "shortest",
        interpolation: str = "bicubic",
    ):
        super().__init__()
        self.clip = clip
        self.fit, self.interpolation = fit, interpolation
        self._tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return clip_vector(self.clip.visual, images)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[P, D] float32 on the device of the weights."""
        clip: Any = self.clip
        device = next(clip.parameters()).device
        return clip.encode_text(self._tokenizer(list(texts)).to(device)).float()


def load_clip(model: str) -> Encoder:
    """open_clip:ARCH/TAG, or open_clip:ARCH@random, with both towers, on the CPU and in eval mode.

    Its features are the projected image embeddings, as those of the teacher of that name. Raises UserError for unknown
    names, without the extra `clip`, and where weights or tokenizer cannot be had.
    """
    clip = imported_open_clip(model)
    arch, tag = name_parts(clip, model, None)
    settings: dict[str, Any] = clip.get_pretrained_cfg(arch, tag) if tag else {}
    file = open_clip_file(settings, model) if tag else None
    check_text_settings(clip.get_model_config(arch), model)
    # These weights were trained with another activation, which some architectures leave to the tag to say.
    options = {"force_quick_gelu": True} if settings.get("quick_gelu") else {}
    try:
        with quietly():
            net = seeded(lambda: clip.create_model(arch, pretrained=file, pretrained_text=False, **options), seed=0)
            tokenizer = clip.get_tokenizer(arch)
    except Exception as error:  # whatever open_clip, or a library that it asks for, raises
        raise UserError(f"{model}: open_clip cannot make it ({type(error).__name__}: {error})") from error
    tower = net.visual
    seen = {
        **tower.preprocess_cfg,
        **{key: settings[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in settings},
    }
    fit: Fit = "squash" if seen.get("resize_mode") == "squash" else "shortest"
    interpolation = "bilinear" if seen["interpolation"] == "bilinear" else "bicubic"
    backbone = ClipTowers(net, tokenizer, fit=fit, interpolation=interpolation).eval()
    side = tower.image_size[0] if isinstance(tower.image_size, tuple) else tower.image_size
    with torch.no_grad():
        dim = backbone(torch.zeros(1, 3, side, side)).shape[1]
    card = EncoderCard(
        # A name that nothing can be trained by: only this function builds it.
        encoder=EncoderConfig.model_construct(name=f"{OPEN_CLIP}{arch}"), dim=dim, image_size=side,
        mean=tuple(seen["mean"]), std=tuple(seen["std"]), method=f"CLIP ({tag})" if tag else "random",
        data="see open_clip", version=f"open_clip {clip.__version__}",
    )  # fmt: skip
    return Encoder(backbone, card).eval()
