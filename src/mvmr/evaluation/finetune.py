"""Fine-tuning with few labels: encoder and linear head trained together, as in MV-MR's semi-supervised evaluation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from mvmr.data.images import ArraySource, ImageSource, subset
from mvmr.data.label_subsets import listed, per_class, stratified
from mvmr.data.loading import Loaded, Loader, plain_batches
from mvmr.data.views import ViewMaker
from mvmr.evaluation.features import accuracies, extract
from mvmr.evaluation.finetune_config import FinetuneConfig
from mvmr.evaluation.head import Head, save_head
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.weights import ENCODER_FILE, Encoder, save_encoder
from mvmr.ops.schedules import warmup_cosine
from mvmr.types import RunError, UserError

__all__ = ["FinetuneConfig", "finetune", "parameter_groups", "positions"]


def finetune(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: FinetuneConfig, workplace: Workplace
) -> dict[str, float]:
    """{"top1", "top5", "n_train"} of the whole test split after the last epoch of training encoder and head together.

    Trains a copy by cross-entropy on the chosen images of `train`: the encoder's weights, buffers and mode stay as they
    are. The head starts at zero. bf16 autocast on a GPU that has it, else float32; measured in float32. On the CPU a
    pure function of its arguments. Top5 is left out for five classes or fewer. `workplace.out` gets the tuned
    encoder.safetensors and head.safetensors. Raises UserError for labels or settings that do not fit, RunError when
    the loss is not finite.
    """
    labels, answers, classes = _labels(train, test)
    chosen = positions(train, config)
    source = train if len(chosen) == len(labels) else subset(train, chosen)
    tuned = copy.deepcopy(encoder).to(workplace.device)
    with _own_randomness(config.seed, workplace.device), torch.enable_grad():
        layer = nn.Linear(encoder.card.dim, classes, device=workplace.device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        _train(tuned, layer, source, config, workplace)
    tuned.to(memory_format=torch.contiguous_format)  # so that what is loaded later computes exactly the same
    head = Head(layer.weight.detach().cpu(), layer.bias.detach().cpu(), train.classes)
    if workplace.out is not None:
        _save(workplace, tuned, head, train.name)
    batches = plain_batches(test, batch_size=512, size=encoder.card.image_size, workers=workplace.workers)
    scores = head(extract(tuned, batches, device=workplace.device))  # [M, C]
    return {**accuracies(scores, answers), "n_train": float(len(source))}


def positions(train: ImageSource, config: FinetuneConfig) -> Tensor:
    """Sorted positions [n] of the training images whose labels are used. Raises UserError."""
    assert train.labels is not None
    if config.subset_list is not None:
        return listed(train, config.subset_list)
    if config.labels_per_class is not None:
        return per_class(train.labels, config.labels_per_class, seed=config.seed, classes=train.classes)
    if config.fraction is not None:
        return stratified(train.labels, config.fraction, seed=config.seed)
    return torch.arange(len(train))


def parameter_groups(backbone: nn.Module, head: nn.Module, config: FinetuneConfig) -> list[dict]:
    """Optimiser groups with their peak rate as "lr" and "peak": by layer scale, and with or without weight decay.

    Parameters that need no gradient are left out.
    """
    scales: dict[str, float] = {}
    if config.layer_decay is not None:
        from mvmr.nets.depth import layer_scales

        try:
            scales = layer_scales(backbone, config.layer_decay)
        except UserError as error:
            raise UserError(str(error).replace("optimizer.layer_decay", "finetune.layer_decay")) from None
    rated = [(p, config.encoder_lr * scales.get(name, 1.0)) for name, p in backbone.named_parameters()]
    rated += [(p, config.encoder_lr if config.head_lr is None else config.head_lr) for p in head.parameters()]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate in rated:
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def _labels(train: ImageSource, test: ImageSource) -> tuple[Tensor, Tensor, int]:
    """Labels [N] and [M] that can be trained on and measured by, and the number of classes."""
    checked = []
    for source, split in ((train, "train"), (test, "test")):
        y = source.labels
        if y is None or len(y) == 0:
            raise UserError(f"the {split} split has no labels, and finetune needs them; take a labelled data set")
        if y.ndim != 1:
            raise UserError(
                f"finetune is for one label an image; {source.name} has {list(y.shape[1:])} of them: "
                "take an evaluation for several labels"
            )
        if int(y.min()) < 0:
            raise UserError(f"the {split} split has images without label (below 0); leave them out")
        checked.append(y.cpu())
    if train.classes and test.classes and train.classes != test.classes:
        raise UserError("the train and test splits have different classes; give two splits of one data set")
    return checked[0], checked[1], max(int(checked[0].max()) + 1, int(checked[1].max()) + 1, len(train.classes))


def _train(tuned: Encoder, layer: nn.Linear, source: ImageSource, config: FinetuneConfig, workplace: Workplace) -> None:
    """Train both in place, for all epochs."""
    card, backbone = tuned.card, tuned.backbone
    maker = ViewMaker(config.view_settings(card.image_size), mean=card.mean, std=card.std, seed=config.seed)
    loader = Loader(
        source, batch_size=_batch_size(len(source), config), seed=config.seed, workers=workplace.workers,
        start=None if isinstance(source, ArraySource) else maker.start,
    )  # fmt: skip
    assert source.labels is not None
    labels = source.labels.to(workplace.device)
    _set_modes(backbone, config, batch=loader.batch_size)
    backbone.to(memory_format=torch.channels_last)  # a quarter faster for convolutions, and nothing for transformers
    optimizer = _optimizer(parameter_groups(backbone, layer, config), config)
    total = config.epochs * len(loader)
    for epoch in range(config.epochs):
        for done, batch in enumerate(loader, epoch * len(loader)):
            _set_rates(optimizer, done, total=total, warmup=round(config.warmup_epochs * len(loader)))
            scores = layer(_features(backbone, _view(maker, batch, workplace.device)))  # [B, C]
            target = labels[batch.index.to(workplace.device)]  # [B]
            loss = functional.cross_entropy(scores, target, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if workplace.progress is not None:
                workplace.progress("fine-tuning", done + 1, total)
        if not bool(torch.isfinite(loss)):  # once an epoch: a GPU is waited for here
            raise RunError(
                f"finetune: the loss is {loss.item()} in epoch {epoch + 1}; lower finetune.encoder_lr and head_lr, or "
                "set finetune.warmup_epochs"
            )


def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features [B, D] float32 of normalised images, in bf16 inside on a GPU that has it."""
    half = images.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
        return backbone(images).float()


