"""Method -> LightningModule: the only place where methods and the engine meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from mvmr.config import Run
from mvmr.data.batches import BatchMaker
from mvmr.data.sources import ImageSource
from mvmr.engine.optim import build_optimizer, decayed_rates
from mvmr.engine.passes import DataPass
from mvmr.errors import RunError
from mvmr.methods import Method
from mvmr.ops.batch_norm import synchronise_batch_norm
from mvmr.ops.collectives import all_reduce_sum
from mvmr.ops.random import step_seed
from mvmr.ops.schedules import cosine, warmup_cosine, warmup_steps_down
from mvmr.types import Batch, Step


class Adapter(LightningModule):
    """Calls a method's hooks where the interface says; knows every method as one Method."""

    def __init__(self, method: Method, run: Run, *, steps_per_epoch: int, source: ImageSource, maker: BatchMaker):
        super().__init__()
        self.method, self.run, self.source, self.maker = method, run, source, maker
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * run.schedule.epochs
        self.terms: dict[str, Tensor] = {}
        self._prepared = -1  # the step whose `before_step` has been called, in this process

    def setup(self, stage: str) -> None:
        # By the time of `setup` the ranks are known, and no optimiser holds the parameters yet.
        wanted = self.run.engine.sync_batch_norm
        if wanted is True or (wanted == "auto" and self.trainer.world_size > 1):
            synchronise_batch_norm(self.method)  # in place
        if self.run.engine.channels_last:
            self.method.to(memory_format=torch.channels_last)
        if self.run.engine.compile:
            for child in self.method.children():
                child.compile()

    def now(self) -> Step:
        return Step(self.global_step, self.total_steps, self.steps_per_epoch)

    def prepare(self) -> None:
        """Run `before_step` once for the coming step."""
        step = self.now()
        if self._prepared != step.step:
            self._prepared = step.step
            world_size = self.trainer.world_size
            pass_over = DataPass(self.source, self.run, self.maker, self.device, self.global_rank, world_size)
            redrawn = list(self.method.before_step(step, pass_over))
            if redrawn:
                self._forget_state_of(redrawn)

    def sampling_weights(self) -> Tensor | None:
        """The method's, for the coming epoch; the sampler asks when one starts."""
        self.prepare()
        return self.method.sampling_weights()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.prepare()
        # What a method draws is a function of (seed, step, rank), so that a resumed run draws the same.
        torch.manual_seed(step_seed(self.run.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.method.loss(batch, self.now())
        self.terms = {name: value.detach() for name, value in terms.items()}
        if self.device.type == "cpu":  # on a GPU this would wait for the device: the log step looks there
            self.check_finite()
        return terms["loss"]

    def check_finite(self) -> None:
        """Raise RunError, on all ranks at once, when a term of the last batch is not finite on any of them."""
        wrong = [f"{name} is {value.item()}" for name, value in self.terms.items() if not torch.isfinite(value).all()]
        # A loss may be of this rank's part alone; a rank that stopped by itself would leave the others waiting.
        if all_reduce_sum(torch.tensor(float(len(wrong)), device=self.device)):
            wrong = wrong or ["a term is not finite on another device"]
            raise RunError(
                f"step {self.global_step}: {', '.join(wrong)}; training stops. The last checkpoint is intact. "
                "Lower optimizer.lr, set engine.clip_norm=1, or use engine.precision=32, then train again"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.method.after_backward(self.now())

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        # Here and not in `on_train_batch_end`, which fires for every part of an accumulated batch.
        step = self.now()
        config = self.run.optimizer
        if config.final_weight_decay is not None:
            now = cosine(step.step, self.total_steps, config.weight_decay, config.final_weight_decay)
            for group in self.trainer.optimizers[0].param_groups:
                if group["run_decay"]:
                    group["weight_decay"] = now
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.method.after_step(step)

    def lr_scale_at(self, step: int) -> float:
        schedule, epoch = self.run.schedule, self.steps_per_epoch
        warmup = round(schedule.warmup_epochs * epoch)
        if schedule.shape == "steps":
            drops = [round(drop * epoch) for drop in schedule.drops]
            factor, start = schedule.drop_factor, schedule.start
            return warmup_steps_down(step, drops=drops, factor=factor, warmup_steps=warmup, start=start)
        return warmup_cosine(
            step, total_steps=self.total_steps, warmup_steps=warmup, start=schedule.start, final=schedule.final
        )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.run.engine.clip_each and gradient_clip_val is not None:
            for parameter in self.method.parameters():
                if parameter.grad is not None:
                    torch.nn.utils.clip_grad_norm_(parameter, gradient_clip_val)
            return
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        config = self.run.optimizer
        scales = None if config.layer_decay is None else decayed_rates(self.method, config.layer_decay)
        optimizer = build_optimizer(self.method.parameter_groups(), config, self.run.peak_lr, scales=scales)
        # Stepped by Lightning once an optimiser step, never by loader steps.
        curves: list[Callable[[int], float]] = [
            _constant if group.get("constant_lr") else self.lr_scale_at for group in optimizer.param_groups
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, curves)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _forget_state_of(self, parameters: list[nn.Parameter]) -> None:
        for optimizer in self.trainer.optimizers:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)


def _constant(step: int) -> float:
    return 1.0
