"""ViewMaker: shapes, purity, and the two ways (whole images, or crops by workers) to the same views."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from mvmr.data import view_colour, view_ops
from mvmr.data import view_parameters as parameters
from mvmr.data.views import VIEW_RECIPES, ViewMaker, Views, view_settings

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EVERYTHING_OFF = {"crop": None, "flip": 0, "jitter": None, "gray": 0, "blur": None}


def photographs(count: int, height: int = 32, width: int = 32) -> Tensor:
    """uint8 [count, 3, height, width], smooth as photographs are."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))
    smooth = T.gaussian_blur(noise, [7, 7], [1.5, 1.5])
    return view_ops.as_bytes(((smooth - 0.5) * 3 + 0.5).clamp(0, 1))


def maker(recipe: str = "mvmr", size: int = 32, seed: int = 0, **crops: dict[str, Any]) -> ViewMaker:
    return ViewMaker(Views(recipe=recipe, size=size, crops=crops), mean=MEAN, std=STD, seed=seed)


def pixels(views: Tensor) -> Tensor:
    """Back to [0, 1]."""
    return views * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def started(made: ViewMaker, images: list[Tensor], index: Tensor, epoch: int) -> dict[str, Tensor]:
    each = [made.start(image, int(i), epoch) for image, i in zip(images, index, strict=True)]
    return {name: torch.stack([crops[name] for crops in each]) for name in each[0]}


