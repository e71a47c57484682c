"""What is watched while a run trains: spread, rank, dependence on every representation, and kNN accuracy."""

from __future__ import annotations

import copy
import warnings

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mvmr.config import OnlineConfig
from mvmr.data.batches import BatchMaker
from mvmr.data.loading import plain_batches
from mvmr.data.sources import ImageSource, subset
from mvmr.engine.metrics import Metrics
from mvmr.engine.module import Adapter
from mvmr.evaluation.diagnostics import collapse_warning, embedding_std, rankme
from mvmr.evaluation.features import extract
from mvmr.evaluation.knn import KNNConfig, knn
from mvmr.losses.distance_correlation import centred_distances, correlation_of
from mvmr.nets.weights import Encoder, EncoderCard
from mvmr.ops.random import permutation
from mvmr.types import Features


class Online(Callback):
    """Measures `method.exported()` with the functions of the evaluation command; nothing is chosen by it."""

    def __init__(
        self,
        config: OnlineConfig,
        metrics: Metrics,
        card: EncoderCard,
        *,
        source: ImageSource,
        maker: BatchMaker,
        labelled: tuple[ImageSource, ImageSource] | None,
    ):
        self.config, self.metrics, self.card = config, metrics, card
        self.watched = some_of(source, config.images)
        self.maker = maker
        self.labelled = labelled and tuple(some_of(part, config.knn_images) for part in labelled)
        self._warned = False
        self._distances: dict[str, Tensor] | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        epoch, last = trainer.current_epoch + 1, trainer.current_epoch + 1 == trainer.max_epochs
        record: dict[str, float] = {}
        if trainer.is_global_zero:  # the exported encoder is the same on every rank
            if due(self.config.every_epochs, epoch, last):
                record |= self.diagnose(pl_module)
            if self.labelled and due(self.config.knn_every_epochs, epoch, last):
                record |= {f"knn/{name}": value for name, value in self.neighbours(pl_module).items()}
            if record:
                self.metrics.file.write({"step": trainer.global_step, "epoch": trainer.current_epoch, **record})
        trainer.strategy.barrier("online")
        self.metrics.pause()

    def encoder_of(self, adapter: Adapter) -> Encoder:
        return Encoder(adapter.method.exported(), self.card).to(adapter.device)

    def features(self, adapter: Adapter, source: ImageSource) -> Tensor:
        batches = plain_batches(source, batch_size=512, size=self.card.image_size, workers=0)
        return extract(self.encoder_of(adapter), batches, device=adapter.device).cpu()

    def diagnose(self, adapter: Adapter) -> dict[str, float]:
        """Spread and rank of the features of the watched images, and their dependence on each representation."""
        x = self.features(adapter, self.watched)
        record = {"embedding_std": embedding_std(x), "rankme": rankme(x)}
        own = centred_distances(x, estimator="u")
        for name, theirs in self.distances().items():
            record[f"dependence/{name}"] = correlation_of(own, theirs, power=2, estimator="u").item()
        sentence = collapse_warning(record, x.shape[1])
        if sentence and not self._warned:
            self._warned = True
            warnings.warn(f"epoch {adapter.current_epoch + 1}: {sentence}", stacklevel=2)
        return record

    def distances(self) -> dict[str, Tensor]:
        """{name: [N, N]} centred distances of the watched images' representations; they do not change, so made once."""
        if self._distances is None:
            maker = BatchMaker(self.maker.views, copy.deepcopy(self.maker.representations).cpu())
            parts = []
            for index, images in plain_batches(self.watched, batch_size=256, size=self.card.image_size, workers=0):
                parts.append(maker.features(maker.views(images, index, 0)["plain"][0], index, 0))
            names = list(self.maker.representations)
            self._distances = {
                name: centred_distances(torch.cat([part[name] for part in parts]), estimator="u") for name in names
            }
        return self._distances

    def neighbours(self, adapter: Adapter) -> dict[str, float]:
        assert self.labelled
        train, test = (Features(self.features(adapter, part), part.labels, part.classes) for part in self.labelled)
        return knn(train, test, KNNConfig(k=self.config.knn_k, temperature=self.config.knn_temperature))


def due(every: int, epoch: int, last: bool) -> bool:
    """Whether something done every so many epochs, and at the last, is done after this one."""
    return every > 0 and (last or epoch % every == 0)


def some_of(source: ImageSource, images: int) -> ImageSource:
    """At most `images` of a source, the same ones in every run."""
    if len(source) <= images:
        return source
    return subset(source, permutation(0, 0, len(source))[:images].sort().values)
