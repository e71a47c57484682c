"""The image towers of CLIP models, from open_clip."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mvmr.nets.cards import seeded
from mvmr.nets.pretrained import OPEN_CLIP, RANDOM, hub_address, hub_file, open_clip_file, require_host
from mvmr.nets.teacher_files import fit_weights
from mvmr.nets.teacher_net import Output, TeacherInput, TeacherNet, near
from mvmr.types import UserError

EXTRA = "pip install 'mvmr[clip]'"


def clip_teacher(model: str, weights: Path | None, output: Output, image_size: int | None) -> TeacherNet:
    """open_clip:ARCH/TAG, open_clip:ARCH@random, or open_clip:ARCH with a file of weights: the image tower.

    Its vector is the projected image embedding before normalisation, as in MV-MR's code; its features are the map
    [B, C, h, w] of the last block after the final norm, without class token. The text tower is dropped.
    Raises UserError for unknown names, without the extra `clip`, and for weights that cannot be had or do not fit.
    """
    clip = imported_open_clip(model)
    arch, tag = name_parts(clip, model, weights)
    settings: dict[str, Any] = clip.get_pretrained_cfg(arch, tag) if tag else {}
    file = open_clip_file(settings, model) if tag and weights is None else None
    check_text_settings(clip.get_model_config(arch), model)
    # These weights were trained with another activation, which some architectures leave to the tag to say.
    options = {"force_quick_gelu": True} if settings.get("quick_gelu") else {}
    try:
        with quietly():
            net = seeded(
                lambda: clip.create_model(
                    arch, pretrained=file, pretrained_text=False, force_image_size=image_size, **options
                ),
                seed=0,
            )
    except Exception as error:  # whatever open_clip, or a library that it asks for, raises
        raise UserError(f"{model}: open_clip cannot make it ({type(error).__name__}: {error})") from error
    tower = net.visual
    if weights is not None:
        fit_weights(tower, weights, ())
    seen = {
        **tower.preprocess_cfg,
        **{key: settings[key] for key in ("mean", "std", "interpolation") if key in settings},
    }
    side = tower.image_size[0] if isinstance(tower.image_size, tuple) else tower.image_size
    given = TeacherInput(
        side, tuple(seen["mean"]), tuple(seen["std"]), "bilinear" if seen["interpolation"] == "bilinear" else "bicubic"
    )
    if output == "features" and not callable(getattr(tower, "forward_intermediates", None)):
        raise UserError(f"{model}: open_clip gives no features of this image tower; take output=vector")
    return TeacherNet(tower, clip_vector if output == "vector" else clip_map, given, name=model)


def clip_vector(tower: Any, images: Tensor) -> Tensor:
    """The projected embedding [B, D], not normalised."""
    made = tower(images)
    return made[0] if isinstance(made, tuple) else made  # some towers give their tokens too


def clip_map(tower: Any, images: Tensor) -> Tensor:
    """The last block's features as a map [B, C, h, w]."""
    made = tower.forward_intermediates(
        images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
    )
    return made["image_intermediates"][-1]


def imported_open_clip(model: str) -> Any:
    """The package open_clip. Raises UserError where it is not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{model}: needs open_clip ({error}); install it with {EXTRA}") from None
    return open_clip


def name_parts(clip: Any, model: str, weights: Path | None) -> tuple[str, str | None]:
    """Architecture and tag, both known to open_clip."""
    given = model.removeprefix(OPEN_CLIP)
    bare = given.removesuffix(RANDOM)
    known = clip.list_models()
    if bare.replace("/", "-") in known:
        arch, tag = bare.replace("/", "-"), ""
    else:
        first, _, tag = bare.rpartition("/")
        arch = first.replace("/", "-")
    if arch not in known:
        raise UserError(f"{model}: open_clip has no architecture {(arch or tag)!r}{near(arch or tag, known)}")
    tags = clip.list_pretrained_tags_by_model(arch)
    if given.endswith(RANDOM):
        if tag:
            raise UserError(f"{model}: a tag names weights, so it goes without {RANDOM}: open_clip:{arch}{RANDOM}")
        return arch, None
    if not tag and weights is not None:
        return arch, None
    if not clip.is_pretrained_cfg(arch, tag):
        what = f"{arch} has no weights {tag!r}" if tag else "the tag of the weights is missing"
        raise UserError(f"{model}: {what}; write open_clip:{arch}/TAG with one of {', '.join(tags) or '(none)'}, "
                        f"or open_clip:{arch}{RANDOM}")  # fmt: skip
    return arch, tag


def check_text_settings(config: dict[str, Any], model: str) -> None:
    """A text tower of the Hugging Face hub is built, and so described, before it is dropped."""
    name = config["text_cfg"].get("hf_model_name")
    if name and hub_file(name, ["config.json"]) is None:
        require_host(hub_address(), model)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep open_clip from setting up the root logger, and from warning that a random model is random."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        yield
    finally:
        root.removeHandler(silent)