def largest(views: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert views.keys() == others.keys()
    return max(float((views[name] - others[name]).abs().max()) for name in views)


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize(("size", "image"), [(32, (32, 32)), (24, (40, 56)), (48, (33, 32))])
def test_every_recipe_makes_its_views(recipe, size, image):
    made = maker(recipe, size)
    index = torch.arange(6)
    x = photographs(6, *image)
    kept = x.clone()
    direct = made(x, index, 0)
    assert torch.equal(x, kept)
    counts: dict[str, int] = {}
    for view in made.settings.crops.values():
        counts[view.stream] = counts.get(view.stream, 0) + view.count
    expected = {"plain": (1, 6, 3, size, size)}
    for name, view in made.settings.crops.items():
        side = made.settings.side(name)
        expected[view.stream] = (counts[view.stream], 6, 3, side, side)
    assert {name: tuple(view.shape) for name, view in direct.items()} == expected
    numbers = {"mvmr": 1, "mvmr_cifar": 1, "mvmr_cifar20": 1, "multicrop": 8, "dino": 10}
    assert len(made.numbered) == numbers.get(recipe, 2)
    for view in direct.values():
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        assert not view.requires_grad
        assert pixels(view).min() > -1e-5
        assert pixels(view).max() < 1 + 1e-5
    by_workers = made(started(made, list(x), index, 0), index, 0)
    assert {name: view.shape for name, view in by_workers.items()} == {n: v.shape for n, v in direct.items()}


def by_torchvision(made: ViewMaker, name: str, number: int, image: Tensor, index: int, epoch: int) -> Tensor:
    """View `number` of one float image, with torchvision's functions and the same parameters."""
    settings, view = made.settings, made.settings.crops[name]
    draws = parameters.view_draws(made.seed, epoch, torch.tensor([index]), number + 1)[number]
    x, side = image, settings.side(name)
    for operation in view.order:
        if operation == "crop" and view.crop:
            box = parameters.crop_boxes(view.crop, draws, *x.shape[-2:])[0].tolist()
            mode = InterpolationMode(view.crop.interpolation)
            x = T.resized_crop(x, *box, size=[side, side], interpolation=mode, antialias=True).clamp(0, 1)
        elif operation == "crop" and view.pad_crop:
            top, left = parameters.pad_offsets(view.pad_crop, draws)[0].tolist()
            x = T.crop(T.pad(x, [view.pad_crop.padding]), top, left, side, side)
        elif operation == "flip" and len(parameters.chosen(draws, "flip", view.flip)):
            x = T.horizontal_flip(x)
        elif operation == "jitter" and view.jitter and len(parameters.chosen(draws, "jitter", view.jitter.probability)):
            factors = parameters.jitter_factors(view.jitter, draws)[0].tolist()
            changes = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
            for change in view_colour.ORDERS[parameters.jitter_orders(draws)[0]]:
                x = changes[change](x, factors[change])
        elif operation == "gray" and len(parameters.chosen(draws, "gray", view.gray)):
            x = T.rgb_to_grayscale(x, num_output_channels=3)
        elif operation == "blur" and view.blur and len(parameters.chosen(draws, "blur", view.blur.probability)):
            kernel, sigma = settings.kernel(name), float(parameters.blur_sigmas(view.blur, draws)[0])
            x = T.gaussian_blur(x, [kernel, kernel], [sigma, sigma])
        elif operation == "solarise" and view.solarise:
            happens = len(parameters.chosen(draws, "solarise", view.solarise.probability))
            x = T.solarize(x, view.solarise.threshold) if happens else x
        elif operation == "rotate90" and view.rotate90:
            x = T.rotate(x, 90.0 * int(parameters.quarter_turns(draws)[0]))
    return T.normalize(x, list(MEAN), list(STD))


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize("rotate90", [False, True])
def test_views_equal_torchvisions_image_by_image(recipe, rotate90):
    first = next(iter(VIEW_RECIPES[recipe]))
    made = maker(recipe, **{first: {"rotate90": rotate90}})
    x, index = photographs(16), torch.arange(16) * 31
    views = made(x, index, 4)
    places = dict.fromkeys(views, 0)
    for number, (name, _) in enumerate(made.numbered):
        stream = made.settings.crops[name].stream
        ours = views[stream][places[stream]]
        places[stream] += 1
        for image, i, view in zip(x, index.tolist(), ours, strict=True):
            expected = by_torchvision(made, name, number, image / 255, i, 4)
            # Solarisation is not continuous: a pixel at the threshold may fall on either side.
            close = (view - expected).abs() < 1e-3
            assert close.float().mean() > 0.999 if made.settings.crops[name].solarise else close.all()


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_views_depend_on_seed_epoch_index_and_number_alone(recipe):
    made = maker(recipe, seed=5)
    x, index = photographs(24), torch.randperm(500)[:24]
    views = made(x, index, 3)
    order = torch.randperm(24)
    shuffled = made(x[order], index[order], 3)
    alone = [made(x[[i]], index[[i]], 3) for i in range(3)]
    for name, view in views.items():
        torch.testing.assert_close(shuffled[name], view[:, order], atol=1e-5, rtol=0)
        for i, one in enumerate(alone):
            torch.testing.assert_close(one[name], view[:, [i]], atol=1e-5, rtol=0)
    again = maker(recipe, seed=5)(x, index, 3)
    assert all(torch.equal(again[name], view) for name, view in views.items())


def test_views_differ_between_seeds_epochs_indices_and_numbers():
    x = photographs(1).expand(32, -1, -1, -1)  # one image thirty-two times
    index = torch.arange(32)
    made = maker("simclr", seed=1)
    views = made(x, index, 0)["global"]
    others = [maker("simclr", seed=2)(x, index, 0), made(x, index, 1), made(x, index + 1000, 0)]
    for other in [*(o["global"] for o in others), views.flip(0)]:
        assert ((other - views).abs().amax((2, 3, 4)) > 0.05).all()
    first = views[0].flatten(1)
    assert (torch.cdist(first, first) + 10 * torch.eye(32)).min() > 0.5  # every index another view
    assert torch.equal(made(x, index, 0)["plain"], made(x, index, 1)["plain"])


def test_global_generators_are_neither_read_nor_moved():
    made, x, index = maker("byol"), photographs(4), torch.arange(4)
    torch.manual_seed(0)
    views = made(x, index, 0)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert largest(made(x, index, 0), views) == 0
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize("image", [(32, 32), (40, 56)])
def test_crops_by_workers_give_the_same_views(recipe, image):
    made = maker(recipe)
    x, index = photographs(12, *image), torch.arange(12) + 100
    direct, by_workers = made(x, index, 2), made(started(made, list(x), index, 2), index, 2)
    for name in direct:
        difference = (pixels(direct[name]) - pixels(by_workers[name])).abs()
        # One rounding to 255ths, which the colour changes after it can double and contrast spread over an image.
        assert difference.mean() < 1 / 255
        assert difference.flatten().quantile(0.99) < 4 / 255
    assert torch.equal(direct["plain"], by_workers["plain"])


def test_workers_crops_have_one_size_whatever_the_images():
    made = maker("multicrop", 40)
    images = [photographs(1, h, w)[0] for h, w in ((30, 80), (200, 64), (40, 40))]
    crops = started(made, images, torch.arange(3), 0)
    assert set(crops) == {"plain", "global/0", "global/1", *(f"local/{k}" for k in range(6))}
    assert all(crop.dtype == torch.uint8 for crop in crops.values())
    assert crops["plain"].shape == crops["global/1"].shape == (3, 3, 40, 40)
    assert crops["local/5"].shape == (3, 3, 17, 17)
    alone = made.start(images[1], 1, 0)
    assert all(torch.equal(crop, crops[name][1]) for name, crop in alone.items())


def test_makers_can_be_sent_to_workers():
    made = maker("multicrop")
    sent = pickle.loads(pickle.dumps(made))
    x, index = photographs(3), torch.arange(3)
    assert largest(sent(x, index, 1), made(x, index, 1)) == 0
    assert copy.deepcopy(made).settings == made.settings


@pytest.mark.parametrize("image", [(32, 32), (50, 70)])
def test_the_plain_view_is_the_normalised_plain_image(image):
    x = photographs(4, *image)
    expected = T.normalize(view_ops.as_float(view_ops.plain(x, 32)), list(MEAN), list(STD))
    torch.testing.assert_close(maker()(x, torch.arange(4), 0)["plain"][0], expected)


def test_floats_are_taken_as_they_are():
    made, x, index = maker("mvmr_cifar20"), photographs(8), torch.arange(8)
    floats = x / 255
    kept = floats.clone()
    assert largest(made(x, index, 0), made(floats, index, 0)) < 1e-5
    assert torch.equal(floats, kept)


@pytest.mark.parametrize("size", [32, 24])
def test_a_view_with_everything_off_is_the_plain_view(size):
    views = maker("mvmr", size, augmented=EVERYTHING_OFF)(photographs(5), torch.arange(5), 0)
    # Resized as bytes, the plain view is rounded after each axis.
    torch.testing.assert_close(pixels(views["global"]), pixels(views["plain"]), atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ({"flip": 1}, lambda x: x.flip(-1)),
        ({"gray": 1}, lambda x: T.rgb_to_grayscale(x, num_output_channels=3)),
        ({"solarise": {"probability": 1}}, lambda x: T.solarize(x, 0.5)),
        ({"blur": {"sigma": [1, 1]}}, lambda x: T.gaussian_blur(x, [3, 3], [1.0, 1.0])),
        ({"blur": {"sigma": [1, 1], "kernel": 7}}, lambda x: T.gaussian_blur(x, [7, 7], [1.0, 1.0])),
        ({"pad_crop": {"padding": 0}}, lambda x: x),
        ({"crop": {"scale": [1, 1], "ratio": [1, 1]}}, lambda x: x),
    ],
)
def test_single_operations(on, expected):
    x = photographs(6)
    view = maker("mvmr", augmented={**EVERYTHING_OFF, **on})(x, torch.arange(6), 0)["global"][0]
    torch.testing.assert_close(pixels(view), expected(x / 255), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("operation", "probability"), [("flip", 0.5), ("flip", 0.1), ("gray", 0.2), ("solarise", 0.3)])
