"""Self-Label (SeLa): Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation
learning", ICLR 2020. Sections are numbered as there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter, functional

from mvmr.losses.clustering import cluster_cross_entropy
from mvmr.losses.cosine import normalised_std
from mvmr.losses.self_distillation import entropy
from mvmr.methods.base import Method, MethodConfig, check_clusters
from mvmr.ops.collectives import rank
from mvmr.ops.labels import of_all_ranks
from mvmr.ops.modes import evaluating, seeded
from mvmr.ops.precision import at_least_float32
from mvmr.ops.random import permutation, step_seed
from mvmr.ops.sinkhorn import plan_labels, transport
from mvmr.types import Batch, FeaturePass, Step

ROWS = 8192
"""Images whose predictions are made at a time in a label step."""


class SelfLabelConfig(MethodConfig):
    """Settings of Self-Label; the defaults are the paper's for ImageNet with ten heads."""

    needs: ClassVar[Mapping[str, int]] = {"global": 1}

    name: Literal["self_label"] = "self_label"
    """The method's key."""
    heads: int = Field(10, ge=1)
    """Linear heads with labels of their own (released code: 10 for a ResNet-50)."""
    clusters: int = Field(3000, ge=2)
    """K, labels of every head (released code: 3000)."""
    strength: float = Field(25.0, gt=0)
    """lambda (Section 3.1): where it is high, labels follow the network closely, and take many iterations to find."""
    tolerance: float = Field(0.1, gt=0)
    """Labels are found when sum_i |c_i / c_i' - 1| over all N images is below this (released code; CIFAR: 0.01)."""
    labellings: int = Field(100, ge=1)
    """Label steps in the whole run; the first one is before the first optimiser step."""
    spacing: float = Field(2.0, gt=0)
    """The j-th is after a share (j / (labellings - 1)) ** spacing of the run: 2 is dense at first (released code); its
    CIFAR script has 1."""
    relabel: Literal["all", "in_turn"] = "all"
    """`all` heads at each label step (released code for ImageNet), or one head after another, `in_turn` (for CIFAR)."""
    label_mode: Literal["eval", "train"] = "eval"
    """Mode of the encoder while it labels; `train`, with dropout and batch statistics, is the released code's."""


class SelfLabel(Method):
    """The network learns labels, which are found from its own predictions under equal shares (Section 3.1)."""

    Config: ClassVar[type[MethodConfig]] = SelfLabelConfig
    summary: ClassVar[str] = "labels of equal shares, by optimal transport, learnt and renewed (Asano et al., 2020)"
    base_lr: ClassVar[float] = 0.08  # released code: SGD, batch 256; its README says 0.05
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # it jumps where labels change

    labels: Tensor
    relabelled: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: SelfLabelConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.head = nn.Linear(dim, config.heads * config.clusters)  # all heads in one
        self.register_buffer("relabelled", torch.zeros(()))  # share of labels that the last label step changed
        self._seed = int(torch.randint(2**31, ()))  # of the run's seed, so equal on all ranks and after a restart

    def prepare(self, images: int) -> None:
        """Random labels of equal shares, [heads, N], for heads whose first label step is still to come."""
        check_clusters("method.clusters", self.config.clusters, images)
        orders = [permutation(self._seed, head, images) for head in range(self.config.heads)]
        self.register_buffer("labels", torch.stack(orders).remainder(self.config.clusters).int())

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        features = self.encoder(batch.views["global"][0])  # [B, D]
        return {"features": features, "logits": self.head(features)}  # [B, heads K]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        logits = at_least_float32(embeddings["logits"]).unflatten(1, (self.config.heads, -1))  # [B, T, K]
        labels = self.labels[:, batch.index.to(logits.device)].T.long()  # [B, T]
        loss = cluster_cross_entropy(logits.flatten(0, 1), labels.flatten())  # the mean over images and heads
        shares = logits.detach().softmax(2).mean(0)  # [T, K]
        accuracy = (logits.detach().argmax(2) == labels).to(loss.dtype).mean()
        terms = {"accuracy": accuracy, "entropy/mean": entropy(shares).mean(), "relabelled": self.relabelled.clone()}
        return {"loss": loss, **terms, "z_std": normalised_std(embeddings["features"])}

    def before_step(self, step: Step, pass_over: FeaturePass) -> Iterable[Parameter]:
        if due := self.due(step):
            in_turn = sorted({number % self.config.heads for number in due})
            self._label(in_turn if self.config.relabel == "in_turn" else range(self.config.heads), step, pass_over)
        return ()

    def due(self, step: Step) -> list[int]:
        """Which label steps are before this optimiser step; those at the end of the run come after its last one."""
        c = self.config
        epochs, last = step.total_steps / step.steps_per_epoch, max(1, c.labellings - 1)
        end = (epochs + 1.01) * step.steps_per_epoch
        return [j for j in range(c.labellings) if math.ceil(end * (j / last) ** c.spacing) == step.step]

    @torch.no_grad()
    def _label(self, heads: Iterable[int], step: Step, pass_over: FeaturePass) -> None:
        """Section 3.1 for some heads: the best labels, in equal shares, for what the network says of all images."""
        index, features = self._features(step, pass_over)  # this rank's [n], [n, D]
        changed = []
        for head in heads:
            scores = self._log_probabilities(features, head)  # [n, K]
            found = transport(scores, epsilon=1 / self.config.strength, tolerance=self.config.tolerance)
            if found.violation >= self.config.tolerance and rank() == 0:
                warnings.warn(
                    f"step {step.step}: labels of head {head} are taken after {found.iterations} iterations, still "
                    f"{found.violation:.2g} from equal shares: raise method.tolerance, or lower method.strength",
                    stacklevel=2,
                )
            own = plan_labels(scores, found, epsilon=1 / self.config.strength).to(self.labels.dtype)  # [n]
            labels = of_all_ranks(own, index, self.labels.shape[1])  # [N]
            changed.append((labels != self.labels[head]).to(self.relabelled.dtype).mean())
            self.labels[head] = labels
        self.relabelled.copy_(torch.stack(changed).mean())

    def _features(self, step: Step, pass_over: FeaturePass) -> tuple[Tensor, Tensor]:
        mode = evaluating(self.encoder) if self.config.label_mode == "eval" else nullcontext()
        # In train mode dropout draws.
        with mode, seeded(step_seed(self._seed, step.step, rank()), self.head.weight.device):
            return pass_over(self.encoder)

    def _log_probabilities(self, features: Tensor, head: int) -> Tensor:
        """Logarithms of p(y | x) by one head, [n, D] -> [n, K] float32 (or float64)."""
        part = slice(head * self.config.clusters, (head + 1) * self.config.clusters)
        weight, bias = self.head.weight[part], self.head.bias[part]
        dtype = torch.promote_types(features.dtype, torch.float32)
        scores = torch.empty(len(features), len(weight), dtype=dtype, device=features.device)
        for rows, filled in zip(features.split(ROWS), scores.split(ROWS), strict=True):
            filled.copy_(functional.linear(rows, weight, bias).log_softmax(1))
        return scores
