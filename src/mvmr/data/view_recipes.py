"""What is cropped and changed: the settings of views, laid over one of the named recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from mvmr.data.named_views import VIEW_RECIPES
from mvmr.types import Section

__all__ = ["VIEW_RECIPES", "Blur", "Crop", "Jitter", "PadCrop", "Solarise", "View", "Views", "view_settings"]

LOCAL_SHARE = 96 / 224
"""Side of a local view that has no size of its own, as a share of `views.size`: that of SwAV and DINO."""

Probability = Annotated[float, Field(ge=0, le=1)]
Operation = Literal["crop", "rotate90", "flip", "jitter", "gray", "blur", "solarise"]


def _check_range(key: str, values: tuple[float, float], *, greatest: float | None = None) -> None:
    low, high = values
    if not 0 < low <= high or (greatest is not None and high > greatest):
        upper = "" if greatest is None else f" <= {greatest:g}"
        raise ValueError(f"{key} must be two numbers with 0 < least <= greatest{upper}, not {list(values)}")


class Crop(Section):
    """A random part of the image, resized to the view's size (torchvision's RandomResizedCrop)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height of the part; drawn uniformly in its logarithm."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How pixels are resampled; bicubic results are clamped to [0, 1]."""
    antialias: bool = True
    """Widen the kernel where the part is larger than the view."""

    @model_validator(mode="after")
    def _ranges(self) -> Crop:
        _check_range("scale", self.scale, greatest=1.0)
        _check_range("ratio", self.ratio)
        return self


class PadCrop(Section):
    """A window of the view's size out of the image with a black border (torchvision's RandomCrop with padding)."""

    padding: int = Field(4, ge=0)
    """Width of the border, in pixels."""


class Jitter(Section):
    """Brightness, contrast, saturation and hue changed in a random order, of each image (torchvision's ColorJitter)."""

    brightness: float = Field(0.0, ge=0)
    """b: factor uniform in [max(0, 1 - b), 1 + b]; 0: not changed."""
    contrast: float = Field(0.0, ge=0)
    """Likewise."""
    saturation: float = Field(0.0, ge=0)
    """Likewise."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """h: shift uniform in [-h, h], in turns of the colour circle; 0: not changed."""
    probability: Probability = 0.8
    """Share of images that are changed; 0.8 in every paper followed here but MoCo v1."""


class Blur(Section):
    """Gaussian blur with reflected borders."""

    kernel: int | None = Field(None, ge=1)
    """Odd width in pixels; null: 2 int(size / 20) + 1, which is 3 at 32, 9 at 96 and 23 at 224 pixels (SimCLR)."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation in pixels, drawn uniformly."""
    probability: Probability = 1.0
    """Share of images that are blurred."""

    @model_validator(mode="after")
    def _ranges(self) -> Blur:
        _check_range("sigma", self.sigma)
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {self.kernel}; try {self.kernel + 1}")
        return self


class Solarise(Section):
    """Values at or above the threshold are inverted (x becomes 1 - x)."""

    threshold: Probability = 0.5
    """In [0, 1]."""
    probability: Probability = 0.2
    """Share of images that are solarised; 0.2 in BYOL's second view."""