def _batch_size(images: int, config: FinetuneConfig) -> int:
    if config.batch_size > images:
        warnings.warn(
            f"finetune.batch_size is {config.batch_size}, and there are {images} images to train on: each step sees "
            "all of them",
            stacklevel=2,
        )
    return min(config.batch_size, images)


def _set_modes(backbone: nn.Module, config: FinetuneConfig, *, batch: int) -> None:
    """Training mode but for what is frozen. Raises UserError where nothing is left, or batch norm sees one image."""
    if config.freeze_encoder:
        backbone.requires_grad_(False)
    elif not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise UserError(
            "finetune: no parameter of the encoder needs a gradient, so it cannot be trained; call "
            "encoder.requires_grad_(), or set finetune.freeze_encoder=true"
        )
    norms = [part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    backbone.train(not config.freeze_encoder)
    if config.freeze_batch_norm:
        for norm in norms:
            norm.eval()
    if batch == 1 and any(norm.training for norm in norms):
        raise UserError(
            "finetune: a step sees one image, and batch norm cannot be trained on one; take more labels or a larger "
            "finetune.batch_size, or set finetune.freeze_batch_norm=true"
        )


def _optimizer(groups: list[dict], config: FinetuneConfig) -> Optimizer:
    if config.optimizer == "sgd":
        return SGD(groups, momentum=config.momentum, nesterov=config.nesterov)
    return {"adam": Adam, "adamw": AdamW}[config.optimizer](groups)


def _set_rates(optimizer: Optimizer, step: int, *, total: int, warmup: int) -> None:
    # One step longer than the run at both ends, so that neither the first step nor the last has rate 0: with three
    # steps an epoch they count.
    scale = warmup_cosine(step, total_steps=total + 1, warmup_steps=warmup, start=1 / (warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def _view(maker: ViewMaker, batch: Loaded, device: torch.device) -> Tensor:
    """The random view [B, 3, S, S] of a batch, normalised, on the device."""
    images = batch.images
    moved: Tensor | dict[str, Tensor]
    if isinstance(images, Tensor):
        moved = images.to(device, non_blocking=True)
    else:
        moved = {name: crop.to(device, non_blocking=True) for name, crop in images.items()}
    stream = next(iter(maker.settings.crops.values())).stream
    return maker(moved, batch.index, batch.epoch)[stream][0].contiguous(memory_format=torch.channels_last)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """What layers draw (dropout, drop path) depends on the seed alone, and the caller's generators stay as they are."""
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def _save(workplace: Workplace, tuned: Encoder, head: Head, trained_on: str) -> None:
    assert workplace.out is not None
    data = trained_on.partition("/")[0]
    card = tuned.card.model_copy(
        update={
            "method": f"{tuned.card.method} finetuned",
            "data": tuned.card.data if tuned.card.data == data else f"{tuned.card.data}, {data}",
        }
    )
    save_encoder(workplace.out / ENCODER_FILE, tuned.backbone, card)
    save_head(workplace.out, head.weight, head.bias, head.classes)
