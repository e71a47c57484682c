"""Representations from settings: names, defaults, and what is said about mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvmr.representations import (
    HOG,
    REPRESENTATIONS,
    AugmentedPixels,
    Scattering,
    build_representations,
    resolve_settings,
    settings_model,
)
from mvmr.types import UserError

HAND_CRAFTED = {name: kind for name, kind in REPRESENTATIONS.items() if not kind.learned}


def test_all_five_by_name():
    built = build_representations({name: {} for name in HAND_CRAFTED})
    assert isinstance(built, nn.ModuleDict)
    assert {name: type(module) for name, module in built.items()} == HAND_CRAFTED
    assert list(built) == ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]


def test_settings_reach_the_constructor_and_kind_frees_the_name():
    built = build_representations({"coarse": {"kind": "hog", "cell": 16, "variant": "official"}, "hog": {"bins": 9}})
    coarse, fine = built["coarse"], built["hog"]
    assert isinstance(coarse, HOG)
    assert isinstance(fine, HOG)
    assert (coarse.bins, coarse.cell, coarse.variant) == (24, 16, "official")
    assert (fine.bins, fine.cell, fine.variant) == (9, 8, "correct")


def test_the_run_fills_mean_std_and_seed_where_absent():
    own = {"kind": "augmented_pixels", "seed": 5, "mean": [0.1, 0.2, 0.3]}
    built = build_representations({"augmented_pixels": {}, "own": own}, mean=[0.5] * 3, std=[0.25] * 3, seed=11)
    filled, given = built["augmented_pixels"], built["own"]
    assert isinstance(filled, AugmentedPixels)
    assert isinstance(given, AugmentedPixels)
    assert (filled.mean, filled.std, filled.seed) == ((0.5,) * 3, (0.25,) * 3, 11)
    assert (given.mean, given.std, given.seed) == ((0.1, 0.2, 0.3), (0.25,) * 3, 5)


def test_resolved_settings_are_complete_plain_and_repeatable():
    given = {
        "scattering": {"J": 3},
        "hog": {},
        "own": {"kind": "augmented_pixels", "mean": (0.1, 0.2, 0.3)},
        "pixels": {},
    }
    resolved = resolve_settings(given)
    assert resolved == {
        "scattering": {"J": 3, "L": 8, "order": 2},
        "hog": {"bins": 24, "cell": 8, "variant": "correct"},
        "own": {"kind": "augmented_pixels", "recipe": "mvmr", "batch_shared": False, "mean": [0.1, 0.2, 0.3]},
        "pixels": {},
    }
    assert resolve_settings(resolved) == resolved
    scattering = build_representations(resolved)["scattering"]
    assert isinstance(scattering, Scattering)
    assert scattering(torch.zeros(1, 3, 16, 16)).shape == (1, 3 * scattering.channels * 4)


@pytest.mark.parametrize("build", [build_representations, resolve_settings])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hogg": {}}, ["representations.hogg:", "did you mean hog?", "known: pixels,", "local_std"]),
        ({"a": {"kind": "scatering"}}, ["representations.a.kind:", "did you mean scattering?", "augmented_pixels"]),
        ({"hog": {"binz": 3}}, ["representations.hog.binz:", "did you mean bins?", "known: bins, cell, variant"]),
        ({"pixels": {"size": 3}}, ["representations.pixels.size:", "known: none"]),
        ({"hog": {"bins": "many"}}, ["representations.hog.bins:", "'many'"]),
        ({"hog": {"variant": "exact"}}, ["representations.hog.variant:", "'official'", "'exact'"]),
        ({"scattering": {"order": 3}}, ["representations.scattering.order:", "3"]),
        ({"augmented_pixels": {"mean": [0.1, "x", 0.3]}}, ["representations.augmented_pixels.mean[1]:", "'x'"]),
        ({"hog": 3}, ["representations.hog:", "mapping"]),
        ({"a.b": {"kind": "hog"}}, ["representations.a.b:", "name"]),
        ({"keys": {"kind": "hog"}}, ["representations.keys:", "name"]),
    ],
)
def test_mistakes_are_named_with_the_remedy(build, settings, said):
    with pytest.raises(UserError) as error:
        build(settings)
    for words in said:
        assert words in str(error.value)


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as error:
        build_representations({"hog": {"cel": 3, "bins": []}, "pixel": {}})
    assert len(str(error.value).splitlines()) == 3


def test_values_out_of_range_name_their_key():
    with pytest.raises(UserError, match=r"representations\.texture: LocalStd needs an odd size"):
        build_representations({"texture": {"kind": "local_std", "size": 2}})


@pytest.mark.parametrize("kind", HAND_CRAFTED.values())
def test_the_model_is_the_constructor(kind):
    defaults = settings_model(kind)()
    assert vars(kind(**dict(defaults))).keys() == vars(kind()).keys()
    assert "kind" not in settings_model(kind).model_fields
