"""The interface that every self-supervised method implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, final

from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter

from mvmr.nets.encoders import EncoderConfig
from mvmr.types import Batch, FeaturePass, Section, Step, UserError

Width = Annotated[int, Field(ge=1)]
"""The width of a layer, in settings."""


class MethodConfig(Section):
    """Settings that every method has; each method adds its own."""

    name: str
    """The method's key in METHODS."""

    needs: ClassVar[Mapping[str, int]] = {"global": 2}
    """{stream: how many of its views the method takes}; 0: any number, and none is well too."""
    takes_representations: ClassVar[bool] = False
    """Whether the method looks at the run's representations."""

    def representation_defaults(self) -> dict[str, dict[str, Any]]:
        """Settings that a preset gives to representations, by name; what the user gives comes on top."""
        return {}

    def check_views(self, counts: Mapping[str, int]) -> None:
        """Raise ValueError where the run's views, {stream: number}, are fewer than the method takes."""
        for stream, needed in self.needs.items():
            if counts.get(stream, 0) < needed:
                raise ValueError(
                    f"{self.name} takes {needed} views of the stream `{stream}`, and `views` makes "
                    f"{counts.get(stream, 0)}: choose another views.recipe, or set the count of one of views.crops"
                )

    def check_batch(self, size: int) -> None:
        """Raise ValueError where these settings do not fit a batch, of all devices, of so many images."""

    def check_representations(self, names: Collection[str]) -> None:
        """Raise ValueError where these settings do not fit the run's representations."""

    def fitted(self, width: Callable[[str], int], sides: Sequence[int] = ()) -> MethodConfig:
        """These settings for a run: width(name) measures the F of one of its representations, [B, F] in a batch.

        sides: in pixels, of the plain image and then of the views.
        """
        return self

    def remarks(self, counts: Mapping[str, int], representations: Collection[str]) -> list[str]:
        """What to warn of when a run starts with these views, {stream: number}, and representations."""
        unused = [f"the stream `{stream}` of views" for stream in counts if stream not in self.needs]
        unused += [
            f"{count - self.needs[stream]} of the views of the stream `{stream}`"
            for stream, count in counts.items()
            if 0 < self.needs.get(stream, 0) < count
        ]
        if representations and not self.takes_representations:
            unused.append(f"`representations` ({', '.join(representations)})")
        return [f"{self.name} does not look at {what}, which is made all the same" for what in unused]


class Exported(NamedTuple):
    """A network to save beside the run's encoder, and what has to be known to build it again."""

    net: nn.Module
    encoder: EncoderConfig
    dim: int
    """Width of its features."""


class DistillationConfig(MethodConfig):
    """Settings of methods whose student, on one augmented view, learns from one frozen teacher of the plain image."""

    needs: ClassVar[Mapping[str, int]] = {"global": 1}
    takes_representations: ClassVar[bool] = True

    teacher: str = "teacher"
    """The name, among the run's `representations`, of the one that teaches."""
    teacher_width: int | None = Field(None, ge=1, exclude=True)
    """F of the teacher's [B, F]: found out when a run is built, and not written down."""

    def check_representations(self, names: Collection[str]) -> None:
        if self.teacher not in names:
            raise ValueError(
                f"method.teacher is {self.teacher!r}, and `representations` has {', '.join(names) or 'nothing'}: add "
                f"representations.{self.teacher} (`kind: teacher` and a `model`), or set method.teacher to another name"
            )

    def fitted(self, width: Callable[[str], int], sides: Sequence[int] = ()) -> DistillationConfig:
        found = width(self.teacher)
        if self.teacher_width not in (None, found):
            raise UserError(f"method.teacher_width={self.teacher_width}: the teacher's is {found}; leave it out")
        return self.model_copy(update={"teacher_width": found})

    def remarks(self, counts: Mapping[str, int], representations: Collection[str]) -> list[str]:
        others = [name for name in representations if name != self.teacher]
        looked_past = [f"{self.name} learns from {self.teacher} alone and does not look at {name}" for name in others]
        return super().remarks(counts, representations) + looked_past

    @property
    def width(self) -> int:
        """F. Raises ValueError before `fitted` has been called."""
        if self.teacher_width is None:
            raise ValueError(f"{self.name} needs the width of its teacher: build it with config.fitted(width)")
        return self.teacher_width


class Method(nn.Module, ABC):
    """One self-supervised objective; knows no device, rank, optimiser, logger or engine."""

    Config: ClassVar[type[MethodConfig]]
    summary: ClassVar[str]
    """One line for lists: the idea and its source."""
    base_lr: ClassVar[float]
    """The paper's learning rate for a batch of 256: `optimizer.lr: auto` scales it linearly with the batch."""
    base_optimizer: ClassVar[str]
    """The optimiser that rate is for."""
    loss_is_progress: ClassVar[bool] = True
    """False where the loss may rise while learning goes well (MoCo's, DINO's): a rate cannot be found by it."""

    def __init__(self, encoder: nn.Module, dim: int, config: MethodConfig):
        super().__init__()

    def prepare(self, images: int) -> None:
        """Make the buffers whose size is that of the data set, of `images` images; called once, before anything else.

        Called under the run's seed and equal on all ranks. A checkpoint then finds these buffers in their final size.
        """

    @abstractmethod
    def exported(self) -> nn.Module:
        """The network that is evaluated and saved: online net, EMA teacher or student."""

    def also_exported(self) -> Mapping[str, Exported]:
        """{NAME: a further network that users may want}, each saved as NAME.safetensors beside encoder.safetensors."""
        return {}

    @abstractmethod
    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """The networks' work, image by image: may be run in chunks, so nothing is gathered here.

        Two methods are exceptions, and not for chunks: MoCo, whose shuffle of the batch over devices belongs to its
        networks' work, and OSS, which broadcasts the key of its dropout, another one at each call.
        """

    @abstractmethod
    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms over the whole batch (gathered here): "loss" is minimised, the others are logged by name.

        Changes no parameter and no buffer but those of batch norm: what it learns of the batch for queues and averages
        is kept aside, detached, for `after_step`. Terms may be of this rank's part: their mean over ranks is logged.
        """

    @final
    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self.objective(self.embed(batch), batch, step)

    def before_step(self, step: Step, pass_over: FeaturePass) -> Iterable[Parameter]:
        """Relabel where due; returns parameters drawn anew, whose optimiser state is dropped."""
        return ()

    def after_backward(self, step: Step) -> None:
        """Change gradients before the optimiser sees them (freeze prototypes or a last layer)."""

    def after_step(self, step: Step) -> None:
        """Follow the optimiser's step (moving averages, normalised prototypes)."""

    def sampling_weights(self) -> Tensor | None:
        """[N] weights read by the sampler when an epoch starts; None draws every image once."""
        return None

    def parameter_groups(self) -> list[dict]:
        """Optimiser groups; by default one with all trainable parameters.

        Keys beside "params": "lr_scale" multiplies the rate, "weight_decay" replaces the run's, and "constant_lr": True
        keeps the rate at its peak. The engine takes biases and norms of every group out of weight decay.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]


def check_clusters(key: str, clusters: int, images: int) -> None:
    """Raise UserError where the setting `key` asks for more clusters of images than there are images."""
    if images < clusters:
        raise UserError(
            f"{key} is {clusters}, but there are {images} images to cluster: take fewer, so that a cluster has a "
            "hundred images or so, or raise data.limit if it is set"
        )
