"""Optimisers: LARS in its two published forms, and one function that builds any of them from the settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mvmr.config import OptimizerConfig
from mvmr.methods import Method
from mvmr.nets.depth import layer_scales

__all__ = ["LARS", "OptimizerConfig", "build_optimizer", "decayed_rates"]

# The settings that each optimiser reads beside lr, weight_decay and decay_biases_and_norms.
_READS = {
    "adam": {"betas", "epsilon"},
    "adamw": {"betas", "epsilon"},
    "sgd": {"momentum", "nesterov"},
    "lars": {"momentum", "trust_coefficient", "lars_clip", "lars_momentum"},
}


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017.

    With d = g + weight_decay p and trust = trust_coefficient ||p|| / ||d||, taken as 1 where either norm is 0 and in
    groups with `adapt: False`, the two published forms of momentum are

        decoupled  v = momentum v + trust d,       p -= lr v     (BYOL, VICReg, Barlow Twins)
        classic    v = momentum v + lr trust d,    p -= v        (SimCLR)

    They differ only while the rate changes: classic remembers the rate at which each gradient was met. With `clip`,
    trust is min(trust / lr, 1): a tensor's rate is its own adapted one, and at most lr (apex's LARC).
    Any float dtype and device; norms are taken in float32 at least. Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        flavour: Literal["decoupled", "classic"] = "decoupled",
        clip: bool = False,
    ):
        for name, value in {"lr": lr, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be in [0, 1)")
        if flavour not in ("decoupled", "classic"):
            raise ValueError(f"flavour is {flavour!r}; it must be 'decoupled' or 'classic'")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "flavour": flavour,
            "clip": clip,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("clip", False)  # of checkpoints from before the setting

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure returned, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        direction = gradient.add(parameter, alpha=group["weight_decay"]) if group["weight_decay"] else gradient
        if group["adapt"]:
            direction = direction * _trust(parameter, direction, group).to(direction.dtype)
        inside, outside = (group["lr"], 1.0) if group["flavour"] == "classic" else (1.0, group["lr"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=inside)
        parameter.sub_(velocity, alpha=outside)


def _trust(parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> Tensor:
    # Selected on the device: a Python branch on the norms would wait for the device at every tensor.
    precise = torch.promote_types(parameter.dtype, torch.float32)
    weight = torch.linalg.vector_norm(parameter, dtype=precise)  # []
    update = torch.linalg.vector_norm(direction, dtype=precise)  # []
    usable = (weight > 0) & (update > 0)
    trust = group["trust_coefficient"] * weight / torch.where(usable, update, 1.0)
    if group["clip"] and group["lr"] > 0:
        trust = (trust / group["lr"]).clamp(max=1.0)
    return torch.where(usable, trust, 1.0)


def build_optimizer(
    groups: Sequence[Mapping[str, Any]],
    config: OptimizerConfig,
    lr: float,
    *,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """The optimiser of `config` over a method's parameter groups, at peak rate `lr`.

    Each group is split: matrices and kernels are decayed (and adapted by LARS); biases and norms, which have at most
    one dimension, are not, unless `decay_biases_and_norms`. Parameters that need no gradient are left out. A group
    may carry "lr_scale" (multiplies `lr`; 1 if absent), its own "weight_decay", and keys of the method's own, all kept.
    Parts whose decay is the run's, and may so be scheduled, are marked "run_decay".
    scales: what multiplies the rate of single parameters (layer decay), 1 for those not named; a group is split further
    into one part a value, the highest rate first.
    Warns about settings that differ from their default though the chosen optimiser does not read them.
    Raises ValueError when no parameter is left to train.
    """
    _warn_of_unread(config)
    parts = [part for group in groups for part in _split(group, config, lr, scales or {})]
    if not parts:
        raise ValueError("no parameter to train: every parameter of the method is frozen")
    decay = config.weight_decay
    if config.name == "sgd":
        return SGD(parts, lr=lr, momentum=config.momentum, weight_decay=decay, nesterov=config.nesterov)
    if config.name == "lars":
        trust, flavour = config.trust_coefficient, config.lars_momentum
        return LARS(
            parts, lr, momentum=config.momentum, weight_decay=decay,
            trust_coefficient=trust, flavour=flavour, clip=config.lars_clip,
        )  # fmt: skip
    kind = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind(parts, lr=lr, betas=config.betas, eps=config.epsilon, weight_decay=decay)


def decayed_rates(method: Method, decay: float) -> dict[nn.Parameter, float]:
    """{parameter: what its rate is multiplied by} for every network of the kind that the method exports.

    These are found by class and parameter names, so that a student is scaled where its moving average is exported,
    and each of several branches. All other parameters (projectors, heads) are not named. Raises UserError.
    """
    exported = method.exported()
    scales = layer_scales(exported, decay)
    rates: dict[nn.Parameter, float] = {}
    for module in method.modules():
        if type(module) is type(exported):
            own = dict(module.named_parameters())
            if own.keys() == scales.keys():
                rates |= {parameter: scales[name] for name, parameter in own.items()}
    return rates


def _split(
    group: Mapping[str, Any], config: OptimizerConfig, lr: float, scales: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    given = group["params"]
    parameters: list[Any] = [given] if isinstance(given, Tensor) else list(given)
    trained = [p for p in parameters if p.requires_grad]
    shared = {key: value for key, value in group.items() if key != "params"}
    lr *= group.get("lr_scale", 1.0)

    def spared(parameter: Tensor) -> bool:
        return parameter.ndim <= 1 and not config.decay_biases_and_norms

    parts = []
    for scale in sorted({scales.get(p, 1.0) for p in trained}, reverse=True):
        equal = [p for p in trained if scales.get(p, 1.0) == scale]
        common = {**shared, "lr": lr * scale, "run_decay": "weight_decay" not in shared}
        decayed = {**common, "params": [p for p in equal if not spared(p)]}
        undecayed = {**common, "params": [p for p in equal if spared(p)], "weight_decay": 0.0, "run_decay": False}
        if config.name == "lars":
            undecayed["adapt"] = False
        parts += [decayed, undecayed]
    return [part for part in parts if part["params"]]


def _warn_of_unread(config: OptimizerConfig) -> None:
    specific = set().union(*_READS.values())
    for name in sorted(specific - _READS[config.name]):
        if getattr(config, name) != type(config).model_fields[name].default:
            warnings.warn(f"optimizer.{name} has no effect with optimizer.name={config.name}", stacklevel=3)
