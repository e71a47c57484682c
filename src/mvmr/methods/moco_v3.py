"""MoCo v3: Chen, Xie, He, "An empirical study of training self-supervised vision transformers", ICCV 2021."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mvmr.losses.contrastive import in_batch_info_nce
from mvmr.losses.cosine import normalised_std
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.collectives import gather, rank
from mvmr.ops.ema import follow, follower
from mvmr.ops.layers import mlp
from mvmr.ops.schedules import cosine
from mvmr.types import Batch, Step, UserError

Width = Annotated[int, Field(ge=1)]


class MoCoV3Config(MethodConfig):
    """Settings of MoCo v3; the defaults are the paper's for vision transformers on ImageNet."""

    name: Literal["moco_v3"] = "moco_v3"
    """The method's key."""
    projector: tuple[Width, ...] = Field((4096, 4096, 256), min_length=1)
    """Widths of the projection head's layers: three for a ViT (Section 5), (4096, 256) for ResNet-50."""
    predictor: tuple[Width, ...] = Field((4096, 256), min_length=1)
    """Widths of the prediction head's layers; it ends where the projector does (Section 5)."""
    predictor_norm: bool = True
    """Batch norm on the prediction head's output; the released code has it for a ViT and not for ResNet-50."""
    temperature: float = Field(0.2, gt=0)
    """tau of Eq. 1: 0.2 for a ViT (Section 5); the released code's setting for ResNet-50 is 1."""
    momentum: float = Field(0.99, ge=0, le=1)
    """m of Algorithm 1 at the first step: the share that the key networks keep of themselves."""
    final_momentum: float = Field(1.0, ge=0, le=1)
    """m at the last step, reached along a half cosine, as in the released code's settings."""
    freeze_patch_embedding: bool | Literal["auto"] = "auto"
    """Keep a ViT's patch projection at its random start (Section 4.2); auto: where the encoder has one."""
    fixed_positions: bool | Literal["auto"] = "auto"
    """Give a ViT 2-D sine-cosine position embeddings that do not learn (Section 5); auto: where it has embeddings of
    that shape."""

    @model_validator(mode="after")
    def _heads(self) -> MoCoV3Config:
        if self.projector[-1] != self.predictor[-1]:
            raise ValueError(
                f"queries and keys are compared, so projector and predictor must end with one width, not "
                f"{self.projector[-1]} and {self.predictor[-1]}"
            )
        return self


class MoCoV3(Method):
    """Each view's query finds the key of its image's other view among those of the batch; keys come from an average."""

    Config: ClassVar[type[MethodConfig]] = MoCoV3Config
    summary: ClassVar[str] = "queries find their image's key in the batch, made by a moving average (Chen et al., 2021)"
    base_lr: ClassVar[float] = 1.5e-4  # the released code's settings: AdamW, 1.5e-4 x batch / 256
    base_optimizer: ClassVar[str] = "adamw"
    loss_is_progress: ClassVar[bool] = False  # the keys move too

    def __init__(self, encoder: nn.Module, dim: int, config: MoCoV3Config):
        super().__init__(encoder, dim, config)
        self.config = config
        freeze_patch_embedding(encoder, config.freeze_patch_embedding)
        fix_positions(encoder, config.fixed_positions)
        self.encoder = encoder
        self.projector = mlp([dim, *config.projector], last_norm="plain")
        self.predictor = mlp(
            [config.projector[-1], *config.predictor], last_norm="plain" if config.predictor_norm else "none"
        )
        self.key_encoder, self.key_projector = follower(self.encoder), follower(self.projector)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        x1, x2 = batch.views["global"][0], batch.views["global"][1]  # [B, C, H, W]
        with torch.no_grad():
            keys = [self.key_projector(self.key_encoder(x)) for x in (x1, x2)]  # [B, E] each
        queries = [self.predictor(self.projector(self.encoder(x))) for x in (x1, x2)]
        return {"query1": queries[0], "query2": queries[1], "key1": keys[0], "key2": keys[1]}

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        q1, q2 = embeddings["query1"], embeddings["query2"]  # [B, E]: a mean over queries needs no others
        k1, k2 = gather(embeddings["key1"]), gather(embeddings["key2"])  # [W B, E]
        t, offset = self.config.temperature, rank() * len(q1)
        loss1, accuracy1 = in_batch_info_nce(q1, k2, temperature=t, offset=offset)  # Eq. 1
        loss2, accuracy2 = in_batch_info_nce(q2, k1, temperature=t, offset=offset)
        accuracy = (accuracy1 + accuracy2) / 2
        return {"loss": loss1 + loss2, "accuracy": accuracy, "z_std": normalised_std(k1)}  # Algorithm 1

    def after_step(self, step: Step) -> None:
        m = cosine(step.step, step.total_steps, self.config.momentum, self.config.final_momentum)
        follow(self.key_encoder, self.encoder, m)
        follow(self.key_projector, self.projector, m)


def freeze_patch_embedding(encoder: nn.Module, wanted: bool | Literal["auto"]) -> None:
    """Section 4.2's random patch projection: drawn as in the released code, and without gradient from then on.

    wanted: True raises UserError for an encoder without patches, "auto" leaves that as it is.
    """
    projection = dict(encoder.named_modules()).get("patch_embed.proj")
    if wanted is False or (wanted == "auto" and not isinstance(projection, nn.Conv2d)):
        return
    if not isinstance(projection, nn.Conv2d):
        raise UserError(
            f"method.freeze_patch_embedding is true, but {type(encoder).__name__} has no patch embedding: set it to "
            "auto, or take a vision transformer such as encoder.name=timm:vit_small_patch16_224"
        )
    # Xavier's uniform range, of the projection as a matrix [width, pixels of a patch].
    nn.init.xavier_uniform_(projection.weight.detach().flatten(1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


def fix_positions(encoder: nn.Module, wanted: bool | Literal["auto"]) -> None:
    """Section 5's position embedding, in place of a ViT's learned one; class and other tokens have zeros.

    wanted: True raises UserError for an encoder without position embeddings that fit, "auto" leaves that as it is.
    """
    if wanted is False:
        return
    positions = dict(encoder.named_parameters()).get("pos_embed")  # [1, tokens + patches, D]
    patches: Any = dict(encoder.named_modules()).get("patch_embed")
    fits = positions is not None and patches is not None and positions.ndim == 3 and positions.shape[2] % 4 == 0
    if fits and positions is not None:
        rows, columns = patches.grid_size
        code = sincos_positions(rows, columns, positions.shape[2])  # [patches, D]
        if positions.shape[1] >= len(code):
            with torch.no_grad():
                positions.zero_()[0, -len(code) :] = code
            positions.requires_grad_(False)
            return
    if wanted is True:
        raise UserError(
            f"method.fixed_positions is true, but {type(encoder).__name__} has no position embedding [1, patches, D] "
            "with D a multiple of 4: set it to auto, or take a vision transformer such as "
            "encoder.name=timm:vit_small_patch16_224"
        )


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """The sines and cosines of row / f and column / f, for dim / 4 values of f from 1 to 10000: [rows columns, dim]."""
    quarter = dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)  # [D / 4]
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (row, column)]  # [rows columns, D / 4]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
