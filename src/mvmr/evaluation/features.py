"""Frozen features: extracted without a trace in the encoder, checked before they are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mvmr.evaluation.measured import Metrics
from mvmr.ops.files import write_whole
from mvmr.ops.modes import evaluating
from mvmr.types import Features, RunError, UserError

if TYPE_CHECKING:
    from mvmr.data.sources import ImageSource
    from mvmr.nets.weights import Encoder


@contextmanager
def placed(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """On `device` inside; afterwards where the module's first parameter or buffer was, whatever happens."""
    first = next(chain(module.parameters(), module.buffers()), None)
    home = torch.device(device) if first is None else first.device
    try:
        module.to(device)
        yield
    finally:
        module.to(home)


def extract(
    encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Features [N, D] float32 on the CPU, in the order of the index, whatever the order of the batches.

    batches: (index [b] int64, images [b, 3, S, S] uint8). Runs in eval mode, without gradient or autocast; parameters,
    buffers, their device and every submodule's training flag are afterwards as before.
    Raises UserError when there is no image.
    """
    device = torch.device(device)
    indices, parts = [], []
    with (
        placed(encoder, device),
        evaluating(encoder),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        for index, images in batches:
            indices.append(index.cpu())
            parts.append(encoder(images.to(device, non_blocking=True)).float().cpu())
    if not parts:
        raise UserError("there is no image to extract features of; look at the data set's root and split")
    order = torch.argsort(torch.cat(indices), stable=True)  # [N]
    return torch.cat(parts)[order]  # [N, D]


def features_of(
    encoder: Encoder,
    source: ImageSource,
    *,
    batch_size: int = 512,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of every image of a source, resized to the card's image size; x [N, D] float32 and y on the CPU.

    progress: called with (images done, images) after each batch.
    """
    from mvmr.data.loading import plain_batches

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for index, images in plain_batches(
            source, batch_size=batch_size, size=encoder.card.image_size, workers=workers
        ):
            yield index, images
            done += len(index)
            if progress is not None:
                progress(done, len(source))

    return Features(extract(encoder, counted(), device=device), source.labels, source.classes)


def labelled(features: Features, split: str) -> tuple[Tensor, Tensor]:
    """The x [N, D] and y [N] of features that can be evaluated.

    Raises UserError when labels are missing or do not fit, RunError when a feature is not finite.
    """
    x, y = _with_labels(features, split)
    if y.ndim == 2 and len(y) == len(x):
        raise UserError(
            f"the {split} split has several classes an image (labels {list(y.shape)}), and this evaluation takes one; "
            "use --on multilabel"
        )
    if x.ndim != 2 or len(x) == 0 or y.shape != x.shape[:1]:
        raise UserError(
            f"the {split} split has features {list(x.shape)} and labels {list(y.shape)}; "
            "[N, D] and [N] are needed, with N above 0"
        )
    if int(y.min()) < 0:
        raise UserError(f"the {split} split has images without label (below 0); leave them out")
    return _finite(x, split), y.to(x.device)


def multi_labelled(features: Features, split: str) -> tuple[Tensor, Tensor]:
    """The x [N, D] and y [N, C], of 1, 0 and -1, of features that can be evaluated with several classes an image.

    Raises UserError when labels are missing or do not fit, RunError when a feature is not finite.
    """
    x, y = _with_labels(features, split)
    if y.ndim == 1:
        raise UserError(
            f"the {split} split has one class an image, and multilabel takes several; use --on knn, linear or "
            "linear_fast, or a multi-label data set such as voc07"
        )
    if x.ndim != 2 or len(x) == 0 or y.ndim != 2 or len(y) != len(x):
        raise UserError(
            f"the {split} split has features {list(x.shape)} and labels {list(y.shape)}; "
            "[N, D] and [N, C] are needed, with N above 0"
        )
    if not bool(((y >= -1) & (y <= 1)).all()):
        raise UserError(f"the {split} split has labels other than 1 (present), 0 (absent) and -1 (left out)")
    return _finite(x, split), y.to(x.device)


def _with_labels(features: Features, split: str) -> tuple[Tensor, Tensor]:
    if features.y is None:
        raise UserError(f"the {split} split has no labels, and this evaluation needs them; take a labelled data set")
    return features.x, features.y


def _finite(x: Tensor, split: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise RunError(f"the {split} split has features that are not finite: the encoder has diverged")
    return x


def labelled_pair(train: Features, test: Features) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """(x, y) of both splits on the training features' device, and the number of classes.

    Raises UserError as `labelled` does, and when the two splits' widths or classes differ.
    """
    (x, y), (x_test, y_test) = labelled(train, "train"), labelled(test, "test")
    _same_kind(train, test)
    classes = max(int(y.max()) + 1, int(y_test.max()) + 1, len(train.classes))
    return (x, y), (x_test.to(x), y_test.to(x.device)), classes


def multi_labelled_pair(
    train: Features, test: Features
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """(x, y) of both splits on the training features' device, and the classes' names (their numbers, without names).

    Raises UserError as `multi_labelled` does, and when the two splits' widths or classes differ.
    """
    (x, y), (x_test, y_test) = multi_labelled(train, "train"), multi_labelled(test, "test")
    _same_kind(train, test)
    names = train.classes or test.classes or tuple(str(number) for number in range(y.shape[1]))
    if not len(names) == y.shape[1] == y_test.shape[1]:
        raise UserError(
            f"labels are of {y.shape[1]} classes in train and {y_test.shape[1]} in test, and there are {len(names)} "
            "names; give two splits of one data set"
        )
    return (x, y), (x_test.to(x), y_test.to(x.device)), names


def _same_kind(train: Features, test: Features) -> None:
    if train.x.shape[1] != test.x.shape[1]:
        raise UserError(
            f"features have {train.x.shape[1]} dimensions in train and {test.x.shape[1]} in test; use one encoder"
        )
    if train.classes and test.classes and train.classes != test.classes:
        raise UserError("the train and test splits have different classes; give two splits of one data set")


def accuracies(scores: Tensor, y: Tensor) -> Metrics:
    """top1 in percent, and top5 where there are more than five classes, of scores [N, C] for labels y [N].

    Exact: of equal scores the lower class is ranked first, on every device. Outcomes are 100 for a right image, else 0.
    Raises RunError for scores that are not finite: no class could be said to rank above another.
    """
    if not bool(torch.isfinite(scores).all()):
        raise RunError(
            "scores of the test images are not finite: the encoder or its classifier has diverged; train with a lower "
            "rate, or look at its weights"
        )
    own = scores.gather(1, y[:, None])  # [N, 1]
    lower = torch.arange(scores.shape[1], device=scores.device) < y[:, None]  # [N, C]
    rank = ((scores > own).sum(1) + ((scores == own) & lower).sum(1)).cpu()  # [N]
    depths = {"top1": 1, "top5": 5} if scores.shape[1] > 5 else {"top1": 1}
    right = {name: (rank < depth).double() for name, depth in depths.items()}  # [N] each
    values = {name: 100.0 * each.mean().item() for name, each in right.items()}
    return Metrics(values, outcomes={name: 100.0 * each for name, each in right.items()}, images=len(y))


def write_features(path: Path, features: Features, files: Sequence[str] | None = None) -> None:
    """features, and where there are such labels, classes and files, as .npz: written beside and moved into place.

    Raises RunError where it cannot be written.
    """
    import numpy as np

    arrays: dict[str, Any] = {"features": features.x.cpu().numpy()}
    if features.y is not None:
        arrays |= {"labels": features.y.cpu().numpy(), "classes": np.array(features.classes)}
    if files is not None:
        arrays["files"] = np.array([str(file) for file in files])
    write_whole(path, lambda stream: np.savez(stream, **arrays), remedy="make room on the disk, or name another file")
