"""Semantic segmentation: a fully convolutional head on the encoder, both trained, by MoCo's protocol for VOC2012."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from mvmr.data.segmentation import IGNORED, SegmentationSource, SegmentedImage, open_segmentation
from mvmr.data.segmentation_views import CropSettings, SegmentationViews, shortened
from mvmr.data.sources import DataConfig
from mvmr.data.workers import in_workers
from mvmr.evaluation.confusions import confusion, segmentation_metrics
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.resume import Resumable
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.nets.segmenters import Dilation, Segmenter, build_segmenter
from mvmr.ops.files import write_bytes
from mvmr.ops.modes import evaluating
from mvmr.representations.teacher import digest
from mvmr.types import RunError, Section, UserError

SEGMENTER_FILE = "segmenter.safetensors"
CHECK_STEPS = 50
"""How often the loss is looked at; a GPU is waited for then."""


class SemanticConfig(Section):
    """Settings of `semantic`; the defaults are MoCo's (He et al., CVPR 2020, appendix) where nothing else is said."""

    train_annotations: Path | None = None
    """COCO instances JSON of the training split; null: what `open_segmentation` finds under data.root."""
    test_annotations: Path | None = None
    """COCO instances JSON of the test split; null: likewise."""
    iterations: int = Field(default=30_000, ge=1)
    """Steps; the last counts, never the best."""
    batch_size: int = Field(default=16, ge=1)
    """Crops a step."""
    crop: int = Field(default=513, ge=16)
    """Side of the crops in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range from which an image's scale is drawn, uniformly."""
    flip: bool = True
    """Mirror every second crop."""
    short_side: int | None = Field(default=None, ge=16)
    """Resize images to this shorter side first, in testing too; null: as they are. For small machines."""
    lr: float = Field(default=0.003, gt=0)
    """Rate of the encoder, and of the head."""
    head_lr: float | None = Field(default=None, gt=0)
    """Rate of the head; null: that of the encoder."""
    drops: tuple[float, ...] = (0.7, 0.9)
    """Shares of the run after which the rates fall to a tenth."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD; chosen here."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Of all parameters."""
    dilation: Dilation = "moco"
    """The last stage at twice its resolution: moco, all its 3x3 convolutions at dilation 2; torchvision, those behind
    the former stride; none, the backbone as it is."""
    head_channels: int = Field(default=256, ge=1)
    """Channels of the head's 3x3 convolutions."""
    head_convolutions: int = Field(default=2, ge=0)
    """How many it has; 0 is a linear layer on the last map."""
    head_dilation: int = Field(default=6, ge=1)
    """Their dilation; 1 for a plain head."""
    freeze_batch_norm: bool = False
    """Normalise the encoder by its pretrained running statistics; scale and shift are still trained."""
    freeze_encoder: bool = False
    """Train the head alone."""
    seed: int = Field(default=0, ge=0)
    """Seed of the head, the order and the crops."""

    @field_validator("scale")
    @classmethod
    def _range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {list(scale)}; give two numbers above 0, the smaller first")
        return scale

    @field_validator("drops")
    @classmethod
    def _shares(cls, drops: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share < 1 for share in drops) or list(drops) != sorted(drops):
            raise ValueError(f"drops are {list(drops)}; give shares between 0 and 1, in order")
        return drops

    @model_validator(mode="after")
    def _more_than_one_value(self) -> SemanticConfig:
        if self.batch_size == 1 and self.crop <= 32:
            raise ValueError("batch norm may see one value a channel; take a larger batch_size or crop")
        return self


def semantic(encoder: Encoder, data: DataConfig, config: SemanticConfig, workplace: Workplace) -> Metrics:
    """{"miou", "miou_low", "miou_high", "pixel_accuracy", "loss_first", "loss_last", "n_train", "iou/CLASS"...}.

    Trains a copy of the encoder and a head by per-pixel cross-entropy on the training split, then labels whole test
    images. miou is over the classes that are in the truth or predicted; its interval is of 95 %, over test images; both
    and accuracy in percent. loss_first and loss_last are means over the first and the last tenth of the steps.
    `workplace.out` gets segmenter.safetensors, and what a killed training needs to go on. Raises UserError for data,
    encoders or settings that do not fit, RunError when the loss is not finite.
    """
    train, test = _open_pair(data, config)
    segmenter, losses = train_segmenter(encoder, train, config, workplace)
    if workplace.out is not None:
        _save(segmenter, workplace.out / SEGMENTER_FILE)
    matrices = confusions_of(segmenter, test, config, workplace)
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth].mean().item(), losses[-tenth:].mean().item()
    return segmentation_metrics(matrices, test.classes).also(
        loss_first=first, loss_last=last, n_train=float(len(train))
    )


def fingerprints(data: DataConfig, config: SemanticConfig) -> dict[str, str]:
    """Of the label maps that `semantic` is of."""
    train, test = _open_pair(data, config)
    return {"train": train.fingerprint, "test": test.fingerprint}


def _open_pair(data: DataConfig, config: SemanticConfig) -> tuple[SegmentationSource, SegmentationSource]:
    train = open_segmentation(data, "train", annotations=config.train_annotations)
    test = open_segmentation(data, "test", annotations=config.test_annotations)
    if train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"the train and test splits have different classes ({', '.join(other[:5]) or 'in another order'}); give "
            "two splits of one data set as semantic.train_annotations and semantic.test_annotations"
        )
    return train, test


