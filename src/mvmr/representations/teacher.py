"""A frozen network's view of the plain image, as a representation: what MV-MR distils from."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.nets.teacher_net import Interpolation, Output, TeacherInput
from mvmr.nets.teachers import load_teacher
from mvmr.representations.base import Representation, fixed
from mvmr.types import IMAGENET_MEAN, IMAGENET_STD, UserError

PYTHON = "python"
"""The `model` of a teacher that is an object of Python's, given beside the settings."""
Given = nn.Module | Callable[[Tensor], Tensor]


class Teacher(Representation):
    """A frozen network's output for the plain image, [B, 3, H, W] to [B, F] (MV-MR paper, Section 5.2; Z*_k in Eq. 11).

    `model` and `weights` as in `mvmr.nets.teachers.load_teacher`. input: "own" brings the image back to [0, 1],
    resizes it (antialiased) to the network's size and normalises it the network's way; "student" resizes the
    normalised tensor bilinearly as it is, which is what MV-MR's code does. output: the network's vector, or its
    features before pooling, which `pooling` averages over all places of the image (tokens that stand for no place are
    left out) or flattens whole. image_size and interpolation: others than the network's own. mean and std: the run's.
    Raises UserError for settings that do not fit together, and as `load_teacher` does.
    """

    learned = True

    def __init__(
        self,
        *,
        model: str,
        weights: Path | None = None,
        input: Literal["own", "student"] = "own",
        output: Output = "vector",
        pooling: Literal["mean", "flatten"] = "mean",
        image_size: int | None = None,
        interpolation: Interpolation | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ):
        super().__init__()
        if model == PYTHON:
            raise UserError("was given from Python: pass it again with mvmr.train(..., teachers={NAME: module})")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size={image_size}: must be at least 1; leave it out for the network's own")
        if input == "student" and interpolation is not None:
            raise UserError("interpolation has no effect with input=student, which is bilinear; leave one of them out")
        if output == "vector" and pooling != "mean":
            raise UserError(f"pooling={pooling} has no effect on a vector; set output=features, or leave pooling out")
        net = load_teacher(model, weights=Path(weights) if weights else None, output=output, image_size=image_size)
        own = TeacherInput(net.image_size, net.mean, net.std, interpolation or net.interpolation)
        self._set(net, own, input=input, pooling=pooling, prefix_tokens=net.prefix_tokens)
        self._normalised(mean, std)
        # Where a file lies does not matter, what it holds is in the digest.
        self._described: str | None = json.dumps([net.name, output])

    @classmethod
    def of(
        cls,
        given: Given,
        *,
        own: TeacherInput | None = None,
        input: Literal["own", "student"] = "own",
        pooling: Literal["mean", "flatten"] = "mean",
        prefix_tokens: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Teacher:
        """A teacher from any module, which is copied and frozen, or any function of images [B, 3, S, S] to a tensor.

        It may give vectors [B, D], tokens [B, T, D] or maps [B, C, h, w]. own: the images that it is made for; by
        default of any size, normalised as the run's are. mean and std: the run's, filled in by
        `build_representations` where they are None. Functions are called anew in every epoch: what they do cannot be
        told from outside, so nothing of them is cached.
        """
        made = cls.__new__(cls)
        Representation.__init__(made)
        if isinstance(given, nn.Module):
            try:
                given = copy.deepcopy(given).requires_grad_(False)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise UserError(f"a teacher's module is copied, and this one cannot be ({error}); give a function of "
                                "images instead") from error  # fmt: skip
            made._described = described(given)
        elif callable(given):
            made._described = None
        else:
            raise UserError(f"a teacher is a module, or a function of images to a tensor, not a {type(given).__name__}")
        made._set(given, own or TeacherInput(), input=input, pooling=pooling, prefix_tokens=prefix_tokens)
        made._normalised(mean, std)
        return made

    def _set(self, net: Given, own: TeacherInput, *, input: str, pooling: str, prefix_tokens: int) -> None:
        self.net, self.own, self.input, self.pooling, self.prefix_tokens = net, own, input, pooling, prefix_tokens
        self._digest: str | None = None
        self.eval()

    def _normalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self._given_mean, self._given_std = mean is not None, std is not None
        self.mean, self.std = tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"a teacher needs three means and three positive deviations; got {self.mean}, {self.std}")

    def in_run(self, mean: Sequence[float], std: Sequence[float]) -> Teacher:
        """The same teacher for a run's constants, where it was made without any."""
        self.mean = self.mean if self._given_mean else tuple(mean)
        self.std = self.std if self._given_std else tuple(std)
        return self

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked: a frozen network's statistics and dropout must not run."""
        return super().train(False)

    def fingerprint(self) -> str | None:
        """Digits over settings, architecture and every weight; None for a function, which cannot be looked into."""
        if self._described is None:
            return None
        assert isinstance(self.net, nn.Module)
        if self._digest is None:
            self._digest = digest(self.net)  # the weights are frozen, so once is enough
        settings = [type(self).__name__, self.version, self._described, self._digest, repr(self.own), self.input]
        settings += [self.pooling, self.prefix_tokens, list(self.mean), list(self.std)]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    @fixed
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        shown = self.shown(images)
        parameter = next(self.net.parameters(), shown) if isinstance(self.net, nn.Module) else shown
        made: Any = self.net(shown.to(parameter.dtype))
        if not isinstance(made, Tensor):
            raise UserError(f"the teacher gives a {type(made).__name__}, not one tensor; wrap it in a function that "
                            "picks the tensor out")  # fmt: skip
        if made.ndim not in (2, 3, 4) or len(made) != len(images):
            raise UserError(f"the teacher gives {list(made.shape)} for {len(images)} images; give [B, D], tokens "
                            "[B, T, D] or maps [B, C, h, w]")  # fmt: skip
        return self._pooled(made.detach().float())

    @fixed
    def shown(self, images: Tensor) -> Tensor:
        """What the network sees of normalised images: [B, 3, H, W] to [B, 3, S, S]."""
        size = self.own.image_size
        if self.input == "student":
            return images if size is None else F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        height, width = images.shape[-2:]
        if images.shape[1] != 3 or (size is not None and height != width):
            raise UserError(f"a teacher takes square RGB images, not {images.shape[1]}x{height}x{width}: crop them")
        plain = (images * _of(self.std, images) + _of(self.mean, images)).clamp_(0, 1)
        if size is not None and size != height:
            mode = self.own.interpolation
            # Bicubic weights overshoot; images of 8 bits, which networks are trained on, cannot.
            plain = F.interpolate(plain, (size, size), mode=mode, align_corners=False, antialias=True).clamp_(0, 1)
        return (plain - _of(self.own.mean or self.mean, images)) / _of(self.own.std or self.std, images)

    def _pooled(self, made: Tensor) -> Tensor:
        if made.ndim == 2 or self.pooling == "flatten":
            return made.flatten(1)  # [B, F]
        if made.ndim == 3:
            if made.shape[1] <= self.prefix_tokens:
                raise UserError(f"the teacher gives {made.shape[1]} tokens, of which {self.prefix_tokens} would be "
                                "left out: lower prefix_tokens")  # fmt: skip
            return made[:, self.prefix_tokens :].mean(1)  # [B, D]
        return made.mean((2, 3))  # [B, C]


