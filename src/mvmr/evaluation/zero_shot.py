"""Zero-shot classification: images by the nearest class name, embedded by CLIP's text tower; nothing is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from mvmr.data.decode import UnreadableImage
from mvmr.data.images import ImageSource
from mvmr.data.view_ops import resize
from mvmr.data.workers import in_workers
from mvmr.evaluation.features import accuracies, extract, labelled
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.nets.clip_encoder import ClipTowers
from mvmr.ops.modes import evaluating
from mvmr.types import Features, RunError, Section, UserError

WORDNET_ID = re.compile(r"n\d{8}")


class ZeroShotConfig(Section):
    """Settings of `zero_shot`."""

    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences with one {} for the class name (Radford et al., ICML 2021, Section 3.1.4); of several, embeddings are
    averaged."""
    class_names: Path | None = None
    """Text file of the names to use, one a line in the order of the classes; null: the data set's own."""
    batch_size: int = Field(default=256, ge=1)
    """Images, and sentences, at a time."""

    @field_validator("templates")
    @classmethod
    def _with_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [each for each in templates if each.count("{}") != 1 or "{" in each.replace("{}", "")]
        if wrong or not templates:
            raise ValueError(f"a template has one {{}} for the class name and no other brace; these have not: {wrong}")
        return templates


def zero_shot(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: ZeroShotConfig, workplace: Workplace
) -> Metrics:
    """{"top1", "top5"} in percent of the whole test split, with each image's outcome; `train` is not looked at.

    Images are resized as the model was trained with, not as for other evaluations. Raises UserError for encoders
    without a text tower, and where names and labels do not fit.
    """
    towers = encoder.backbone
    if not isinstance(towers, ClipTowers):
        raise UserError(
            "zero_shot needs an encoder with a text tower: give open_clip:ARCH/TAG (pip install 'mvmr[clip]'); "
            f"this one is {encoder.card.encoder.name}"
        )
    names = class_names(test, config)
    encoder.to(workplace.device)
    texts = text_embeddings(towers, names, config.templates, batch_size=config.batch_size)
    images = extract(encoder, _counted(test, encoder, config, workplace), device=workplace.device)
    return zero_shot_metrics(Features(images, test.labels, names), texts)


def zero_shot_metrics(test: Features, texts: Tensor) -> Metrics:
    """top1 and top5 in percent of image embeddings x [M, D] against one text embedding a class, [C, D].

    An image belongs to the text of largest cosine similarity; of equal ones the lower class counts. Raises UserError
    for labels that do not fit, RunError for embeddings that are not finite.
    """
    x, y = labelled(test, "test")
    if texts.ndim != 2 or texts.shape[1] != x.shape[1]:
        raise UserError(f"image embeddings are {list(x.shape)} and text embeddings {list(texts.shape)}; use one model")
    if int(y.max()) >= len(texts):
        raise UserError(
            f"the test split has class {int(y.max())} and there are {len(texts)} class names; name them all"
        )
    if not bool(torch.isfinite(texts).all()):
        raise RunError("text embeddings are not finite: take other weights")
    return accuracies(similarities(x, texts.to(x)), y)


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarities [M, C] of embeddings [M, D] and [C, D]."""
    return functional.normalize(images, dim=1) @ functional.normalize(texts, dim=1).T


def text_embeddings(
    towers: ClipTowers, names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """One unit vector a class [C, D] on the CPU: the mean of its sentences' unit vectors, made unit again.

    Radford et al., ICML 2021, Section 3.1.4. In eval mode; the towers are afterwards as before.
    """
    sentences = [template.format(name) for name in names for template in templates]
    with evaluating(towers):
        parts = [towers.embed_texts(sentences[start : start + batch_size]).cpu()
                 for start in range(0, len(sentences), batch_size)]  # fmt: skip
    each = functional.normalize(torch.cat(parts), dim=1).view(len(names), len(templates), -1)  # [C, T, D]
    return functional.normalize(each.mean(1), dim=1)


def class_names(source: ImageSource, config: ZeroShotConfig) -> tuple[str, ...]:
    """Names for sentences: those of the file, else the data set's, with blanks for underscores. Raises UserError."""
    if config.class_names is not None:
        try:
            lines = config.class_names.expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"zero_shot.class_names: {config.class_names} cannot be read ({error})") from None
        names = tuple(line.strip() for line in lines if line.strip())
        if source.classes and len(names) != len(source.classes):
            raise UserError(
                f"zero_shot.class_names: {config.class_names} has {len(names)} names and {source.name} has "
                f"{len(source.classes)} classes; give one a line"
            )
    else:
        names = tuple(name.replace("_", " ") for name in source.classes)
        if any(WORDNET_ID.fullmatch(name) for name in names):
            raise UserError(
                f"the classes of {source.name} have WordNet's numbers ({names[0]}), which no text tower knows; give "
                "their names as zero_shot.class_names=FILE, one a line in this order"
            )
    if not names:
        raise UserError(f"{source.name} has no class names; give them as zero_shot.class_names=FILE, one a line")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"the class name {twice[0]!r} occurs twice; give distinct ones as zero_shot.class_names=FILE")
    return names


def clip_view(image: Tensor, size: int, *, fit: str = "shortest", interpolation: str = "bicubic") -> Tensor:
    """[3, size, size] uint8 of an image [3, H, W]: shorter side resized to `size`, then the centre; or squashed."""
    height, width = image.shape[1:]
    if fit == "squash":
        return resize(image, (size, size), interpolation=interpolation)
    shorter = min(height, width)
    scaled = [size if side == shorter else int(size * side / shorter) for side in (height, width)]
    image = resize(image, (scaled[0], scaled[1]), interpolation=interpolation)
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def _counted(
    source: ImageSource, encoder: Encoder, config: ZeroShotConfig, workplace: Workplace
) -> Iterator[tuple[Tensor, Tensor]]:
    towers = encoder.backbone
    assert isinstance(towers, ClipTowers)
    view = partial(clip_view, size=encoder.card.image_size, fit=towers.fit, interpolation=towers.interpolation)
    parts = list(torch.arange(len(source)).split(config.batch_size))
    made = in_workers(partial(_views, source, view), parts, workers=workplace.workers)
    for done, (index, images) in enumerate(zip(parts, made, strict=True), 1):
        yield index, images
        if workplace.progress is not None:
            workplace.progress("embedding images", min(done * config.batch_size, len(source)), len(source))


def _views(source: ImageSource, view: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
    try:
        return torch.stack([view(source.read(position).cpu()) for position in index.tolist()])
    except UnreadableImage as error:
        raise RunError(f"{error}: it was readable before; restore it, or run again to leave it out") from None
