"""A fresh augmentation of the image, as a representation."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.data import view_parameters as parameters
from mvmr.data.view_recipes import VIEW_RECIPES, View, Views, view_settings
from mvmr.data.views import ViewMaker
from mvmr.representations.base import Representation, fixed
from mvmr.types import IMAGENET_MEAN, IMAGENET_STD, UserError

SEED_OFFSET = 0x6D766D72
"""Added to the seed, so that this view is never the one that the encoder sees."""


class AugmentedPixels(Representation):
    """The pixels of a fresh augmentation of the image, flattened ("augmented image", MV-MR paper, Section 3.3).

    [B, 3, S, S] to [B, 3 S S], a pure function of (seed, epoch, index) and the image. It is the first "global" view of
    the named recipe, made from the image brought back to [0, 1] by `mean` and `std`, and normalised again.
    `batch_shared` does what the released MV-MR code does instead: one parameter set for the whole batch, drawn for its
    first index, and torchvision's functions on the normalised tensor, whose colour changes clamp it to [0, 1].
    Raises UserError for an unknown recipe, or if images are not square or not RGB.
    """

    varies = True

    def __init__(
        self,
        *,
        recipe: str = "mvmr",
        seed: int = 0,
        batch_shared: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ):
        super().__init__()
        if recipe not in VIEW_RECIPES:
            raise UserError(f"AugmentedPixels: no view recipe {recipe!r}; known recipes: {', '.join(VIEW_RECIPES)}.")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"AugmentedPixels needs three means and three positive deviations; got {mean} and {std}.")
        self.recipe, self.seed, self.batch_shared = recipe, seed, batch_shared
        self.mean, self.std = tuple(mean), tuple(std)
        self._makers: dict[int, ViewMaker] = {}

    @fixed
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        batch, colours, height, width = images.shape
        if height != width or colours != 3:
            raise UserError(f"AugmentedPixels takes square RGB images, not {colours}x{height}x{width}: "
                            f"leave representations.augmented_pixels out, or crop the images.")  # fmt: skip
        index = torch.arange(batch) if index is None else index.cpu()
        maker = self._maker(height)
        if self.batch_shared:
            draws = parameters.view_draws(maker.seed, epoch, index[:1], 1)[0]  # [1, 34]
            return augmented_alike(images, maker.settings, draws).flatten(1)
        shift, scale = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return maker((images * scale + shift).clamp_(0, 1), index, epoch)["global"][0].flatten(1)

    def _maker(self, size: int) -> ViewMaker:
        """Makes the recipe's first global view alone, for images of this size."""
        if size not in self._makers:
            settings = view_settings(self.recipe, size=size)
            name, view = next((name, view) for name, view in settings.crops.items() if view.stream == "global")
            only = settings.model_copy(update={"crops": {name: view.model_copy(update={"count": 1})}})
            self._makers[size] = ViewMaker(only, mean=self.mean, std=self.std, seed=self.seed + SEED_OFFSET)
        return self._makers[size]


def augmented_alike(images: Tensor, settings: Views, draws: Tensor) -> Tensor:
    """All images [B, 3, S, S] changed with the one parameter set of draws [1, 34], by torchvision's functions.

    Values may lie outside [0, 1]; brightness, contrast and saturation clamp them, as does most of a hue shift.
    """
    from torchvision.transforms import functional as T

    ((name, view),) = settings.crops.items()
    for operation in view.order:
        setting = getattr(view, operation)
        if operation == "crop":
            images = cropped_alike(images, view, settings.side(name), draws)
        elif operation == "rotate90":
            images = torch.rot90(images, int(parameters.quarter_turns(draws)) if setting else 0, (2, 3))
        elif setting and len(parameters.chosen(draws, operation, getattr(setting, "probability", setting))):
            if operation == "flip":
                images = T.hflip(images)
            elif operation == "gray":
                images = T.rgb_to_grayscale(images, num_output_channels=3)
            elif operation == "solarise":
                images = T.solarize(images, setting.threshold)
            elif operation == "blur":
                images = T.gaussian_blur(images, settings.kernel(name), float(parameters.blur_sigmas(setting, draws)))
            else:
                images = coloured_alike(images, view, draws)
    return images


def cropped_alike(images: Tensor, view: View, size: int, draws: Tensor) -> Tensor:
    """The same random resized or padded crop of all images, [B, 3, S, S] to [B, 3, size, size]."""
    from torchvision.transforms import functional as T

    if view.crop is not None:
        top, left, height, width = parameters.crop_boxes(view.crop, draws, *images.shape[-2:])[0].tolist()
        mode = T.InterpolationMode(view.crop.interpolation)
        return T.resized_crop(images, top, left, height, width, [size, size], mode, antialias=view.crop.antialias)
    if view.pad_crop is not None:
        top, left = parameters.pad_offsets(view.pad_crop, draws)[0].tolist()
        return T.crop(T.pad(images, [view.pad_crop.padding]), top, left, size, size)
    return images


def coloured_alike(images: Tensor, view: View, draws: Tensor) -> Tensor:
    """The same colour jitter of all images, in the order drawn; only a strength of 0 leaves the values unclamped."""
    from torchvision.transforms import functional as T

    from mvmr.data.view_colour import ORDERS

    assert view.jitter is not None
    strengths = (view.jitter.brightness, view.jitter.contrast, view.jitter.saturation, view.jitter.hue)
    changes = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    factors = parameters.jitter_factors(view.jitter, draws)[0].tolist()
    for which in ORDERS[int(parameters.jitter_orders(draws))]:
        if strengths[which]:
            images = changes[which](images, factors[which])
    return images
