"""Views of images: made in batches on the device, each a pure function of (seed, epoch, image index, view number)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mvmr.data import view_colour, view_ops
from mvmr.data import view_parameters as parameters
from mvmr.data.view_recipes import VIEW_RECIPES, Blur, Crop, Jitter, PadCrop, Solarise, View, Views, view_settings

__all__ = [
    "VIEW_RECIPES",
    "Blur",
    "Crop",
    "Jitter",
    "PadCrop",
    "Solarise",
    "View",
    "ViewMaker",
    "Views",
    "view_settings",
]


class ViewMaker:
    """Makes the plain view and every random view of a batch of images.

    View number v, counted over `settings.crops` and their counts, is a random stream: its parameters depend on (seed,
    epoch, index, v) alone, not on the batch, the device, or the number of workers and ranks. They are drawn on the CPU
    in float64. Holds no state, and can be sent to worker processes.
    """

    def __init__(self, settings: Views, *, mean: Sequence[float], std: Sequence[float], seed: int):
        self.settings = settings
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed
        self.numbered = [(name, k) for name, view in settings.crops.items() for k in range(view.count)]
        """(name, k) of view number v."""

    @torch.no_grad()
    def __call__(self, images: Tensor | Mapping[str, Tensor], index: Tensor, epoch: int) -> dict[str, Tensor]:
        """{"plain": [1, B, 3, S, S], stream: [V, B, 3, s, s], ...}: float32, normalised, on the images' device.

        images: uint8, or float in [0, 1], [B, 3, H, W]; or what `start` made of them, collated:
        {"plain": [B, 3, S, S], "NAME/K": [B, 3, s, s]}, uint8. index: int64 [B], best on the CPU.
        """
        prepared = images if isinstance(images, Mapping) else None
        source = images if isinstance(images, Tensor) else images["plain"]
        draws = parameters.view_draws(self.seed, epoch, index.cpu(), len(self.numbered))  # [V, B, draws]
        with torch.autocast(source.device.type, enabled=False):  # half precision would be visible
            untouched = view_ops.as_float(view_ops.plain(source, self.settings.size))
            views = {"plain": self._empty(1, untouched)}
            view_ops.normalise(untouched, self.mean, self.std, out=views["plain"][0])
            whole = source if prepared is not None else view_ops.as_float(source)
            for v, ((name, k), (stream, place)) in enumerate(zip(self.numbered, self._places(), strict=True)):
                if prepared is None:
                    view = self._made(whole, name, draws[v])
                else:
                    _, rest = self._split(name)
                    view = self._changed(view_ops.as_float(prepared[f"{name}/{k}"]), rest, name, draws[v])
                if stream not in views:
                    views[stream] = self._empty(sum(s == stream for s, _ in self._places()), view)
                view_ops.normalise(view, self.mean, self.std, out=views[stream][place])
        return views

    @torch.no_grad()
    def start(self, image: Tensor, index: int, epoch: int) -> dict[str, Tensor]:
        """A worker's part for one decoded image: the plain view, and every view up to and including its crop.

        image: uint8 [3, H, W] of any size. Returns {"plain": [3, S, S], "NAME/K": [3, s, s]}, uint8, whose sizes do not
        depend on the image, so that a batch of them can be collated and finished by a call.
        """
        draws = parameters.view_draws(self.seed, epoch, torch.tensor([index]), len(self.numbered))
        crops = {"plain": view_ops.plain(image, self.settings.size)}
        for v, (name, k) in enumerate(self.numbered):
            before, _ = self._split(name)
            x = image.unsqueeze(0)
            if before:
                x = self._changed(view_ops.as_float(x), before, name, draws[v])
            crops[f"{name}/{k}"] = view_ops.as_bytes(self._cropped_alone(x, name, draws[v]))[0]
        return crops

    def _places(self) -> list[tuple[str, int]]:
        """Stream and position in it of view number v."""
        counts: dict[str, int] = {}
        places = []
        for name, _ in self.numbered:
            stream = self.settings.crops[name].stream
            counts[stream] = counts.get(stream, 0) + 1
            places.append((stream, counts[stream] - 1))
        return places

    def _split(self, name: str) -> tuple[list[str], list[str]]:
        """Operations that are on, before and after the view's crop."""
        view = self.settings.crops[name]
        on: list[str] = [op for op in view.order if op == "crop" or getattr(view, op)]
        crop = on.index("crop")
        return on[:crop], on[crop + 1 :]

    def _made(self, images: Tensor, name: str, draws: Tensor) -> Tensor:
        """A whole view of equal-sized float images, which are left as they are."""
        before, after = self._split(name)
        view = self.settings.crops[name]
        x = self._changed(images.clone(), before, name, draws) if before else images
        mirrored = None
        if view.crop is not None and after[:1] == ["flip"]:  # the resampling mirrors for nothing
            mirrored = torch.zeros(len(images), dtype=torch.bool)
            mirrored[parameters.chosen(draws, "flip", view.flip)] = True
            after = after[1:]
        return self._changed(self._cropped(x, name, draws, mirrored), after, name, draws)

    def _cropped(self, images: Tensor, name: str, draws: Tensor, mirrored: Tensor | None) -> Tensor:
        """The crop of a batch of float images: a new tensor."""
        view, size = self.settings.crops[name], self.settings.side(name)
        if view.crop is not None:
            boxes = parameters.crop_boxes(view.crop, draws, *images.shape[-2:])
            return view_ops.crop_resize(
                images, boxes, size,
                interpolation=view.crop.interpolation, antialias=view.crop.antialias, mirrored=mirrored,
            )  # fmt: skip
        return self._framed(images, view, size, draws)

    def _cropped_alone(self, image: Tensor, name: str, draws: Tensor) -> Tensor:
        """The crop of one image [1, 3, H, W], uint8 or float: resizes its part only, as large photographs want it."""
        view, size = self.settings.crops[name], self.settings.side(name)
        if view.crop is not None:
            top, left, height, width = parameters.crop_boxes(view.crop, draws, *image.shape[-2:])[0].tolist()
            part = image[..., top : top + height, left : left + width]
            return view_ops.resize(
                part, (size, size), interpolation=view.crop.interpolation, antialias=view.crop.antialias
            )
        return self._framed(image, view, size, draws)

    def _framed(self, images: Tensor, view: View, size: int, draws: Tensor) -> Tensor:
        """The padded crop, or without any crop the plain view's frame, which may be changed in place afterwards."""
        framed = view_ops.plain(images, size)
        if view.pad_crop is not None:
            offsets = parameters.pad_offsets(view.pad_crop, draws)
            return view_ops.pad_and_crop(framed, offsets, view.pad_crop.padding)
        return framed.clone() if framed is images else framed

    def _changed(self, x: Tensor, operations: Sequence[str], name: str, draws: Tensor) -> Tensor:
        """Operations other than the crop, on float images that may be overwritten."""
        view = self.settings.crops[name]
        for operation in operations:
            if operation == "rotate90":
                x = view_ops.rotate90(x, parameters.quarter_turns(draws))
                continue
            probability = getattr(view, operation)
            if not isinstance(probability, float):
                probability = probability.probability
            positions = parameters.chosen(draws, operation, probability)
            x = view_ops.change(x, positions, self._change(operation, name, draws[positions]))
        return x

    def _change(self, operation: str, name: str, draws: Tensor) -> Callable[[Tensor], Tensor]:
        """The function of the chosen images that `operation` is, with their parameters from their draws."""
        view = self.settings.crops[name]
        if operation == "jitter" and view.jitter is not None:
            factors, orders = parameters.jitter_factors(view.jitter, draws), parameters.jitter_orders(draws)
            return lambda x: view_colour.jitter(x, factors, orders)
        if operation == "blur" and view.blur is not None:
            sigmas, kernel = parameters.blur_sigmas(view.blur, draws), self.settings.kernel(name)
            return lambda x: view_ops.gaussian_blur(x, sigmas, kernel)
        if operation == "solarise" and view.solarise is not None:
            threshold = view.solarise.threshold
            return lambda x: view_ops.solarise(x, threshold)
        return {"flip": view_ops.flip, "gray": view_colour.grayscale}[operation]

    def _empty(self, count: int, like: Tensor) -> Tensor:
        return torch.empty((count, *like.shape), dtype=torch.float32, device=like.device)
