"""Linear classification on augmented images, a frozen encoder below: the published protocols, by preset."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from mvmr.data.images import ImageSource, subset
from mvmr.data.label_subsets import per_class
from mvmr.data.loading import plain_batches
from mvmr.data.views import ViewMaker
from mvmr.evaluation.features import accuracies, extract
from mvmr.evaluation.head import Head, save_head
from mvmr.evaluation.image_training import checked_labels, identity, in_half, loader_of, view_of
from mvmr.evaluation.linear import linear
from mvmr.evaluation.linear_presets import CACHED, LinearPresetConfig
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.resume import Resumable
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.types import RunError, UserError

WIDE = 768
"""Width from which on DINO takes one block and the patches: that of ViT-B."""


def linear_by_preset(*given: Any) -> Metrics:
    """`linear` of (train, test, config) with the preset mvmr, else `linear_images` with its five arguments."""
    if len(given) == 3:
        train, test, config = given
        return linear(train, test, config.cached())
    return linear_images(*given)


def linear_images(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: LinearPresetConfig, workplace: Workplace
) -> Metrics:
    """{"top1", "top5", "n_train"} of the whole test split after the last epoch of one layer on the frozen encoder.

    Cross-entropy by SGD; an image's crop is a function of (seed, epoch, image). The encoder is in eval mode throughout,
    and stays as it is. Test images: the central crop (shorter side to 256, then 224, and in proportion for other sizes;
    whole where they are smaller than that). On the CPU a pure function of its arguments; a killed training is taken up
    from `workplace.out`, and ends with the same bits. That folder also gets head.safetensors where the features are the
    encoder's output. Top5 is left out for five classes or fewer. Raises UserError for labels or settings that do not
    fit, RunError when the loss or the scores of the test images are not finite.
    """
    _, answers, classes = checked_labels(train, test, "linear")
    net = frozen(encoder, config).to(workplace.device)
    source = _chosen(train, config)
    training = Resumable(workplace.out, {} if workplace.out is None else identity("linear", encoder, source, config))
    layer = new_layer(net.card.dim, classes, config).to(workplace.device)
    _train(net, layer, source, config, workplace, training)
    head = Head(layer.weight.detach().cpu(), layer.bias.detach().cpu(), train.classes)
    batches = plain_batches(test, batch_size=512, size=encoder.card.image_size, workers=workplace.workers)
    scores = head(extract(net, batches, device=workplace.device))  # [M, C]
    metrics = accuracies(scores, answers).also(n_train=float(len(source)))
    if workplace.out is not None and net.card.dim == encoder.card.dim and not isinstance(net.backbone, LastBlocks):
        save_head(workplace.out, head.weight, head.bias, head.classes)
    return metrics


class LastBlocks(nn.Module):
    """The class token after each of the last blocks of a timm vision transformer, side by side (DINO's eval_linear.py).

    Each is normalised by the final norm, the last block's comes last; with `patches`, then the mean of the last block's
    patch tokens. [B, 3, H, W] normalised -> [B, D (blocks + patches)].
    """

    def __init__(self, net: Any, *, blocks: int, patches: bool):
        super().__init__()
        self.net, self.blocks, self.patches = net, blocks, patches

    def forward(self, images: Tensor) -> Tensor:
        found = self.net.forward_intermediates(
            images, indices=self.blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )  # (patches [B, N, D], prefix tokens [B, P, D]) of each block
        parts = [prefix[:, 0] for _, prefix in found]
        if self.patches:
            parts.append(found[-1][0].mean(1))
        return torch.cat(parts, 1)


def frozen(encoder: Encoder, config: LinearPresetConfig) -> Encoder:
    """A copy in eval mode without gradients that gives the features `config` asks for. Raises UserError."""
    if config.preset == CACHED:
        raise UserError(
            f"linear.preset={CACHED} trains on cached features (mvmr.evaluation.linear); for training on images take "
            "another preset, such as moco"
        )
    net = copy.deepcopy(encoder)
    if config.features == "last_blocks":
        net = _with_last_blocks(net, config)
    net.requires_grad_(False)
    return net.eval().to(memory_format=torch.channels_last)


def _with_last_blocks(net: Encoder, config: LinearPresetConfig) -> Encoder:
    from timm.models.vision_transformer import VisionTransformer

    backbone = net.backbone
    if not isinstance(backbone, VisionTransformer) or not backbone.has_class_token:
        if config.blocks is not None or config.patches is not None:
            raise UserError(
                "linear.blocks and linear.patches are for vision transformers with a class token, and this encoder is "
                f"a {type(backbone).__name__}; leave them out, or set linear.features=output"
            )
        return net
    width, depth = int(backbone.embed_dim), len(backbone.blocks)
    blocks = config.blocks or (1 if width >= WIDE else 4)
    if blocks > depth:
        raise UserError(
            f"linear.blocks={blocks}, and the encoder has {depth} blocks; set linear.blocks={depth} or less"
        )
    patches = width >= WIDE if config.patches is None else config.patches
    card = net.card.model_copy(update={"dim": width * (blocks + patches)})
    return Encoder(LastBlocks(backbone, blocks=blocks, patches=patches), card)


def _chosen(train: ImageSource, config: LinearPresetConfig) -> ImageSource:
    if config.labels_per_class is None:
        return train
    assert train.labels is not None
    return subset(train, per_class(train.labels, config.labels_per_class, seed=config.seed, classes=train.classes))


def new_layer(width: int, classes: int, config: LinearPresetConfig) -> nn.Linear:
    """The layer before its first step, on the CPU: a function of the seed."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    if config.start == "normal":
        nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(config.seed))
    return layer


@torch.enable_grad()
def _train(
    net: Encoder,
    layer: nn.Linear,
    source: ImageSource,
    config: LinearPresetConfig,
    workplace: Workplace,
    training: Resumable,
) -> None:
    """Train the layer in place, for all epochs or from where a killed training stopped."""
    card, device = net.card, workplace.device
    maker = ViewMaker(config.view_settings(card.image_size), mean=card.mean, std=card.std, seed=config.seed)
    loader = loader_of(source, maker, config.batch_size, workplace, "linear")
    assert source.labels is not None
    labels = source.labels.to(device)
    optimizer = SGD(
        layer.parameters(), momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay
    )
    kept = training.kept()
    if kept is not None:
        layer.load_state_dict(kept["layer"])
        optimizer.load_state_dict(kept["optimizer"])
        loader.load_state_dict(kept["loader"])
    peak, curve, total = config.peak(loader.batch_size), config.curve(), config.epochs * len(loader)
    done = loader.epoch * len(loader) + loader.state_dict()["batches"]
    for epoch in range(loader.epoch, config.epochs):
        for batch in loader:
            optimizer.param_groups[0]["lr"] = peak * curve.at(done, len(loader))
            features = _features(net, view_of(maker, batch, device), half=config.half and in_half(device))  # [B, D]
            loss = functional.cross_entropy(layer(features), labels[batch.index.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            training.keep(
                lambda: {
                    "layer": layer.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()
                }
            )  # fmt: skip
            if workplace.progress is not None:
                workplace.progress("linear", done, total)
        if not bool(torch.isfinite(loss)):  # once an epoch: a GPU is waited for here
            training.finished()  # nothing worth taking up
            raise RunError(f"linear: the loss is {loss.item()} in epoch {epoch + 1}; lower linear.lr")


@torch.no_grad()
def _features(net: Encoder, images: Tensor, *, half: bool) -> Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
        return net.normalised(images)
