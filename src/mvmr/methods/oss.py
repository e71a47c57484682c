"""OSS: Choi, Kang, Oh, "Unsupervised representation transfer for small networks: I believe I can distill on-the-fly",
NeurIPS 2021. Sections and equations are numbered as there; the base is SwAV's (methods/swav.py). The paper leaves much
to guess and no code of it is public: what is said to be "of SwAV" is its released code at a batch of 256, and each
guess is a setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mvmr.losses.cosine import normalised_std
from mvmr.losses.domain import domain_accuracy, domain_sum
from mvmr.losses.swapped import code_terms, multi_view_sum, swapped_sum
from mvmr.methods.base import Exported, Method, MethodConfig
from mvmr.nets.cluster_teacher import load_cluster_teacher
from mvmr.nets.codes import ClusterPrototypes, CodeMaker
from mvmr.nets.dropout_head import Branch
from mvmr.nets.encoders import EncoderConfig, build_encoder, named_in
from mvmr.ops.collectives import gather
from mvmr.ops.dropout import dropout_key
from mvmr.ops.ema import follow, follower
from mvmr.ops.gradient_reversal import reverse_gradient
from mvmr.ops.layers import mlp
from mvmr.ops.precision import at_least_float32
from mvmr.types import Batch, Step

Rate = Annotated[float, Field(ge=0, lt=1)]
TEACHER = "method.teacher"


class Scheme(NamedTuple):
    """One row of Table 6."""

    teacher: Literal["online", "frozen", "none"]
    dropout: bool
    adversarial: bool


SCHEMES = {
    "kd_drop_adv": Scheme("online", dropout=True, adversarial=True),
    "kd_drop": Scheme("online", dropout=True, adversarial=False),
    "kd": Scheme("online", dropout=False, adversarial=False),
    "off_kd_drop": Scheme("frozen", dropout=True, adversarial=False),
    "swav": Scheme("none", dropout=False, adversarial=False),
    "swav_drop": Scheme("none", dropout=True, adversarial=False),
}


class OSSConfig(MethodConfig):
    """Settings of OSS; the defaults are the paper's, and SwAV's at a batch of 256 where it says nothing else."""

    needs: ClassVar[Mapping[str, int]] = {"global": 2, "local": 0}

    name: Literal["oss"] = "oss"
    """The method's key."""
    scheme: Literal["kd_drop_adv", "kd_drop", "kd", "off_kd_drop", "swav", "swav_drop"] = "kd_drop_adv"
    """A row of Table 6: with or without a teacher (online, or frozen in off_kd_drop), dropout and feature classifier.
    The last two are SwAV's own training of the student alone."""
    teacher: Annotated[EncoderConfig, named_in(TEACHER)] = EncoderConfig(name="resnet50")
    """The teacher's network (Section 4): a ResNet-34, a ResNet-50, or one of width 2 (Section 5.1)."""
    teacher_weights: str | None = None
    """off_kd_drop: where the frozen teacher is from: a run folder of swav or oss, or a checkpoint of SwAV's authors."""
    offline_prototypes: Literal["frozen", "trained"] = "frozen"
    """off_kd_drop: whether the student predicts the codes with the teacher's prototypes, or with a trained copy."""
    teacher_hidden: int = Field(2048, ge=1)
    """Hidden width of the teacher's head (of SwAV; 8192 for a ResNet of width 2)."""
    student_hidden: int = Field(2048, ge=1)
    """Hidden width of the student's head (of SwAV, for any network)."""
    dim: int = Field(128, ge=1)
    """Width of the embeddings z and w (of SwAV)."""
    prototypes: int = Field(3000, ge=2)
    """K of Section 3.1 (of SwAV)."""
    temperature: float = Field(0.1, gt=0)
    """tau of Eq. 3 (of SwAV)."""
    epsilon: float = Field(0.05, gt=0)
    """Entropy of the codes (of SwAV)."""
    sinkhorn_iterations: int = Field(3, ge=1)
    """Iterations of Sinkhorn-Knopp (Section 3.1; of SwAV)."""
    queue: int = Field(3840, ge=0)
    """Past images whose stored embeddings take part in the codes (Section 3.1; of SwAV); 0: none."""
    queue_epoch: int = Field(15, ge=0)
    """The epoch in which the queue begins to fill (of SwAV); it is used once it is full."""
    freeze_prototypes_epochs: int = Field(1, ge=0)
    """Epochs at the start in which the prototypes stay as drawn (of SwAV)."""
    student_prototype_gradient: bool = True
    """Whether the student's loss moves the shared prototypes, too (Section 3.1, after Eq. 4)."""
    code_momentum: float | None = Field(None, ge=0, le=1)
    """A moving average of the teacher that makes the codes; null: the teacher itself (Section 3.1)."""
    dropout: tuple[Rate, Rate] = (0.1, 0.05)
    """Rates after the head's first and second Linear (Section 5.2)."""
    dropout_after: Literal["linear", "relu"] = "linear"
    """Where the first dropout is: behind the Linear (Section 3.2), or behind the ReLU."""
    dropout_tracks_statistics: bool = True
    """Whether the pass with dropout moves the running statistics of the heads' batch norm, too."""
    alpha: float = Field(-1.0, le=0)
    """What gradient reversal multiplies by, "a certain negative constant" (Section 3.3)."""
    alpha_ramp: bool = False
    """Let alpha grow with progress p from 0 as 2 / (1 + exp(-10 p)) - 1 (DANN) instead of being constant."""
    adversarial_teacher: bool = True
    """Whether the reversed gradient reaches the teacher, as Section 3.3 says, or the student alone."""
    classifier_hidden: int = Field(128, ge=1)
    """Width of the feature classifier's hidden layer (Section 3.3: an MLP to two dimensions)."""
    classifier_batch_norm: bool = False
    """Batch norm in it; teacher's and student's embeddings then go through it together."""
    classifier_input: Literal["normalised", "raw"] = "normalised"
    """Whether it sees z and w of norm 1 (Eq. 7), or what the heads put out (text of Section 3.3)."""
    reduction: Literal["mean", "paper_sum"] = "mean"
    """mean: L_T, L_S and L_D of Eq. 1 are each divided by their number of terms, which gives the three one weight;
    paper_sum: sums as printed. Of both, the mean over images."""

    sides: tuple[int, ...] = Field((), exclude=True)
    """Of plain images and views, in pixels: found out when a run is built, and not written down."""

    @model_validator(mode="after")
    def _consistent(self) -> OSSConfig:
        if (self.scheme == "off_kd_drop") != (self.teacher_weights is not None):
            raise ValueError(
                "method.teacher_weights goes with method.scheme=off_kd_drop: give the folder of a run of swav there, "
                "and leave it out elsewhere"
            )
        return self

    def fitted(self, width: Callable[[str], int], sides: Sequence[int] = ()) -> OSSConfig:
        return self.model_copy(update={"sides": tuple(sides)})  # which the teacher has to take, too

    def remarks(self, counts: Mapping[str, int], representations: Collection[str]) -> list[str]:
        scheme = SCHEMES[self.scheme]
        online = {"code_momentum", "student_prototype_gradient"}
        unused = {"offline_prototypes"} if scheme.teacher == "online" else online
        # What a network is like, or how strong a term is, that a scheme does without is no mistake: a recipe says it
        # for all schemes.
        if scheme.teacher == "none":
            unused |= {"offline_prototypes"}
        if not scheme.dropout:
            unused |= {"dropout", "dropout_after", "dropout_tracks_statistics"}
        if not scheme.adversarial:
            unused |= {"alpha_ramp", "adversarial_teacher", "classifier_batch_norm", "classifier_input"}
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        idle = ", ".join(f"method.{name}" for name in changed if name in unused)
        remarks = [f"no effect with method.scheme={self.scheme}: {idle}"] if idle else []
        return super().remarks(counts, representations) + remarks


