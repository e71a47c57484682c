"""Fine-tuning with few labels: encoder and linear head trained together, as in MV-MR's semi-supervised evaluation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from mvmr.data.images import ImageSource, subset
from mvmr.data.label_subsets import listed, per_class, stratified
from mvmr.data.loading import plain_batches
from mvmr.data.views import ViewMaker
from mvmr.evaluation.features import accuracies, extract
from mvmr.evaluation.finetune_config import FinetuneConfig
from mvmr.evaluation.head import Head, save_head
from mvmr.evaluation.image_training import (
    checked_labels,
    generators,
    identity,
    in_half,
    loader_of,
    set_generators,
    view_of,
)
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.resume import Resumable
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.pretrained import OPEN_CLIP
from mvmr.nets.weights import ENCODER_FILE, Encoder, save_encoder
from mvmr.ops.modes import seeded
from mvmr.types import RunError, UserError

__all__ = ["FinetuneConfig", "finetune", "parameter_groups", "positions"]


def finetune(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: FinetuneConfig, workplace: Workplace
) -> Metrics:
    """{"top1", "top5", "n_train"} of the whole test split after the last epoch of training encoder and head together.

    Trains a copy by cross-entropy on the chosen images of `train`: the encoder's weights, buffers and mode stay as they
    are. bf16 autocast on a GPU that has it, else float32; measured in float32. On the CPU a pure function of its
    arguments. Top5 is left out for five classes or fewer. `workplace.out` gets the tuned encoder.safetensors and
    head.safetensors, and until then what a killed training needs to go on: it ends with the same bits. Raises
    UserError for labels or settings that do not fit, RunError when the loss or the scores are not finite.
    """
    labels, answers, classes = checked_labels(train, test, "finetune")
    if encoder.card.encoder.name.startswith(OPEN_CLIP):
        raise UserError("finetune: the towers of an open_clip model cannot be saved; take the same net from timm")
    chosen = positions(train, config)
    source = train if len(chosen) == len(labels) else subset(train, chosen)
    tuned = copy.deepcopy(encoder).to(workplace.device)
    training = Resumable(workplace.out, {} if workplace.out is None else identity("finetune", encoder, source, config))
    with seeded(config.seed, workplace.device), torch.enable_grad():
        layer = new_head(encoder.card.dim, classes, config).to(workplace.device)
        _train(tuned, layer, source, config, workplace, training)
    tuned.to(memory_format=torch.contiguous_format)  # so that what is loaded later computes exactly the same
    head = Head(layer.weight.detach().cpu(), layer.bias.detach().cpu(), train.classes)
    batches = plain_batches(test, batch_size=512, size=encoder.card.image_size, workers=workplace.workers)
    scores = head(extract(tuned, batches, device=workplace.device))  # [M, C]
    metrics = accuracies(scores, answers).also(n_train=float(len(source)))
    if workplace.out is not None:
        _save(workplace, tuned, head, train.name)
    return metrics


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


def new_head(width: int, classes: int, config: FinetuneConfig) -> nn.Linear:
    """The head before its first step, on the CPU: a function of the seed."""
    with seeded(config.seed, torch.device("cpu")):
        layer = nn.Linear(width, classes, device="cpu")  # drawn as "uniform"
        if config.head_init != "uniform":
            nn.init.zeros_(layer.bias)
        if config.head_init == "zeros":
            nn.init.zeros_(layer.weight)
        if config.head_init == "normal":
            nn.init.normal_(layer.weight, std=0.01)
    return layer


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


def _train(
    tuned: Encoder,
    layer: nn.Linear,
    source: ImageSource,
    config: FinetuneConfig,
    workplace: Workplace,
    training: Resumable,
) -> None:
    """Train both in place, for all epochs or from where a killed training stopped."""
    card, backbone, device = tuned.card, tuned.backbone, workplace.device
    maker = ViewMaker(config.view_settings(card.image_size), mean=card.mean, std=card.std, seed=config.seed)
    loader = loader_of(source, maker, config.batch_size, workplace, "finetune")
    assert source.labels is not None
    labels = source.labels.to(device)
    _set_modes(backbone, config, batch=loader.batch_size)
    backbone.to(memory_format=torch.channels_last)  # a quarter faster for convolutions, and nothing for transformers
    optimizer = _optimizer(parameter_groups(backbone, layer, config), config)
    parts: dict[str, Any] = {"backbone": backbone, "layer": layer, "optimizer": optimizer, "loader": loader}
    kept = training.kept()
    if kept is not None:
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        set_generators(kept["generators"], device)
    scale, curve, total = config.rate_scale(loader.batch_size), config.curve(), config.epochs * len(loader)
    done = loader.epoch * len(loader) + loader.state_dict()["batches"]
    for epoch in range(loader.epoch, config.epochs):
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale * curve.at(done, len(loader))
            scores = layer(_features(backbone, view_of(maker, batch, device)))  # [B, C]
            target = labels[batch.index.to(device)]  # [B]
            loss = functional.cross_entropy(scores, target, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            training.keep(
                lambda: {name: part.state_dict() for name, part in parts.items()} | {"generators": generators(device)}
            )
            if workplace.progress is not None:
                workplace.progress("fine-tuning", done, total)
        if not bool(torch.isfinite(loss)):  # once an epoch: a GPU is waited for here
            training.finished()  # nothing worth taking up
            raise RunError(
                f"finetune: the loss is {loss.item()} in epoch {epoch + 1}; lower finetune.encoder_lr and head_lr, or "
                "set finetune.warmup_epochs"
            )


def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features [B, D] float32 of normalised images, in bf16 inside on a GPU that has it."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=in_half(images.device)):
        return backbone(images).float()


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
