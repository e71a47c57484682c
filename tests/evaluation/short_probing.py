"""Linear layers on augmented digits above a net of a few thousand weights, in a second or so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvmr.data.images import ArraySource, ImageSource
from mvmr.data.sources import DataConfig, open_source
from mvmr.evaluation import Workplace
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, random_encoder

CPU = Workplace(torch.device("cpu"))
SHORT: dict[str, Any] = {"preset": "swav", "epochs": 2, "batch_size": 32, "labels_per_class": 10}
"""Six steps."""


def digits(split: str) -> ImageSource:
    return open_source(DataConfig(name="digits"), split, size=16)


def few(split: str = "test", count: int = 60) -> ImageSource:
    return digits(split).take(torch.arange(count))


def tiny(name: str = "resnet18", **changes: Any) -> Encoder:
    resnet = {"stem": "mvmr", "width": 0.0625, "zero_init_residual": False} if name == "resnet18" else {}
    card = EncoderCard(
        encoder=EncoderConfig(name=name, **resnet), dim=32, image_size=16, mean=(0.3,) * 3, std=(0.4,) * 3,
        method="mvmr", data="digits", version="0",
    ).model_copy(update=changes)  # fmt: skip
    return Encoder(random_encoder(card, seed=0).backbone, card).eval()


def array(labels: Tensor | None, classes: tuple[str, ...] = ()) -> ArraySource:
    return ArraySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels, name="own/train", classes=classes)
