from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.engine.module import Adapter
from mvmr.engine.optim import LARS, OptimizerConfig, build_optimizer, decayed_rates
from mvmr.errors import UserError
from mvmr.methods import MVMR
from tiny import parts_and_data, tiny

RATES = [0.1, 0.3, 0.5, 0.4, 0.2, 0.05]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2)).double()


def gradients(parameters: list[Tensor], steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


def run_lars(flavour: str, rates: list[float], *, weight_decay: float = 0.02, momentum: float = 0.9) -> list[Tensor]:
    model = network()
    config = OptimizerConfig(
        name="lars", weight_decay=weight_decay, momentum=momentum, trust_coefficient=0.01, lars_momentum=flavour
    )
    optimizer = build_optimizer([{"params": model.parameters()}], config, rates[0])
    parameters = list(model.parameters())
    for rate, grads in zip(rates, gradients(parameters, len(rates)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def by_hand(
    flavour: str, rates: list[float], *, weight_decay: float = 0.02, momentum: float = 0.9
) -> list[list[float]]:
    """LARS number by number in Python floats; biases and norms neither decayed nor adapted."""
    tensors = [p.detach().clone() for p in network().parameters()]
    result = [t.flatten().tolist() for t in tensors]
    buffers = [[0.0] * len(values) for values in result]
    for rate, grads in zip(rates, gradients(tensors, len(rates)), strict=True):
        for values, buffer, tensor, grad in zip(result, buffers, tensors, grads, strict=True):
            matrix = tensor.ndim > 1
            decay = weight_decay if matrix else 0.0
            d = [g + decay * p for g, p in zip(grad.flatten().tolist(), values, strict=True)]
            weight_norm, update_norm = sum(p * p for p in values) ** 0.5, sum(x * x for x in d) ** 0.5
            trust = 0.01 * weight_norm / update_norm if matrix else 1.0
            for i, x in enumerate(d):
                buffer[i] = momentum * buffer[i] + trust * x * (rate if flavour == "classic" else 1.0)
                values[i] -= buffer[i] * (1.0 if flavour == "classic" else rate)
    return result


@pytest.mark.parametrize("flavour", ["decoupled", "classic"])
def test_lars_equals_a_slow_loop_while_the_rate_changes(flavour: str) -> None:
    for got, expected in zip(run_lars(flavour, RATES), by_hand(flavour, RATES), strict=True):
        assert got.flatten().tolist() == pytest.approx(expected, abs=1e-13)


def test_the_two_flavours_agree_while_the_rate_is_constant_and_only_then() -> None:
    constant = [run_lars(flavour, [0.2] * 6) for flavour in ("decoupled", "classic")]
    changing = [run_lars(flavour, RATES) for flavour in ("decoupled", "classic")]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(*constant, strict=True))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(*changing, strict=True))


def test_the_first_step_of_lars_has_a_length_set_by_the_weights_alone() -> None:
    # Without momentum history, ||step|| = lr * trust_coefficient * ||p|| whatever the gradient's size.
    for size in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        before = parameter.detach().clone()
        parameter.grad = size * torch.ones_like(parameter)
        LARS([parameter], 0.5, trust_coefficient=0.01).step()
        assert (parameter - before).norm().item() == pytest.approx(0.5 * 0.01 * before.norm().item(), rel=1e-9)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 2.0), (3.0, 0.0), (0.0, 0.0)])
def test_a_zero_norm_gives_trust_one_and_no_nan(weight: float, gradient: float) -> None:
    parameter = nn.Parameter(torch.full((2, 2), weight))
    parameter.grad = torch.full((2, 2), gradient)
    LARS([parameter], 0.1).step()
    assert torch.allclose(parameter, torch.tensor(weight - 0.1 * gradient))