def train_segmenter(
    encoder: Encoder, source: SegmentationSource, config: SemanticConfig, workplace: Workplace
) -> tuple[Segmenter, Tensor]:
    """A segmenter trained on `source`, in eval mode, and the loss [iterations] of each step; the encoder is untouched.

    bf16 autocast on a GPU that has it, else float32. On the CPU a pure function of (encoder, source, config).
    """
    device = workplace.device
    segmenter = build_segmenter(
        encoder, len(source.classes), dilation=config.dilation, channels=config.head_channels,
        convolutions=config.head_convolutions, head_dilation=config.head_dilation, seed=config.seed,
    ).to(device)  # fmt: skip
    _set_modes(segmenter, config)
    optimizer = _optimizer(segmenter, config)
    losses, done = torch.zeros(config.iterations, device=device), 0
    resumable = _resumable(encoder, source, config, workplace)
    kept = resumable.kept()
    if kept is not None:
        segmenter.load_state_dict(kept["segmenter"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["done"]
        losses[:done] = kept["losses"].to(device)
    views = SegmentationViews(source, _crops(encoder, config), seed=config.seed)
    parts = [range(step * config.batch_size, (step + 1) * config.batch_size) for step in range(done, config.iterations)]
    with torch.enable_grad():
        for images, labels in in_workers(views.batch, parts, workers=workplace.workers):
            scale = 0.1 ** sum(done >= share * config.iterations for share in config.drops)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            loss = _loss(segmenter, images.to(device), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[done] = loss.detach()
            done += 1
            if done % CHECK_STEPS == 0 or done == config.iterations:
                _check(losses[:done])

            def state(done: int = done) -> dict:
                return {
                    "segmenter": segmenter.state_dict(), "optimizer": optimizer.state_dict(), "done": done,
                    "losses": losses[:done].clone(),
                }  # fmt: skip

            if done == config.iterations:
                resumable.every_seconds = 0  # kept whole until the result is there
            resumable.keep(state)
            if workplace.progress is not None:
                workplace.progress("training on label maps", done, config.iterations)
    return segmenter.eval(), losses.cpu()


@torch.no_grad()
def confusions_of(
    segmenter: Segmenter, source: SegmentationSource, config: SemanticConfig, workplace: Workplace
) -> Tensor:
    """[M, C, C] int32: each image's confusion matrix, true classes as rows. Whole images, one by one.

    With `config.short_side` images are made smaller, and scores are enlarged to the label map's own size.
    """
    segmenter.to(workplace.device)
    classes, found = len(source.classes), []
    with evaluating(segmenter):
        tested = in_workers(
            partial(_test_image, source, config.short_side), range(len(source)), workers=workplace.workers
        )
        for image, labels in tested:
            scores = segmenter.scores(image[None].to(workplace.device)).float()
            full = functional.interpolate(scores, size=labels.shape, mode="bilinear", align_corners=False)
            matrix = confusion(full.argmax(1)[0].cpu(), labels, classes)
            found.append(matrix.to(torch.int32))
            if workplace.progress is not None:
                workplace.progress("testing on label maps", len(found), len(source))
    return torch.stack(found)


def _test_image(source: SegmentationSource, short_side: int | None, index: int) -> tuple[Tensor, Tensor]:
    """The image to label [3, h, w], and its whole label map [H, W]."""
    whole: SegmentedImage = source[index]
    return shortened(whole, short_side)[0], whole.labels


def _loss(segmenter: Segmenter, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 where all are."""
    half = images.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
        scores = segmenter(images)  # [B, C, S, S]
    total = functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


def _set_modes(segmenter: Segmenter, config: SemanticConfig) -> None:
    segmenter.train()
    segmenter.requires_grad_(True)
    if config.freeze_encoder:
        segmenter.backbone.requires_grad_(False).eval()
    if config.freeze_batch_norm:
        for part in segmenter.backbone.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()


def _optimizer(segmenter: Segmenter, config: SemanticConfig) -> SGD:
    head_lr = config.lr if config.head_lr is None else config.head_lr
    groups = [
        {"params": [each for each in part.parameters() if each.requires_grad], "lr": rate, "peak": rate}
        for part, rate in ((segmenter.backbone, config.lr), (segmenter.head, head_lr))
    ]
    return SGD([group for group in groups if group["params"]], momentum=config.momentum,
               weight_decay=config.weight_decay)  # fmt: skip


def _crops(encoder: Encoder, config: SemanticConfig) -> CropSettings:
    red, green, blue = (round(255 * value) for value in encoder.card.mean)  # about 0 once it is normalised
    return CropSettings(config.crop, config.scale, config.flip, (red, green, blue), config.short_side)


def _resumable(encoder: Encoder, source: SegmentationSource, config: SemanticConfig, workplace: Workplace) -> Resumable:
    settings = {
        "evaluation": "semantic", "config": config.model_dump(mode="json"), "data": [source.name, source.fingerprint],
        "encoder": digest(encoder), "mean": list(encoder.card.mean), "std": list(encoder.card.std),
    }  # fmt: skip
    return Resumable(workplace.out, settings)


def _check(losses: Tensor) -> None:
    wrong = (~torch.isfinite(losses)).nonzero()
    if len(wrong):
        step = int(wrong[0])
        raise RunError(
            f"semantic: the loss is {losses[step].item()} at step {step + 1}; lower semantic.lr and semantic.head_lr"
        )


def _save(segmenter: Segmenter, file: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in segmenter.state_dict().items()}
    write_bytes(
        file, save(tensors), remedy="make room on the disk and give the same command again: the training is kept"
    )