def digest(net: nn.Module) -> str:
    """Hexadecimal digits over names, types, shapes and bytes of a module's state, wherever it is."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        hasher.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def described(net: nn.Module) -> str:
    """A module's computation as text: its structure, plain attributes and, where it is at hand, its classes' source."""
    parts = [re.sub(r" at 0x[0-9a-f]+", "", repr(net))]
    for name, module in net.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
        parts.append(re.sub(r" at 0x[0-9a-f]+", "", f"{name} {sorted(plain.items())}"))
    for kind in sorted(
        {type(module) for module in net.modules()}, key=lambda kind: (kind.__module__, kind.__qualname__)
    ):
        try:
            parts.append(inspect.getsource(kind))
        except (OSError, TypeError):
            parts.append(f"{kind.__module__}.{kind.__qualname__}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def joined(settings: Mapping[str, Mapping[str, Any]], teachers: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Settings of representations, with those of teachers given from Python that they do not name."""
    for name in teachers:
        own = settings.get(name)
        if isinstance(own, Mapping) and own.get("model") != PYTHON:
            raise UserError(f"representations.{name}: a teacher of that name was given from Python too; rename one of "
                            f"them, or write `kind: teacher` and `model: {PYTHON}`")  # fmt: skip
    added = {name: {"kind": "teacher", "model": PYTHON} for name in teachers if name not in settings}
    return {**settings, **added}


def from_python(given: Teacher | Given, values: Mapping[str, Any]) -> Teacher:
    """A teacher given from Python, under the settings that its name has; a Teacher keeps its own."""
    if isinstance(given, Teacher):
        return given.in_run(values["mean"], values["std"])
    own = TeacherInput(image_size=values["image_size"], interpolation=values["interpolation"] or "bicubic")
    made = Teacher.of(given, own=own, input=values["input"], pooling=values["pooling"])
    return made.in_run(values["mean"], values["std"])


def _of(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(3, 1, 1)
