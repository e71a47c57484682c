"""Sections of a run's settings that no part below the engine has to know: optimiser, schedule, engine, online."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mvmr.types import Section


class OptimizerConfig(Section):
    """The optimiser."""

    name: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    """adam, adamw, sgd or lars."""
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate; auto is the method's base rate x data.batch_size / 256."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Multiplies the encoder's rate once for every layer below its last (BEiT, MAE: 0.65 to 0.75); null: one rate."""
    weight_decay: float = Field(1e-6, ge=0)
    """Weight decay (an L2 term in adam and sgd, decoupled in adamw)."""
    final_weight_decay: float | None = Field(None, ge=0)
    """Weight decay at the last step, reached along a half cosine (DINO: 0.4); null: constant."""
    decay_biases_and_norms: bool = False
    """False takes one-dimensional parameters out of weight decay and of LARS's adaptation."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov momentum, sgd only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of adam's and adamw's moments."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to adam's and adamw's denominator."""
    trust_coefficient: float = Field(0.001, gt=0)
    """eta of LARS."""
    lars_clip: bool = False
    """True never lets LARS raise a rate above `lr` (solo-learn's CIFAR settings, with a trust coefficient of 0.02)."""
    lars_momentum: Literal["decoupled", "classic"] = "decoupled"
    """classic puts the rate inside the momentum buffer (SimCLR), decoupled does not (BYOL, VICReg, Barlow Twins)."""


class ScheduleConfig(Section):
    """Length and learning-rate curve, counted in optimiser steps: linear warm-up, then a curve down."""

    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    warmup_epochs: float = Field(10, ge=0)
    """Length of the linear warm-up."""
    start: float = Field(0.01, ge=0)
    """First rate, as a share of the peak."""
    final: float = Field(0.01, ge=0)
    """Last rate of the cosine, as a share of the peak."""
    shape: Literal["cosine", "steps"] = "cosine"
    """cosine: half a period down to `final`; steps: constant between `drops`, or throughout where there are none."""
    drops: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Epochs from which on the rate is multiplied by `drop_factor` (MoCo v1: 120 and 160); shape steps only."""
    drop_factor: float = Field(0.1, gt=0, le=1)
    """What the rate is multiplied by at every drop."""

    @model_validator(mode="after")
    def _drops_are_used(self) -> ScheduleConfig:
        if self.drops and self.shape != "steps":
            raise ValueError("drops are given, but shape is cosine: set schedule.shape=steps, or leave drops out")
        return self


class EngineConfig(Section):
    """Where and how a run is computed; of these, precision, accumulation and clipping change what is learned."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """auto takes a GPU where there is one."""
    devices: int | Literal["auto"] = "auto"
    """Devices a machine; auto: all GPUs, or one CPU process."""
    nodes: int = Field(1, ge=1)
    """Machines."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp16 on a GPU, else float32."""
    sync_batch_norm: bool | Literal["auto"] = "auto"
    """Batch statistics over all devices; auto: on with more than one, which keeps the one-device gradient."""
    accumulate: int = Field(1, ge=1)
    """Batches an optimiser step; enlarges neither the batch that the loss sees nor that of batch norm."""
    clip_norm: float | None = Field(None, gt=0)
    """Gradient norm to clip at; null: none."""
    clip_each: bool = False
    """Clip every parameter tensor by its own norm (DINO) instead of all by their common one."""
    compile: bool = False
    """torch.compile of the networks."""
    channels_last: bool = False
    """Channels-last memory format, faster for convolutions on recent GPUs."""
    deterministic: bool = False
    """Deterministic GPU kernels (slower); on the CPU runs always repeat bit for bit."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Also save inside epochs, every this many optimiser steps; null: at epoch ends only."""
    keep_every_epochs: int | None = Field(None, ge=1)
    """Keep a checkpoint of every this many epochs beside the last; null: only the last."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool | Literal["auto"] = "auto"
    """TensorBoard files in the run folder; auto: where the `report` extra is installed."""

    @model_validator(mode="after")
    def _clip_at_something(self) -> EngineConfig:
        if self.clip_each and self.clip_norm is None:
            raise ValueError("clip_each is true, but there is no norm to clip at: set engine.clip_norm (DINO: 3)")
        return self


class OnlineConfig(Section):
    """What is watched while a run trains; never chosen by."""

    every_epochs: int = Field(1, ge=0)
    """Epochs between two measurements of embedding spread, rank and dependence; 0: none."""
    images: int = Field(512, ge=8)
    """Training images that they are measured on."""
    knn_every_epochs: int = Field(10, ge=0)
    """Epochs between two online kNN accuracies, for data with labels; 0: none."""
    knn_images: int = Field(5000, ge=1)
    """At most this many training images (and as many test images) for it."""
    knn_k: int = Field(20, ge=1)
    """Neighbours."""
    knn_temperature: float = Field(0.07, gt=0)
    """Temperature of their weights."""
    head: bool = True
    """With kNN, also a linear head on the same features; the last one is kept as head.safetensors."""
