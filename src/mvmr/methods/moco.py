"""MoCo: He, Fan, Wu, Xie, Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR 2020
(v1); Chen, Fan, Girshick, He, "Improved baselines with momentum contrastive learning", 2020 (v2). Sections and
equations are those of the first.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.cosine import normalised_std
from mvmr.losses.info_nce import info_nce, queue_logits, top1
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.collectives import gather, world_size
from mvmr.ops.ema import follow, follower
from mvmr.ops.layers import mlp
from mvmr.ops.queue import Queue
from mvmr.ops.schedules import cosine
from mvmr.ops.split_norm import SplitBatchNorm, shuffled, split_batch_norm, unshuffled
from mvmr.ops.unit import unit
from mvmr.types import Batch, Step, UserError


class MoCoConfig(MethodConfig):
    """Settings of MoCo; the defaults are v2's. `head: linear` and `temperature: 0.07` make v1."""

    name: Literal["moco"] = "moco"
    """The method's key."""
    head: Literal["mlp", "linear"] = "mlp"
    """`mlp`: two layers with biases and no batch norm (v2, Section 3); `linear`: one (v1, Section 3.3)."""
    hidden: int | None = Field(None, ge=1)
    """Width of the mlp's hidden layer (v2, Section 3: 2048); null: that of the encoder, which for a ResNet-50 is it."""
    dim: int = Field(128, ge=1)
    """Width of queries and keys (Section 3.3)."""
    temperature: float = Field(0.2, gt=0)
    """tau of Eq. 1: 0.2 in v2 (Section 3), 0.07 in v1 (Section 3.3)."""
    queue: int = Field(65536, ge=1)
    """K of Eq. 1, the keys of past batches that serve as negatives (Section 4.1)."""
    momentum: float = Field(0.999, ge=0, le=1)
    """m of Eq. 2, the share of itself that the key network keeps at a step (Section 3.2)."""
    final_momentum: float | None = Field(None, ge=0, le=1)
    """m at the last step, reached along a half cosine; null: constant, as in the paper."""
    symmetric: bool = False
    """True: each view is query and key in turn, the loss is the mean of the two directions, and all keys are kept."""
    batch_norm_groups: int = Field(8, ge=1)
    """Groups of the global batch with batch statistics of their own: the paper's eight GPUs (Section 3.3). It divides
    the batch and is a multiple of the devices; 1: statistics of the whole batch, and no shuffle of the keys."""

    def check_batch(self, size: int) -> None:
        groups = self.batch_norm_groups
        if groups > 1 and (size % groups or size < 2 * groups):
            raise UserError(
                f"method.batch_norm_groups={groups} does not cut a batch of {size} into equal groups of two images or "
                "more: choose it so that it divides data.batch_size, or 1 for batch norm over the whole batch"
            )


class MoCo(Method):
    """A query network learns to tell its view's key, of a slowly moving network, from a queue of other images' keys."""

    Config: ClassVar[type[MethodConfig]] = MoCoConfig
    summary: ClassVar[str] = "a view told from a queue of a slow network's keys (He et al., 2020; Chen et al., 2020)"
    base_lr: ClassVar[float] = 0.03  # Section 4: SGD, batch 256
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # keys grow alike and apart with the network: at first the loss may rise

    def __init__(self, encoder: nn.Module, dim: int, config: MoCoConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        groups = config.batch_norm_groups
        self.encoder = split_batch_norm(encoder, groups) if groups > 1 else encoder
        widths = [dim, config.hidden or dim, config.dim] if config.head == "mlp" else [dim, config.dim]
        self.head = mlp(widths, bias=True, norm=False)
        self.key_encoder, self.key_head = follower(self.encoder), follower(self.head)
        self.queue = Queue(config.queue, config.dim)
        # Networks without batch norm have nothing to be cut into groups, and no statistics that a shuffle would hide.
        self._in_groups = any(isinstance(module, SplitBatchNorm) for module in self.encoder.modules())
        self._pending: list[Tensor] = []  # keys of batches whose optimiser step is still to come

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views["global"][:2]  # [B, C, H, W] each
        self._check_groups(len(first))
        directions = [(first, second), (second, first)] if self.config.symmetric else [(first, second)]
        return {
            "query": torch.stack([unit(self.head(self.encoder(view))) for view, _ in directions]),  # [V, B, D]
            "key": torch.stack([self._keys(view) for _, view in directions]),  # [V, B, D]
        }

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """The keys of this rank's images, [b, C, H, W] -> [b, D], with Section 3.3's shuffle (two collectives)."""
        if not self._in_groups:
            return unit(self.key_head(self.key_encoder(images)))
        # An image meets others in batch norm than its query does: shared statistics would give the pair away.
        images, order = shuffled(images)
        return unshuffled(unit(self.key_head(self.key_encoder(images))), order)

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        queries, keys = embeddings["query"], embeddings["key"]  # [V, B, D]
        q, k = queries.flatten(0, 1), keys.flatten(0, 1)  # [V B, D]
        logits = queue_logits(q, k, self.queue.keys, temperature=self.config.temperature)  # [V B, 1 + K]
        self._pending += [gather(view.detach()) for view in keys]  # enqueued after the step: no key is its own negative
        return {
            "loss": info_nce(logits),  # Eq. 1; a plain mean over images, so this rank's part of it will do
            "accuracy": top1(logits.detach()),
            "similarity": (q * k).detach().sum(1).mean(),
            "z_std": normalised_std(q),
        }

    def after_step(self, step: Step) -> None:
        momentum = self.config.momentum
        if self.config.final_momentum is not None:
            momentum = cosine(step.step, step.total_steps, momentum, self.config.final_momentum)
        follow(self.key_encoder, self.encoder, momentum)  # Eq. 2, before the next batch's keys
        follow(self.key_head, self.head, momentum)
        for keys in self._pending:
            self.queue.push(keys)
        self._pending.clear()

    def _check_groups(self, images: int) -> None:
        groups, ranks = self.config.batch_norm_groups, world_size()
        if not self._in_groups:
            return
        if groups % ranks:
            raise UserError(
                f"method.batch_norm_groups={groups} cannot be shared by {ranks} devices: take a multiple of {ranks}, "
                "or 1 for batch norm over the whole batch"
            )
        self.config.check_batch(images * ranks)