def test_a_group_that_does_not_adapt_is_plain_sgd_with_momentum() -> None:
    models = network(), network()
    ours = LARS([{"params": models[0].parameters(), "adapt": False}], 0.1, momentum=0.8, weight_decay=0.03)
    reference = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.8, weight_decay=0.03)
    for grads in gradients(list(models[0].parameters()), 5):
        for model in models:
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad.clone()
        ours.step()
        reference.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_parameters_without_gradient_are_left_alone_and_gradients_unchanged() -> None:
    frozen, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.full((2, 2), 0.5)
    optimizer = LARS([frozen, moved], 0.1, weight_decay=0.1)
    assert optimizer.step(lambda: 7) == 7
    assert torch.equal(frozen, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))
    assert torch.equal(moved.grad, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("flavour", ["decoupled", "classic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lars_continues_from_a_saved_state_bit_for_bit(flavour: str, dtype: torch.dtype) -> None:
    def fresh() -> tuple[nn.Module, LARS]:
        model = network().to(dtype)
        return model, LARS(model.parameters(), 0.3, flavour=flavour, weight_decay=1e-3, trust_coefficient=0.02)

    def advance(model: nn.Module, optimizer: LARS, grads: list[list[Tensor]]) -> None:
        for step in grads:
            for parameter, grad in zip(model.parameters(), step, strict=True):
                parameter.grad = grad.to(dtype)
            optimizer.step()

    whole, optimizer = fresh()
    grads = list(gradients(list(whole.parameters()), 6))
    advance(whole, optimizer, grads[:3])
    file = io.BytesIO()
    torch.save({"model": copy.deepcopy(whole.state_dict()), "optimizer": optimizer.state_dict()}, file)
    advance(whole, optimizer, grads[3:])

    resumed, optimizer = fresh()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    advance(resumed, optimizer, grads[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert optimizer.param_groups[0]["flavour"] == flavour


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", ["decoupled", "classic"])
def test_lars_on_a_gpu_equals_lars_on_the_cpu(flavour: str) -> None:
    models = network(), network().cuda()
    optimizers = [LARS(model.parameters(), 0.3, flavour=flavour, weight_decay=1e-3) for model in models]
    for grads in gradients(list(models[0].parameters()), 4):
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad.to(parameter.device)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b.cpu(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"flavour": "nesterov"}, "flavour is 'nesterov'"),
    ],
)
def test_lars_refuses_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **settings})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)],
)
def test_biases_and_norms_are_neither_decayed_nor_adapted(name: str, kind: type) -> None:
    model = network()
    config = OptimizerConfig(name=name, weight_decay=0.01)
    optimizer = build_optimizer([{"params": model.parameters()}], config, 0.5)
    assert type(optimizer) is kind
    decayed, spared = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(7, 5), (2, 7)]
    assert [p.shape for p in spared["params"]] == [(7,), (7,), (7,), (2,)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert decayed["lr"] == spared["lr"] == 0.5
    if name == "lars":
        assert (decayed["adapt"], spared["adapt"]) == (True, False)

    whole = build_optimizer(
        [{"params": model.parameters()}], config.model_copy(update={"decay_biases_and_norms": True}), 0.5
    )
    assert len(whole.param_groups) == 1
    assert len(whole.param_groups[0]["params"]) == 6
    assert whole.param_groups[0]["weight_decay"] == 0.01


def test_settings_reach_torchs_optimisers() -> None:
    group = [{"params": network().parameters()}]
    adam = build_optimizer(group, OptimizerConfig(betas=(0.8, 0.95), epsilon=1e-6), 1e-3)
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.8, 0.95), 1e-6)
    sgd = build_optimizer(
        [{"params": network().parameters()}], OptimizerConfig(name="sgd", momentum=0.7, nesterov=True), 0.1
    )
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)


def test_groups_keep_their_own_keys_and_scale_the_rate() -> None:
    encoder, head = network(), network()
    head[0].bias.requires_grad_(False)
    optimizer = build_optimizer(
        [
            {"params": encoder.parameters(), "name": "encoder"},
            {"params": list(head.parameters()), "lr_scale": 10.0, "weight_decay": 0.3, "name": "head"},
        ],
        OptimizerConfig(name="sgd", weight_decay=0.01),
        0.2,
    )
    by_name = [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert by_name == [
        ("encoder", 0.2, 0.01, 2),
        ("encoder", 0.2, 0.0, 4),
        ("head", 2.0, 0.3, 2),
        ("head", 2.0, 0.0, 3),  # its frozen bias is left out
    ]
    assert optimizer.param_groups[2]["lr_scale"] == 10.0


def test_a_schedule_multiplies_every_groups_own_rate() -> None:
    optimizer = build_optimizer(
        [{"params": network().parameters()}, {"params": network().parameters(), "lr_scale": 0.1}],
        OptimizerConfig(name="sgd"),
        0.4,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.2, 0.2, 0.02, 0.02])