def test_operations_happen_as_often_as_they_should(operation, probability):
    setting = {"probability": probability} if operation == "solarise" else probability
    made = maker("mvmr", 4, augmented={**EVERYTHING_OFF, operation: setting})
    x = photographs(1, 4, 4).expand(4000, -1, -1, -1)
    views = made(x, torch.arange(4000), 0)
    changed = int(((views["global"][0] - views["plain"][0]).abs().amax((1, 2, 3)) > 1e-3).sum())
    assert stats.binomtest(changed, 4000, probability).pvalue > 1e-4


def test_switching_an_operation_off_changes_no_other():
    x, index = photographs(8), torch.arange(8)
    crops_alone = {"jitter": None, "gray": 0, "blur": None}
    views = maker("mvmr", augmented=crops_alone)(x, index, 0)["global"]
    with_others = maker("mvmr", augmented={**crops_alone, "gray": 1.0})(x, index, 0)["global"]
    torch.testing.assert_close(pixels(with_others), T.rgb_to_grayscale(pixels(views), 3), atol=1e-5, rtol=0)


def test_a_count_of_zero_switches_a_view_off():
    views = maker("multicrop", local={"count": 0})(photographs(2), torch.arange(2), 0)
    assert set(views) == {"plain", "global"}


def test_half_precision_around_the_maker_changes_nothing():
    made, x, index = maker("simclr"), photographs(4), torch.arange(4)
    views = made(x, index, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest(made(x, index, 0), views) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize("image", [(32, 32), (40, 56)])
def test_a_gpu_makes_the_same_views(recipe, image):
    made = ViewMaker(view_settings(recipe, size=32), mean=MEAN, std=STD, seed=3)
    x, index = photographs(16, *image), torch.arange(16)
    views = made(x, index, 1)
    on_gpu = made(x.cuda(), index, 1)
    assert all(view.is_cuda for view in on_gpu.values())
    for name, view in views.items():
        close = (pixels(on_gpu[name].cpu()) - pixels(view)).abs() < 2 / 255
        assert close.float().mean() > 0.999
