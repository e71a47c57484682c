"""MV-MR: Kinakh, Drozdova, Voloshynovskiy, "MV-MR: multi-views and multi-representations for self-supervised learning
and knowledge distillation", Entropy 26(6):466, 2024. Equations are numbered as there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mvmr.losses import invariance, variance_hinge
from mvmr.losses.distance_correlation import centred_distances, correlation_of
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.collectives import gather
from mvmr.ops.layers import mlp
from mvmr.types import Batch, Step

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # What the authors' released code computes, where it differs from the paper (docs/deviations.md).
    "official": {
        "l3_sign": "official",
        "power": 1,
        "distance_floor": 1e-4,
        "divisor": 32.0,
        "variance_epsilon": 0.0,
        "gather": False,
    },
}


class MVMRConfig(MethodConfig):
    """Settings of MV-MR; the defaults are the paper's, with the two deviations argued in docs/deviations.md."""

    needs: ClassVar[Mapping[str, int]] = {"global": 1}
    takes_representations: ClassVar[bool] = True

    name: Literal["mvmr"] = "mvmr"
    """The method's key."""
    preset: Literal["paper", "official"] = "paper"
    """A set of defaults: `paper`, or `official` for what the authors' released code computes."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the projector's layers (Table A3)."""
    invariance: float = Field(1.0, ge=0)
    """lambda of Eq. 9, the weight of the distance between the two embeddings."""
    variance: float = Field(1.0, ge=0)
    """mu of Eq. 9, the weight of the two variance hinges."""
    alpha: float = Field(1.0, ge=0)
    """Weight of L2 (Eq. 10)."""
    beta: dict[str, float] = {}
    """Weights of L3 by representation (Eq. 11); 1 for those not named."""
    gamma: float = 1.0
    """Target standard deviation of the hinge (Eq. 7)."""
    variance_epsilon: float = Field(1e-4, ge=0)
    """epsilon of Eq. 8, inside the square root; 0 is the official code's plain deviation."""
    mse_reduction: Literal["mean", "sum"] = "mean"
    """Eq. 6 sums over dimensions (`sum`); the official code and we average, or lambda would weigh D times more."""
    l3_sign: Literal["paper", "official"] = "paper"
    """`paper` adds 1 - dCor (Eq. 11); `official` adds dCor itself, as the released code does."""
    power: Literal[1, 2] = 2
    """2: the ratio of Eq. 3; 1: its square root, as in the official code."""
    estimator: Literal["v", "u"] = "v"
    """`v`: Eq. 5, biased upwards at the usual batch sizes; `u`: the unbiased estimate, which may be negative."""
    distance_floor: float = Field(0.0, ge=0)
    """Squared distances below this are raised to it (official: 1e-4); 0 keeps them exact."""
    divisor: float = Field(1.0, gt=0)
    """Embeddings and all features but HOG and local deviation are divided by this before distances (official: 32)."""
    gather: bool = True
    """True: the loss is of the batch of all devices; False: of each device's part, as in the official code."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("preset") in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given

    @field_validator("projector")
    @classmethod
    def _widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in widths):
            raise ValueError("every layer needs a width of at least 1")
        return widths

    def representation_defaults(self) -> dict[str, dict[str, Any]]:
        if self.preset == "official":
            return {"hog": {"variant": "official"}, "augmented_pixels": {"batch_shared": True}}
        return {}

    def check_representations(self, names: Collection[str]) -> None:
        unknown = sorted(set(self.beta) - set(names))
        if unknown:
            raise ValueError(f"method.beta names {', '.join(unknown)}, which `representations` does not have")

    def remarks(self, counts: Mapping[str, int], representations: Collection[str]) -> list[str]:
        alone = [] if representations else ["`representations` is empty: MV-MR trains on its views alone (L1 + L2)"]
        return super().remarks(counts, representations) + alone


class MVMR(Method):
    """MV-MR's L = L1 + L2 + L3 (Eq. 12): one plain and one augmented view through one network, two forward passes."""

    Config: ClassVar[type[MethodConfig]] = MVMRConfig
    summary: ClassVar[str] = "views and fixed representations tied by distance correlation (Kinakh et al., 2024)"
    base_lr: ClassVar[float] = 1e-4  # Section 7: Adam, batch 256
    base_optimizer: ClassVar[str] = "adam"

    def __init__(self, encoder: nn.Module, dim: int, config: MVMRConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.projector = mlp([dim, *config.projector]) if config.projector else nn.Identity()

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        # Two passes: batch norm sees the plain and the augmented images apart.
        augmented, plain = batch.views["global"][0], batch.views["plain"][0]  # [B, C, H, W]
        return {
            "augmented": self.projector(self.encoder(augmented)),  # [B, E]
            "plain": self.projector(self.encoder(plain)),  # [B, E]
        }

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        c = self.config
        whole = gather if c.gather else _as_it_is
        augmented, plain = whole(embeddings["augmented"]), whole(embeddings["plain"])  # [W B, E]

        distance = invariance(plain, augmented, reduction=c.mse_reduction)  # Eq. 6
        hinges = [variance_hinge(z, gamma=c.gamma, epsilon=c.variance_epsilon) for z in (plain, augmented)]  # Eq. 7, 8
        l1 = c.invariance * distance + c.variance * (hinges[0] + hinges[1])  # Eq. 9

        a = self._centred(augmented, divide=True)  # [W B, W B]
        between_views = self._correlation(a, self._centred(plain, divide=True))
        l2 = c.alpha * (1 - between_views)  # Eq. 10

        terms = {"invariance": distance, "variance": hinges[0] + hinges[1], "dcor/views": between_views}
        l3 = augmented.new_zeros(())
        for name, features in batch.representations.items():
            b = self._centred(whole(features), divide=name not in ("hog", "local_std"))
            correlation = self._correlation(a, b)
            l3 = l3 + c.beta.get(name, 1.0) * (1 - correlation if c.l3_sign == "paper" else correlation)  # Eq. 11
            terms[f"dcor/{name}"] = correlation
        terms["z_std"] = augmented.detach().float().std(0).mean()
        return {"loss": l1 + l2 + l3, **{name: value.detach() for name, value in terms.items()}}  # Eq. 12

    def _centred(self, x: Tensor, *, divide: bool) -> Tensor:
        scaled = x / self.config.divisor if divide else x
        return centred_distances(scaled, estimator=self.config.estimator, floor=self.config.distance_floor)

    def _correlation(self, a: Tensor, b: Tensor) -> Tensor:
        return correlation_of(a, b, power=self.config.power, estimator=self.config.estimator)


def _as_it_is(x: Tensor) -> Tensor:
    return x