class OSS(Method):
    """A teacher learns by SwAV while a small student learns to predict the teacher's codes, from as many views."""

    Config: ClassVar[type[MethodConfig]] = OSSConfig
    summary: ClassVar[str] = "a small student predicts the codes of a teacher that learns beside it (Choi et al., 2021)"
    base_lr: ClassVar[float] = 0.6  # of SwAV: LARS at a batch of 256
    base_optimizer: ClassVar[str] = "lars"

    def __init__(self, encoder: nn.Module, dim: int, config: OSSConfig):
        super().__init__(encoder, dim, config)
        self.config, self.scheme = config, SCHEMES[config.scheme]
        self.student = self._branch(encoder, dim, config.student_hidden, number=0)
        self.prototypes = ClusterPrototypes(config.dim, config.prototypes)  # C, shared
        self.codes = CodeMaker(
            config.dim, size=config.queue, epsilon=config.epsilon, iterations=config.sinkhorn_iterations
        )
        self.teacher: Branch | None = None
        self.coder: Branch | None = None  # a network that only makes codes
        self.coder_prototypes: ClusterPrototypes | None = None
        self.classifier: nn.Module | None = None
        if self.scheme.teacher != "none":
            self._add_teacher()
        if self.scheme.adversarial:  # D of Eq. 7
            self.classifier = mlp(
                [config.dim, config.classifier_hidden, 2], bias=True, norm=config.classifier_batch_norm
            )
        self._pending: list[Tensor] = []  # embeddings of batches whose optimiser step is still to come

    def _branch(self, encoder: nn.Module, dim: int, hidden: int, *, number: int) -> Branch:
        c = self.config
        return Branch(
            encoder, [dim, hidden, c.dim],
            rates=c.dropout, after=c.dropout_after, tracks_statistics=c.dropout_tracks_statistics, number=number,
        )  # fmt: skip

    def _add_teacher(self) -> None:
        c = self.config
        side = c.sides[0] if c.sides else None
        built = build_encoder(c.teacher, side=side, local_sides=c.sides[1:], section=TEACHER)
        teacher = self._branch(*built, c.teacher_hidden, number=1)
        if self.scheme.teacher == "online":
            self.teacher = teacher
            self.coder = None if c.code_momentum is None else follower(teacher)
            return
        parts = {"encoder": teacher.encoder, "projector": teacher.projector, "prototypes": self.prototypes}
        assert c.teacher_weights is not None
        load_cluster_teacher(c.teacher_weights, parts, key="method.teacher_weights")
        self.prototypes.renormalise()  # the authors' files have them as the last step left them
        # In eval mode from the start: an engine may never call `train`, which is how modules are made.
        self.coder, self.coder_prototypes = teacher.requires_grad_(False).eval(), follower(self.prototypes)
        self.prototypes.requires_grad_(c.offline_prototypes == "trained")

    def exported(self) -> nn.Module:
        return self.student.encoder

    def also_exported(self) -> Mapping[str, Exported]:
        if self.teacher is None:
            return {}
        return {"teacher": Exported(self.teacher.encoder, self.config.teacher, self.teacher.dim)}

    def train(self, mode: bool = True) -> OSS:
        super().train(mode)
        if self.scheme.teacher == "frozen" and self.coder is not None:
            self.coder.eval()
        return self

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        large = batch.views["global"][:2]  # [2, B, C, H, W]
        small = [batch.views["local"]] if "local" in batch.views else []  # [V, B, C, h, w]
        key = dropout_key(large.device) if self.scheme.dropout else None
        found = {}
        for name, branch in self._trained().items():
            features = branch([large, *small])  # [2 + V, B, D]
            found[name] = branch.project(features)  # [B, 2 + V, E]
            if key is not None:  # Section 3.2: the head once more, for all crops
                found[f"{name}/dropout"] = branch.project_with_dropout(features, batch.index, key)
        if self.coder is not None:
            with torch.no_grad():
                found["coder"] = self.coder.project(self.coder([large]))  # [B, 2, E]
        return found

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        unit = {name: functional.normalize(at_least_float32(x), dim=2) for name, x in embeddings.items()}
        coding = next(unit[name] for name in ("coder", "teacher", "student") if name in unit)[:, :2].detach()
        codes = self.codes(coding, self.coder_prototypes or self.prototypes)  # q, [B, 2, K]
        if self.config.queue and step.epoch >= self.config.queue_epoch:
            self._pending.append(gather(coding))

        parts = {name: self._cluster_loss(name, unit, codes) for name in self._trained()}  # L_T and L_S of Eq. 6
        terms = {f"{name}/z_std": normalised_std(unit[name][:, 0]) for name in parts}
        if self.classifier is not None:
            pairs = embeddings if self.config.classifier_input == "raw" else unit
            parts["classifier"], terms["classifier/accuracy"] = self._adversarial(pairs, step)  # L_D
        loss = torch.stack(list(parts.values())).sum()  # Eq. 1
        with torch.no_grad():
            terms |= code_terms(self.prototypes(unit["student"][:, :2]), codes, self.config.temperature)
        return {"loss": loss, **{f"loss/{name}": part.detach() for name, part in parts.items()}, **terms}

    def _cluster_loss(self, name: str, unit: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        """Eq. 2 (or 4) and Eq. 5, added up as in Eq. 6, of one network."""
        learn = self.teacher is None or name == "teacher" or self.config.student_prototype_gradient
        t, scores = self.config.temperature, self.prototypes(unit[name], learn=learn)  # [B, 2 + V, K]
        sums = [swapped_sum(scores[:, :2], codes, temperature=t)]
        if scores.shape[1] > 2:
            sums.append(multi_view_sum(scores[:, 2:], codes, temperature=t))
        if self.scheme.dropout:
            sums.append(multi_view_sum(self.prototypes(unit[f"{name}/dropout"], learn=learn), codes, temperature=t))
        return self._reduced(torch.stack([total for total, _ in sums]).sum(), sum(count for _, count in sums))

    def _adversarial(self, pairs: Mapping[str, Tensor], step: Step) -> tuple[Tensor, Tensor]:
        """Eq. 7 behind gradient reversal (Section 3.3), of the large crops without dropout, and D's accuracy."""
        assert self.classifier is not None
        alpha = self.alpha(step)
        teacher = reverse_gradient(pairs["teacher"][:, :2], alpha if self.config.adversarial_teacher else 0.0)
        student = reverse_gradient(pairs["student"][:, :2], alpha)
        with torch.autocast(teacher.device.type, enabled=False):
            both = at_least_float32(torch.cat([teacher, student]))  # [2 B, 2, E]
            scores = self.classifier(both.flatten(0, 1)).unflatten(0, both.shape[:2])  # [2 B, 2, 2]
        of_teacher, of_student = scores.chunk(2)
        total, count = domain_sum(of_teacher, of_student)
        return self._reduced(total, count), domain_accuracy(of_teacher, of_student)

    def _reduced(self, total: Tensor, terms: int) -> Tensor:
        return total / terms if self.config.reduction == "mean" else total

    def alpha(self, step: Step) -> float:
        """What gradients are multiplied by at a step."""
        ramp = 2 / (1 + math.exp(-10 * step.progress)) - 1 if self.config.alpha_ramp else 1.0
        return self.config.alpha * ramp

    def _trained(self) -> dict[str, Branch]:
        return {"student": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}

    def after_backward(self, step: Step) -> None:
        if step.epoch < self.config.freeze_prototypes_epochs:
            self.prototypes.weight.grad = None  # not zero, which momentum and weight decay would still move

    def after_step(self, step: Step) -> None:
        if self.prototypes.weight.requires_grad:
            self.prototypes.renormalise()
        if self.coder is not None and self.teacher is not None and self.config.code_momentum is not None:
            follow(self.coder, self.teacher, self.config.code_momentum)
        for z in self._pending:
            self.codes.push(z)
        self._pending.clear()
