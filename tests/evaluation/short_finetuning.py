"""Fine-tuning of a second or so, on digits by a net of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvmr.data.images import ArraySource, ImageSource
from mvmr.data.sources import DataConfig, open_source
from mvmr.evaluation import Workplace
from mvmr.evaluation.finetune import FinetuneConfig, finetune
from mvmr.evaluation.head import load_head
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, load_encoder, random_encoder

CPU = Workplace(torch.device("cpu"))
# A run of a second or so that learns something.
SHORT: dict[str, Any] = {"fraction": 0.1, "epochs": 2, "batch_size": 32, "encoder_lr": 1e-2}


def digits(split: str) -> ImageSource:
    return open_source(DataConfig(name="digits"), split, size=16)


def tiny(name: str = "resnet18", **changes: Any) -> Encoder:
    resnet = {"stem": "mvmr", "width": 0.125, "zero_init_residual": False} if name == "resnet18" else {}
    card = EncoderCard(
        encoder=EncoderConfig(name=name, **resnet), dim=64, image_size=16, mean=(0.3,) * 3, std=(0.4,) * 3,
        method="mvmr", data="digits", version="0",
    )  # fmt: skip
    card = card.model_copy(update=changes)
    return Encoder(random_encoder(card, seed=0).backbone, card).eval()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def tuned(out: Path, encoder: Encoder | None = None, **changes: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights of encoder and head after a short run, and its metrics."""
    place = Workplace(CPU.device, out=out)
    config = FinetuneConfig(**{**SHORT, **changes})
    metrics = finetune(encoder or tiny(), digits("train"), digits("test"), config, place)
    saved = load_head(out)
    weights = state(load_encoder(out).backbone) | {"head.weight": saved.weight, "head.bias": saved.bias}
    return weights, metrics


def array(labels: Tensor | None, classes: tuple[str, ...] = ()) -> ArraySource:
    return ArraySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels, name="own/train", classes=classes)
