"""What is cropped and changed: the settings of views, and the named recipes of the methods' papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from mvmr.types import Section

__all__ = ["VIEW_RECIPES", "Blur", "Crop", "Jitter", "PadCrop", "Solarise", "View", "Views", "view_settings"]

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
        if given["recipe"] == "multicrop" and isinstance(size, int):
            crops["local"] = _merged({"size": max(1, round(size * 96 / 224))}, crops["local"])
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


_STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "probability": 0.8}
_BYOL_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "probability": 0.8}
_BYOL_CROP = {"scale": [0.08, 1.0], "interpolation": "bicubic"}
_SWAV = {"flip": 0.5, "jitter": _STRONG, "gray": 0.2, "blur": {"sigma": [0.1, 2.0], "probability": 0.5}}
_COLOUR_FIRST = ["jitter", "gray", "crop", "rotate90", "flip", "blur", "solarise"]
_GRAY_FIRST = ["crop", "rotate90", "flip", "gray", "jitter", "blur", "solarise"]

VIEW_RECIPES: dict[str, dict[str, Any]] = {
    # MV-MR (Kinakh et al., 2024), STL-10 and ImageNet: torchvision's default crop, and a blur that is always there.
    "mvmr": {
        "augmented": {"crop": {}, "flip": 0.5, "jitter": _STRONG, "gray": 0.2, "blur": {"probability": 1.0}},
    },
    # MV-MR's distillation on CIFAR-100: geometry alone.
    "mvmr_cifar": {
        "augmented": {"crop": None, "pad_crop": {"padding": 4}, "flip": 0.5},
    },
    # MV-MR's CIFAR-20: colours are changed before the crop.
    "mvmr_cifar20": {
        "augmented": {
            "order": _COLOUR_FIRST,
            "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8},
            "gray": 0.1,
            "crop": {"scale": [0.2, 1.0], "interpolation": "bicubic"},
            "flip": 0.5,
        },
    },
    # SimCLR (Chen et al., 2020), Appendix A, strength 1: two views of one kind, blur on half of them.
    "simclr": {
        "augmented": {
            "count": 2,
            "crop": {"scale": [0.08, 1.0], "interpolation": "bicubic"},
            "flip": 0.5,
            "jitter": _STRONG,
            "gray": 0.2,
            "blur": {"sigma": [0.1, 2.0], "probability": 0.5},
        },
    },
    # MoCo v1 (He et al., 2020), Section 3.4: grey before the colour jitter, which is always there.
    "moco_v1": {
        "augmented": {
            "count": 2,
            "order": _GRAY_FIRST,
            "crop": {"scale": [0.2, 1.0]},
            "gray": 0.2,
            "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4, "probability": 1.0},
            "flip": 0.5,
        },
    },
    # MoCo v2 (Chen et al., 2020); SimSiam uses the same.
    "moco_v2": {
        "augmented": {
            "count": 2,
            "crop": {"scale": [0.2, 1.0]},
            "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8},
            "gray": 0.2,
            "blur": {"sigma": [0.1, 2.0], "probability": 0.5},
            "flip": 0.5,
        },
    },
    # BYOL (Grill et al., 2020), Table 6: the two views differ in blur and solarisation. (Its code adds the brightness
    # change; here it multiplies, as everywhere else.)
    "byol": {
        "first": {
            "crop": _BYOL_CROP, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2,
            "blur": {"sigma": [0.1, 2.0], "probability": 1.0},
        },
        "second": {
            "crop": _BYOL_CROP, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2,
            "blur": {"sigma": [0.1, 2.0], "probability": 0.1}, "solarise": {"threshold": 0.5, "probability": 0.2},
        },
    },
    # SwAV (Caron et al., 2020), 2 x 224 + 6 x 96 pixels; local views keep that proportion at other sizes. (Its blur
    # draws a radius for PIL's approximation; here the same range is the Gaussian's sigma.)
    "multicrop": {
        "global": {"count": 2, "crop": {"scale": [0.14, 1.0]}, **_SWAV},
        "local": {"stream": "local", "count": 6, "crop": {"scale": [0.05, 0.14]}, **_SWAV},
    },
}  # fmt: skip