class View(Section):
    """One kind of random view; `null` switches an operation off."""

    stream: str = Field("global", min_length=1)
    """The name under which a method finds it; views of one stream have one size."""
    count: int = Field(1, ge=0)
    """How many of this kind, each with random numbers of its own; 0 switches the view off."""
    size: int | None = Field(None, ge=1)
    """Side in pixels; null: `views.size`."""
    order: tuple[Operation, ...] = ("crop", "rotate90", "flip", "jitter", "gray", "blur", "solarise")
    """What is done first to last; operations that are off are passed over."""
    crop: Crop | None = Crop()
    """Random resized crop; with `pad_crop` null too, the view has the plain view's centre crop."""
    pad_crop: PadCrop | None = None
    """Padded crop, in place of `crop`."""
    rotate90: bool = False
    """Rotate by 0, 90, 180 or 270 degrees."""
    flip: Probability = 0.5
    """Share of images mirrored left to right."""
    jitter: Jitter | None = None
    """Colour changes."""
    gray: Probability = 0.0
    """Share of images made grey (Rec. 601 weights)."""
    blur: Blur | None = None
    """Gaussian blur."""
    solarise: Solarise | None = None
    """Solarisation."""

    @model_validator(mode="after")
    def _consistent(self) -> View:
        if self.crop is not None and self.pad_crop is not None:
            raise ValueError("crop and pad_crop are both set; set one of them to null")
        if self.stream == "plain":
            raise ValueError("stream: plain is the image without augmentation; choose another name")
        if "crop" not in self.order or len(set(self.order)) < len(self.order):
            raise ValueError("order must name crop, and each operation at most once")
        left_out = [name for name in ("rotate90", "flip", "jitter", "gray", "blur", "solarise")
                    if getattr(self, name) and name not in self.order]  # fmt: skip
        if left_out:
            raise ValueError(f"{', '.join(left_out)}: switched on, but missing in order; add it there")
        return self


class Views(Section):
    """All views of an image: a named recipe, and what is changed in it."""

    recipe: str
    """Where the values come from that are not given; see VIEW_RECIPES."""
    size: int = Field(ge=1)
    """Side in pixels of the plain view, and of views that have no size of their own."""
    crops: dict[str, View] = Field(default_factory=dict)
    """The kinds of views by name; what is given is laid over the recipe's values, key by key."""

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("recipe"), str):
            return given
        if given["recipe"] not in VIEW_RECIPES:
            raise ValueError(f"recipe: {given['recipe']!r} is not known; choose one of {', '.join(VIEW_RECIPES)}")
        changes = given.get("crops", {})
        if not isinstance(changes, Mapping):
            return given
        crops = dict(VIEW_RECIPES[given["recipe"]])
        for name in sorted(changes, key=str):  # the views' numbers must not depend on the order in a file
            crops[name] = _merged(crops.get(name, {}), _plain_mapping(changes[name]))
        size = given.get("size")
        if isinstance(size, int):
            for name, view in crops.items():
                if isinstance(view, Mapping) and view.get("stream") == "local":
                    crops[name] = _merged({"size": max(1, round(size * LOCAL_SHARE))}, view)
        return {**given, "crops": crops}

    @model_validator(mode="after")
    def _sizes(self) -> Views:
        sizes: dict[str, int] = {}
        for name, view in self.crops.items():
            if sizes.setdefault(view.stream, self.side(name)) != self.side(name):
                raise ValueError(f"crops.{name}.size: stream {view.stream} has views of another size; give it its own")
            if view.blur is not None and self.kernel(name) // 2 >= self.side(name):
                widest = 2 * self.side(name) - 1
                raise ValueError(f"crops.{name}.blur.kernel: {self.kernel(name)} is too wide, at most {widest} here")
        return self

    def counts(self) -> dict[str, int]:
        """{stream: how many views it has}."""
        counts: dict[str, int] = {}
        for view in self.crops.values():
            counts[view.stream] = counts.get(view.stream, 0) + view.count
        return {stream: count for stream, count in counts.items() if count}

    def sides(self) -> list[int]:
        """Every side in pixels that a view has."""
        return sorted({self.side(name) for name, view in self.crops.items() if view.count})

    def side(self, name: str) -> int:
        """Pixels on a side of the view of that name."""
        return self.crops[name].size or self.size

    def kernel(self, name: str) -> int:
        """Width in pixels of that view's blur, which must be on."""
        blur = self.crops[name].blur
        assert blur is not None
        return blur.kernel or 2 * int(0.05 * self.side(name)) + 1


def view_settings(recipe: str, *, size: int) -> Views:
    """The views of a named recipe as it stands, at `size` pixels. Raises ValueError for an unknown name."""
    return Views(recipe=recipe, size=size)


def _plain_mapping(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`, key by key in nested mappings."""
    over = _plain_mapping(over)
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}
