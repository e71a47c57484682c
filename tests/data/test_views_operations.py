"""Every operation against torchvision's functional one, image by image, on the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from mvmr.data import view_colour, view_ops

SHAPES = [(32, 32), (37, 45), (96, 64)]


def images(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def boxes(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = [torch.randint(3, side + 1, (count,), generator=generator) for side in (height, width)]
    starts = [
        (torch.rand(count, generator=generator) * (side - size + 1)).long()
        for side, size in zip((height, width), sizes, strict=True)
    ]
    drawn = torch.stack([*starts, *sizes], 1)
    drawn[0] = torch.tensor([0, 0, height, width])
    drawn[1] = torch.tensor([height - 1, width - 1, 1, 1])
    return drawn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [15, 32, 70])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_crop_resize(shape, size, interpolation, antialias):
    x, parts = images(12, *shape), boxes(12, *shape)
    mirrored = torch.arange(12) % 3 == 0
    ours = view_ops.crop_resize(
        x, parts, size, interpolation=interpolation, antialias=antialias, mirrored=mirrored
    )  # fmt: skip
    mode = InterpolationMode(interpolation)
    for i, (image, part) in enumerate(zip(x, parts.tolist(), strict=True)):
        expected = T.resized_crop(image, *part, size=[size, size], interpolation=mode, antialias=antialias).clamp(0, 1)
        expected = expected.flip(-1) if mirrored[i] else expected
        torch.testing.assert_close(ours[i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_resize_agrees_with_torchvision_on_uint8(interpolation):
    # Smooth images: on noise, torchvision's uint8 bicubic overshoots and is clamped between the two axes.
    raw = (T.gaussian_blur(images(8, 40, 40), [9, 9], [2.0, 2.0]) * 255).to(torch.uint8)
    parts = boxes(8, 40, 40)
    ours = view_ops.as_bytes(view_ops.crop_resize(view_ops.as_float(raw), parts, 24, interpolation=interpolation))
    for image, part, made in zip(raw, parts.tolist(), ours, strict=True):
        expected = T.resized_crop(image, *part, size=[24, 24], interpolation=InterpolationMode(interpolation))
        assert (made.int() - expected.int()).abs().max() <= 2


def test_crop_resize_of_the_whole_image_at_its_size_is_the_image():
    x = images(3, 20, 20)
    whole = torch.tensor([[0, 0, 20, 20]]).expand(3, 4)
    for antialias in (True, False):
        torch.testing.assert_close(view_ops.crop_resize(x, whole, 20, antialias=antialias), x)


def test_crop_resize_reads_nothing_outside_the_part():
    x = images(1, 30, 30)
    part = torch.tensor([[7, 9, 11, 5]])
    spoilt = torch.full_like(x, 1e3)
    spoilt[..., 7:18, 9:14] = x[..., 7:18, 9:14]
    for interpolation in ("bilinear", "bicubic"):
        for antialias in (True, False):
            ours = [view_ops.crop_resize(i, part, 24, interpolation=interpolation, antialias=antialias)
                    for i in (x, spoilt)]  # fmt: skip
            torch.testing.assert_close(*ours, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_jitter_in_all_orders(shape):
    x = images(48, *shape)
    generator = torch.Generator().manual_seed(2)
    factors = torch.rand(48, 4, generator=generator, dtype=torch.float64) * torch.tensor([2, 2, 2, 1])
    factors[:, 3] -= 0.5
    orders = torch.arange(48) % 24
    ours = view_colour.jitter(x, factors, orders)
    changes = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    for i in range(48):
        expected = x[i]
        for change in view_colour.ORDERS[orders[i]]:
            expected = changes[change](expected, float(factors[i, change]))
        torch.testing.assert_close(ours[i], expected, atol=1e-4, rtol=0)


def test_hue_of_special_colours():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)  # ties, greys, black and white
    x = corners.T.reshape(1, 3, 3, 9).repeat(5, 1, 1, 1)
    shifts = torch.tensor([-0.5, -0.2, 0.0, 1 / 3, 0.5], dtype=torch.float64)
    factors = torch.cat([torch.ones(5, 3), shifts.unsqueeze(1)], 1)
    ours = view_colour.jitter(x, factors, torch.zeros(5, dtype=torch.int64))
    for made, image, shift in zip(ours, x, shifts.tolist(), strict=True):
        torch.testing.assert_close(made, T.adjust_hue(image, shift), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[2], x[2])


def test_jitter_leaves_its_input_alone_and_unit_factors_change_nothing():
    x = images(10, 8, 8)
    before = x.clone()
    unchanged = view_colour.jitter(x, torch.tensor([[1.0, 1, 1, 0]]).expand(10, 4), torch.arange(10))
    torch.testing.assert_close(unchanged, x)
    view_colour.jitter(x, torch.tensor([[0.2, 1.7, 0.3, 0.4]]).expand(10, 4), torch.arange(10))
    assert torch.equal(x, before)


def test_grayscale():
    x = images(4, 16, 9)
    torch.testing.assert_close(view_colour.grayscale(x), T.rgb_to_grayscale(x, num_output_channels=3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [1, 3, 9, 23])
def test_gaussian_blur(shape, kernel):
    x = images(6, *shape)
    sigmas = torch.linspace(0.1, 2, 6, dtype=torch.float64)
    ours = view_ops.gaussian_blur(x, sigmas, kernel)
    radius = kernel // 2
    taps = torch.softmax(-0.5 * (torch.arange(-radius, radius + 1) / sigmas.float().unsqueeze(1)) ** 2, 1)
    by_product = view_ops._blur_by_product(x, taps)  # what a GPU does
    for i, sigma in enumerate(sigmas.tolist()):
        expected = T.gaussian_blur(x[i], [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(by_product[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [4, 17])
def test_gaussian_blur_refuses_impossible_kernels(kernel):
    with pytest.raises(ValueError, match="kernel"):
        view_ops.gaussian_blur(images(1, 8, 8), torch.ones(1), kernel)


def test_solarise():
    x = torch.cat([images(2, 8, 8), torch.full((1, 3, 8, 8), 0.5)])
    torch.testing.assert_close(view_ops.solarise(x, 0.5), T.solarize(x, 0.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pad_and_crop(dtype):
    x = (images(9, 12, 10) * 255).to(dtype)
    offsets = torch.stack([torch.arange(9), torch.arange(9).flip(0)], 1)
    ours = view_ops.pad_and_crop(x, offsets, 4)
    assert ours.dtype == dtype
    for made, image, (top, left) in zip(ours, x, offsets.tolist(), strict=True):
        assert torch.equal(made, T.crop(T.pad(image, [4]), top, left, 12, 10))


def test_rotate90():
    x = images(8, 6, 6)
    turns = torch.arange(8) % 4
    expected = torch.stack([T.rotate(image, 90.0 * t) for image, t in zip(x, turns.tolist(), strict=True)])
    torch.testing.assert_close(view_ops.rotate90(x.clone(), turns), expected)


def test_normalise():
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    x = images(2, 5, 5)
    expected = T.normalize(x, list(mean), list(std))
    torch.testing.assert_close(view_ops.normalise(x, mean, std), expected)
    out = torch.empty_like(x)
    view_ops.normalise(x, mean, std, out=out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("shape", "size", "shorter"),
    [
        ((40, 40), 40, None),  # as it is
        ((64, 64), 56, 64),  # 64 = round(56 * 256 / 224): just large enough for the margin
        ((63, 63), 56, 56),  # one pixel less: no margin
        ((56, 90), 56, 56),
        ((50, 75), 28, 32),
        ((75, 51), 28, 32),
        ((20, 30), 28, 28),  # enlarged
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_plain(shape, size, shorter, dtype):
    x = (images(2, *shape) * 255).to(dtype)
    expected = x if shorter is None else T.center_crop(T.resize(x, [shorter], antialias=True), [size, size])
    ours = view_ops.plain(x, size)
    assert ours.shape == (2, 3, size, size)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, atol=1 if dtype == torch.uint8 else 1e-4, rtol=0)
    torch.testing.assert_close(view_ops.plain(x[0], size), ours[0], atol=1 if dtype == torch.uint8 else 1e-4, rtol=0)


def test_bytes_and_floats_are_each_others_inverse():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = view_ops.as_float(every)
    assert floats.min() == 0
    assert floats.max() == 1
    assert torch.equal(view_ops.as_bytes(floats), every)


@pytest.mark.parametrize("positions", [[], [2], [0, 3], [0, 1, 2, 3, 4]])
def test_change_touches_the_chosen_images_alone(positions):
    x = images(5, 4, 4)
    seen: list[int] = []

    def brighter(chosen: Tensor) -> Tensor:
        seen.append(len(chosen))
        return chosen + 1

    expected = x.clone()
    expected[positions] += 1
    assert torch.equal(view_ops.change(x.clone(), torch.tensor(positions, dtype=torch.int64), brighter), expected)
    assert seen == ([len(positions)] if positions else [])
