from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms import functional as T

from mvmr.data import view_parameters as parameters
from mvmr.data.view_colour import ORDERS
from mvmr.data.view_recipes import VIEW_RECIPES, view_settings
from mvmr.data.views import ViewMaker
from mvmr.losses import distance_correlation
from mvmr.representations import AugmentedPixels
from mvmr.representations.augmented import SEED_OFFSET
from mvmr.types import UserError

MEAN, STD = (0.4, 0.3, 0.2), (0.2, 0.25, 0.3)
INDEX = torch.arange(10, 26)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """[16, 3, 24, 24] in [0, 1]."""
    scans = torch.from_numpy(load_digits().images[:16]).float().unsqueeze(1) / 16
    smooth = torch.nn.functional.interpolate(scans, size=(24, 24), mode="bilinear")
    return (smooth * torch.tensor([0.9, 0.6, 0.4]).view(3, 1, 1) + torch.tensor([0.0, 0.1, 0.3]).view(3, 1, 1)).clamp(
        0, 1
    )


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize("batch_shared", [False, True])
def test_every_recipe_has_a_view(images, recipe, batch_shared):
    representation = AugmentedPixels(recipe=recipe, batch_shared=batch_shared, mean=MEAN, std=STD)
    for epoch in range(3):
        features = representation(normalised(images), INDEX, epoch)
        assert features.shape == (16, 3 * 24 * 24)
        assert features.isfinite().all()


def test_is_the_recipes_view_of_the_image_in_its_own_range(images):
    maker = ViewMaker(view_settings("mvmr", size=24), mean=MEAN, std=STD, seed=3 + SEED_OFFSET)
    expected = maker(images, INDEX, 5)["global"][0].flatten(1)
    features = AugmentedPixels(seed=3, mean=MEAN, std=STD)(normalised(images), INDEX, 5)
    assert torch.allclose(features, expected, atol=1e-4)


@pytest.mark.parametrize("recipe", ["mvmr", "simclr"])
def test_differs_from_what_the_encoder_sees(images, recipe):
    views = ViewMaker(view_settings(recipe, size=24), mean=MEAN, std=STD, seed=0)(images, INDEX, 0)["global"]
    features = AugmentedPixels(recipe=recipe, mean=MEAN, std=STD)(normalised(images), INDEX, 0)
    for view in views:
        assert ((view.flatten(1) - features).abs().mean(1) > 0.05).all()


def test_is_a_function_of_seed_epoch_and_index(images):
    features = AugmentedPixels(mean=MEAN, std=STD)(normalised(images), INDEX, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = AugmentedPixels(mean=MEAN, std=STD)(normalised(images[order]), INDEX[order], 2)
    assert torch.allclose(moved, features[order], atol=1e-5)
    for seed, epoch, shift in [(1, 2, 0), (0, 3, 0), (0, 2, 1)]:
        other = AugmentedPixels(seed=seed, mean=MEAN, std=STD)(normalised(images), INDEX + shift, epoch)
        assert not torch.allclose(other, features, atol=0.1)


def test_without_index_counts_from_zero(images):
    representation = AugmentedPixels()
    assert torch.equal(representation(images), representation(images, torch.arange(16), 0))


def test_batch_shared_treats_all_images_alike(images):
    representation = AugmentedPixels(batch_shared=True, mean=MEAN, std=STD)
    for epoch in range(4):
        same = representation(normalised(images[:1]).expand(16, -1, -1, -1), INDEX, epoch)
        assert torch.allclose(same, same[:1].expand(16, -1), atol=1e-5)
    first, other = (representation(normalised(images), INDEX, epoch) for epoch in (0, 1))
    assert not torch.allclose(first, other, atol=0.1)
    assert torch.equal(first, representation(normalised(images), INDEX, 0))
    per_image = AugmentedPixels(mean=MEAN, std=STD)(normalised(images[:1]).expand(16, -1, -1, -1), INDEX, 0)
    assert per_image.std(0).mean() > 0.1


def test_batch_shared_by_hand(images):
    """The released code's order: crop, flip, colours (clamped at each change), grey, blur; on the normalised tensor."""
    settings = view_settings("mvmr", size=24)
    view = settings.crops["augmented"]
    seen = set()
    for epoch in range(12):
        draws = parameters.view_draws(7 + SEED_OFFSET, epoch, INDEX[:1], 1)[0]
        top, left, height, width = parameters.crop_boxes(view.crop, draws, 24, 24)[0].tolist()
        x = T.resized_crop(normalised(images), top, left, height, width, [24, 24], antialias=True)
        if len(parameters.chosen(draws, "flip", 0.5)):
            x = x.flip(-1)
            seen.add("flip")
        if len(parameters.chosen(draws, "jitter", 0.8)):
            brightness, contrast, saturation, hue = parameters.jitter_factors(view.jitter, draws)[0].tolist()
            for change in ORDERS[int(parameters.jitter_orders(draws))]:
                if change == 0:
                    x = (x * brightness).clamp(0, 1)
                elif change == 1:
                    mean = T.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
                    x = (contrast * x + (1 - contrast) * mean).clamp(0, 1)
                elif change == 2:
                    x = (saturation * x + (1 - saturation) * T.rgb_to_grayscale(x)).clamp(0, 1)
                else:
                    x = T.adjust_hue(x, hue)
            seen.add("jitter")
        if len(parameters.chosen(draws, "gray", 0.2)):
            x = T.rgb_to_grayscale(x, 3)
            seen.add("gray")
        x = T.gaussian_blur(x, [3, 3], [float(parameters.blur_sigmas(view.blur, draws))])
        features = AugmentedPixels(seed=7, batch_shared=True, mean=MEAN, std=STD)(normalised(images), INDEX, epoch)
        assert torch.allclose(features, x.flatten(1), atol=1e-5)
    assert {"flip", "jitter"} <= seen


def test_batch_shared_keeps_more_of_the_image(images):
    """Why the default draws for each image: a shared change keeps the batch's geometry."""
    x = normalised(images).repeat(4, 1, 1, 1) + 0.3 * torch.randn(
        64, 3, 24, 24, generator=torch.Generator().manual_seed(0)
    )
    index = torch.arange(64)
    shared, alone = (
        sum(
            distance_correlation(x.flatten(1), AugmentedPixels(batch_shared=kind, mean=MEAN, std=STD)(x, index, epoch))
            for epoch in range(4)
        )
        for kind in (True, False)
    )
    assert shared > 1.1 * alone


def test_refuses_what_it_cannot_augment():
    with pytest.raises(UserError, match="square RGB"):
        AugmentedPixels()(torch.zeros(1, 3, 8, 9))
    with pytest.raises(UserError, match="square RGB"):
        AugmentedPixels()(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="known recipes: mvmr"):
        AugmentedPixels(recipe="mvrm")
    with pytest.raises(UserError, match="deviations"):
        AugmentedPixels(std=(1.0, 0.0, 1.0))