def test_a_setting_without_effect_is_named() -> None:
    group = [{"params": [nn.Parameter(torch.ones(2, 2))]}]
    with pytest.warns(UserWarning, match=r"optimizer\.momentum has no effect with optimizer\.name=adam"):
        build_optimizer(group, OptimizerConfig(momentum=0.5), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(group, OptimizerConfig(name="lars", momentum=0.5, trust_coefficient=0.02), 0.1)


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer([{"params": [nn.Parameter(torch.ones(1), requires_grad=False)]}], OptimizerConfig(), 0.1)


def test_scaled_parameters_share_groups_with_their_equals() -> None:
    model = network()
    first, norm, last = model[0], model[1], model[3]
    scales = {**dict.fromkeys([*first.parameters(), *norm.parameters()], 0.25), last.weight: 0.5}
    config = OptimizerConfig(name="lars", weight_decay=0.01)
    optimizer = build_optimizer([{"params": model.parameters(), "lr_scale": 2.0}], config, 0.1, scales=scales)
    found = [(g["lr"], g["weight_decay"], g["adapt"], list(map(id, g["params"]))) for g in optimizer.param_groups]
    assert found == [
        (pytest.approx(0.2), 0.0, False, [id(last.bias)]),  # not named: at the full rate
        (pytest.approx(0.1), 0.01, True, [id(last.weight)]),
        (pytest.approx(0.05), 0.01, True, [id(first.weight)]),
        (pytest.approx(0.05), 0.0, False, [id(first.bias), id(norm.weight), id(norm.bias)]),
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.05, 0.025, 0.025])


def test_scales_of_one_change_nothing() -> None:
    model = network()
    plain = build_optimizer([{"params": model.parameters()}], OptimizerConfig(), 0.1)
    scaled = build_optimizer(
        [{"params": model.parameters()}], OptimizerConfig(), 0.1, scales=dict.fromkeys(model.parameters(), 1.0)
    )
    assert str(plain) == str(scaled)
    assert [len(g["params"]) for g in plain.param_groups] == [len(g["params"]) for g in scaled.param_groups]


def test_layer_decay_reaches_the_encoder_and_not_the_projector() -> None:
    run = tiny(optimizer={"lr": 0.1, "layer_decay": 0.5})
    parts, _ = parts_and_data(run)
    adapter = Adapter(parts.method, run, steps_per_epoch=6, source=parts.source, maker=parts.maker)
    optimizer = adapter.configure_optimizers()["optimizer"]
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    encoder, projector = parts.method.encoder, parts.method.projector
    assert len(rates) == len(list(parts.method.parameters()))
    assert {rates[id(p)] for p in projector.parameters()} == {0.1}
    assert rates[id(encoder.layer4[1].conv1.weight)] == pytest.approx(0.1)
    assert rates[id(encoder.layer4[0].conv1.weight)] == pytest.approx(0.05)
    assert rates[id(encoder.conv1.weight)] == rates[id(encoder.bn1.bias)] == pytest.approx(0.1 * 0.5**8)
    assert optimizer.param_groups[0]["initial_lr"] == 0.1, "the rate that is logged is the highest"
    assert len(optimizer.param_groups) == 2 * 9  # stem and eight blocks, matrices and the rest; the projector joins


def test_layer_decay_scales_a_student_whose_average_is_exported() -> None:
    class Averaged(MVMR):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

        def exported(self) -> nn.Module:
            return self.teacher

    run = tiny()
    old = parts_and_data(run)[0].method
    method = Averaged(old.encoder, old.projector[0].in_features, run.method)
    rates = decayed_rates(method, 0.5)
    assert rates[method.encoder.conv1.weight] == rates[method.teacher.conv1.weight] == 0.5**8
    assert len(rates) == 2 * len(list(method.encoder.parameters()))
    assert method.projector[0].weight not in rates


def test_layer_decay_out_of_range_or_without_layers() -> None:
    for value in (0, 1.1, -0.5):
        with pytest.raises(UserError, match=r"optimizer\.layer_decay"):
            tiny(optimizer={"layer_decay": value})
    run = tiny()
    with pytest.raises(UserError, match=r"optimizer\.layer_decay needs"):
        decayed_rates(MVMR(nn.Flatten(), 3 * 16 * 16, run.method), 0.5)
