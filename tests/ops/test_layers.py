"""Heads: their layers, biases and norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvmr.ops.layers import mlp


def test_projector_of_the_paper() -> None:
    head = mlp([16, 32, 24, 8])
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head] == kinds
    assert [tuple(layer.weight.shape) for layer in head[::3]] == [(32, 16), (24, 32), (8, 24)]
    assert all(layer.bias is None for layer in head[::3])
    assert head(torch.randn(4, 16)).shape == (4, 8)


def test_mlp_of_one_layer_and_with_bias() -> None:
    assert [type(layer) for layer in mlp([3, 5])] == [nn.Linear]
    assert all(layer.bias is not None for layer in mlp([3, 5, 7], bias=True)[::3])
    with pytest.raises(ValueError, match="an input and an output width"):
        mlp([3])


def test_mlp_of_other_papers() -> None:
    without = mlp([4, 6, 8], bias=True, norm=False, activation=nn.GELU)
    assert [type(layer) for layer in without] == [nn.Linear, nn.GELU, nn.Linear]
    byol = mlp([4, 6, 8], bias=True, last_bias=False)
    assert (byol[0].bias is not None, byol[-1].bias is None) == (True, True)
    plain = mlp([4, 6, 8], last_norm="plain")[-1]
    assert (type(plain), plain.affine, list(plain.parameters())) == (nn.BatchNorm1d, False, [])
    scaled = mlp([4, 6, 8], last_norm="scale")[-1]
    assert [(name, p.requires_grad) for name, p in scaled.named_parameters()] == [("weight", True), ("bias", False)]
    assert scaled.bias.abs().sum() == 0
