"""Views of the methods' papers, by name: plain values that `Views` checks and others are laid over."""

from __future__ import annotations

from typing import Any

_STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "probability": 0.8}
_BYOL_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "probability": 0.8}
_BYOL_CROP = {"scale": [0.08, 1.0], "interpolation": "bicubic"}
_MOCO_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8}
_BLUR_ALWAYS = {"sigma": [0.1, 2.0], "probability": 1.0}
_BLUR_HALF = {"sigma": [0.1, 2.0], "probability": 0.5}
_BLUR_SELDOM = {"sigma": [0.1, 2.0], "probability": 0.1}
_DINO_GLOBAL = {"scale": [0.4, 1.0], "interpolation": "bicubic"}
_SWAV = {"flip": 0.5, "jitter": _STRONG, "gray": 0.2, "blur": _BLUR_HALF}
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
            "jitter": _MOCO_JITTER,
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
            "blur": _BLUR_HALF,
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
            "jitter": _MOCO_JITTER,
            "gray": 0.2,
            "blur": _BLUR_HALF,
            "flip": 0.5,
        },
    },
    # BYOL (Grill et al., 2020), Table 6; Barlow Twins, MoCo v3 and VICReg's code use the same. The two views differ in
    # blur and solarisation. (BYOL's code adds the brightness change; here it multiplies, as everywhere else.)
    "byol": {
        "first": {
            "crop": _BYOL_CROP, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2,
            "blur": _BLUR_ALWAYS,
        },
        "second": {
            "crop": _BYOL_CROP, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2,
            "blur": _BLUR_SELDOM, "solarise": {"threshold": 0.5, "probability": 0.2},
        },
    },
    # SwAV (Caron et al., 2020), 2 x 224 + 6 x 96 pixels; local views keep that proportion at other sizes. (Its blur
    # draws a radius for PIL's approximation; here the same range is the Gaussian's sigma.)
    "multicrop": {
        "global": {"count": 2, "crop": {"scale": [0.14, 1.0]}, **_SWAV},
        "local": {"stream": "local", "count": 6, "crop": {"scale": [0.05, 0.14]}, **_SWAV},
    },
    # DINO (Caron et al., 2021), 2 x 224 + 8 x 96 pixels; local views keep that proportion at other sizes.
    "dino": {
        "first": {
            "crop": _DINO_GLOBAL, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2, "blur": _BLUR_ALWAYS,
        },
        "second": {
            "crop": _DINO_GLOBAL, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2,
            "blur": _BLUR_SELDOM, "solarise": {"threshold": 0.5, "probability": 0.2},
        },
        "local": {
            "stream": "local", "count": 8, "crop": {"scale": [0.05, 0.4], "interpolation": "bicubic"},
            "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2, "blur": _BLUR_HALF,
        },
    },
    # solo-learn's views of CIFAR: strong and equal (its SimCLR), weak and equal (its SimSiam, MoCo v2+), and a pair
    # without blur of which one view is solarised (its BYOL, Barlow Twins, DINO, MoCo v3). Its blur is PIL's, as wide as
    # its radius needs; here it is 3 pixels wide at 32, as SimCLR has it.
    "cifar_strong": {
        "augmented": {"count": 2, "crop": _BYOL_CROP, "flip": 0.5, "jitter": _STRONG, "gray": 0.2, "blur": _BLUR_HALF},
    },
    "cifar_weak": {
        "augmented": {
            "count": 2, "crop": _BYOL_CROP, "flip": 0.5, "jitter": _MOCO_JITTER, "gray": 0.2, "blur": _BLUR_HALF,
        },
    },
    "cifar_pair": {
        "first": {"crop": _BYOL_CROP, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2},
        "second": {
            "crop": _BYOL_CROP, "flip": 0.5, "jitter": _BYOL_JITTER, "gray": 0.2,
            "solarise": {"threshold": 0.5, "probability": 0.2},
        },
    },
}  # fmt: skip
