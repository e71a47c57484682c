"""BatchNorm over the batch of all ranks, and one batch norm in the place of another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mvmr.ops.batch_norm import GlobalBatchNorm, synchronise_batch_norm
from mvmr.ops.split_norm import SplitBatchNorm, split_batch_norm
from mvmr.types import UserError
from ranks import run_on_ranks


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def two_steps(norm: nn.Module, batches: Tensor, rows: slice = slice(None)) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, input gradients and parameter gradients of two training steps; then the state."""
    found = []
    for step, batch in enumerate(batches):
        x = batch[rows].clone().requires_grad_()
        weights = normal(*batch.shape, seed=50 + step)[rows].to(batch.dtype)
        norm.zero_grad()
        output = norm(x)
        (output**3 * weights).sum().backward()
        found += [output.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]
    return found, [value.clone() for value in norm.state_dict().values()]


def norm_pair(shape: tuple[int, ...], affine: bool, momentum: float | None, track: bool) -> tuple[nn.Module, nn.Module]:
    kind = nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d
    reference = kind(shape[1], eps=1e-3, momentum=momentum, affine=affine, track_running_stats=track).double()
    if affine:
        nn.init.normal_(reference.weight, 1, 0.3, generator=torch.Generator().manual_seed(7))
        nn.init.normal_(reference.bias, 0, 0.3, generator=torch.Generator().manual_seed(8))
    return reference, synchronise_batch_norm(copy.deepcopy(reference))


OPTIONS = [((12, 3), True, 0.1, True), ((8, 3, 4, 5), False, None, True), ((8, 3, 4), True, 0.1, False)]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_process_equals_torch(options: tuple) -> None:
    reference, ours = norm_pair(*options)
    assert isinstance(ours, GlobalBatchNorm)
    assert list(ours.state_dict()) == list(reference.state_dict())
    batches = normal(2, *options[0]) * 3 + 1
    expected, found = two_steps(reference, batches), two_steps(ours, batches)
    for a, b in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(a, b)
    reference.eval()
    assert torch.equal(ours.eval()(batches[0]), reference(batches[0]))


def norm_on_ranks(rank: int, options: tuple, batches: Tensor, cut: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    ours = norm_pair(*options)[1]
    rows = slice(None, cut) if rank == 0 else slice(cut, None)
    found, state = two_steps(ours, batches, rows)
    return found, state, ours.eval()(batches[0, :2]).detach()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_two_ranks_equal_one_process(options: tuple, share: float) -> None:
    batches = normal(2, *options[0]) * 3 + 100
    reference = norm_pair(*options)[0]
    expected, expected_state = two_steps(reference, batches)
    evaluated = reference.eval()(batches[0, :2]).detach()
    results = run_on_ranks(norm_on_ranks, 2, options, batches, int(share * options[0][0]))
    per_step = len(expected) // 2
    for position, value in enumerate(expected):
        parts = [result[0][position] for result in results]
        whole = torch.cat(parts) if position % per_step < 2 else sum(parts)  # parameters: DDP's mean, times W
        assert torch.allclose(whole, value, rtol=0, atol=1e-10)
    for result in results:
        for ours, theirs in zip(result[1], expected_state, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
        assert torch.allclose(result[2], evaluated, rtol=0, atol=1e-10)


def keeps_narrow_types(rank: int) -> tuple[Tensor, Tensor]:
    norm = GlobalBatchNorm(3)
    output = norm(normal(4, 3, seed=rank).bfloat16() + 200)
    return output, norm.running_var


def test_bfloat16_is_normalised_in_float32() -> None:
    results = run_on_ranks(keeps_narrow_types, 2)
    x = torch.cat([normal(4, 3, seed=rank).bfloat16() + 200 for rank in (0, 1)])
    for output, running_variance in results:
        assert output.dtype == torch.bfloat16
        assert running_variance.dtype == torch.float32
        assert torch.allclose(running_variance, 0.9 + 0.1 * x.float().var(0), rtol=1e-5)


class Shared(nn.Module):
    """Uses one norm in two places, and one inside a container."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.again = self.first
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ModuleList([nn.BatchNorm1d(4, momentum=None, eps=0.1)])[0])


@pytest.mark.parametrize(
    ("replaced", "kind"),
    [(synchronise_batch_norm, GlobalBatchNorm), (partial(split_batch_norm, groups=2), SplitBatchNorm)],
)
def test_replacing_keeps_tensors_names_and_mode(
    replaced: Callable[[nn.Module], nn.Module], kind: type[nn.Module]
) -> None:
    module = Shared()
    module.first.eval()
    module.body[1].weight.requires_grad_(False)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    assert replaced(module) is module
    for (name, tensor), (new_name, new_tensor) in zip(
        tensors, [*module.named_parameters(), *module.named_buffers()], strict=True
    ):
        assert name == new_name
        assert tensor is new_tensor
    assert module.first is module.again
    assert isinstance(module.first, kind)
    assert isinstance(module.body[1], kind)
    assert (module.first.training, module.body[1].training) == (False, True)
    assert (module.body[1].momentum, module.body[1].eps) == (None, 0.1)
    first = module.first
    assert synchronise_batch_norm(module).first is first  # changes nothing, a second time or in groups
    module.body(torch.randn(6, 3))
    there = Shared()
    there.load_state_dict(module.state_dict())
    assert torch.equal(there.body[1].running_mean, module.body[1].running_mean)
    replaced(Shared()).load_state_dict(there.state_dict())


def test_synchronise_keeps_timm_activations() -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Hardtanh)  # a "dropout" whose effect is sure
    x = normal(4, 3, 2, 2, dtype=torch.float32)
    expected = copy.deepcopy(norm)(x)
    module = synchronise_batch_norm(nn.Sequential(norm))
    assert isinstance(module[0], GlobalBatchNorm)
    assert torch.allclose(module(x), expected, rtol=0, atol=1e-6)


def test_synchronise_refuses_an_unknown_norm() -> None:
    class OwnNorm(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match=r"OwnNorm.*nn\.BatchNorm"):
        synchronise_batch_norm(nn.Sequential(OwnNorm(3)))


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        GlobalBatchNorm(3)(torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_takes_torch_sync_batch_norm() -> None:
    module = synchronise_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).cuda())
    assert isinstance(module[1], nn.SyncBatchNorm)
