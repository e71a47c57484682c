"""What is watched while a run trains: spread, rank, dependence on every representation, and kNN accuracy."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional

from mvmr.config import OnlineConfig
from mvmr.data.batches import BatchMaker
from mvmr.data.loading import plain_batches
from mvmr.data.sources import ImageSource, subset
from mvmr.engine.metrics import Metrics
from mvmr.engine.module import Adapter
from mvmr.evaluation.diagnostics import collapse_warning, embedding_std, rankme
from mvmr.evaluation.features import accuracies, extract, labelled_pair
from mvmr.evaluation.head import save_head
from mvmr.evaluation.knn import KNNConfig, knn
from mvmr.evaluation.regularisation import UNCHOSEN, logistic_regression
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
        folder: Path,
    ):
        self.config, self.metrics, self.card, self.folder = config, metrics, card, folder
        self.positions = some_positions(len(source), config.images)
        self.watched = subset(source, self.positions)
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
                record |= self.judge(pl_module)
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
        for name, theirs in self.distances(adapter.device).items():
            record[f"dependence/{name}"] = correlation_of(own, theirs, power=2, estimator="u").item()
        sentence = collapse_warning(record, x.shape[1])
        if sentence and not self._warned:
            self._warned = True
            warnings.warn(f"epoch {adapter.current_epoch + 1}: {sentence}", stacklevel=2)
        return record

    def distances(self, device: torch.device) -> dict[str, Tensor]:
        """{name: [N, N]} centred distances of the watched images' representations; they do not change, so made once."""
        if self._distances is None:
            maker, parts = self.maker.to(device), []
            for index, images in plain_batches(self.watched, batch_size=256, size=self.card.image_size, workers=0):
                plain = maker.views(images.to(device), index, 0)["plain"][0]
                features = maker.features(plain, self.positions[index], 0)
                parts.append({name: rows.cpu() for name, rows in features.items()})
            self._distances = {
                name: centred_distances(torch.cat([part[name] for part in parts]), estimator="u")
                for name in maker.representations
            }
        return self._distances

    def judge(self, adapter: Adapter) -> dict[str, float]:
        """Accuracy of kNN and of a linear head on the same features, by the evaluations' functions; keeps the head."""
        assert self.labelled
        train, test = (Features(self.features(adapter, part), part.labels, part.classes) for part in self.labelled)
        found = knn(train, test, KNNConfig(k=self.config.knn_k, temperature=self.config.knn_temperature))
        record = {f"knn/{name}": value for name, value in found.items()}
        if self.config.head:
            (x, y), (x_test, y_test), classes = labelled_pair(train, test)
            weight, bias = logistic_regression(x, y, classes=classes, l2=UNCHOSEN)
            save_head(self.folder, weight, bias, train.classes)
            scores = functional.linear(x_test, weight, bias)
            record |= {f"head/{name}": value for name, value in accuracies(scores, y_test).items()}
        return record


def due(every: int, epoch: int, last: bool) -> bool:
    """Whether something done every so many epochs, and at the last, is done after this one."""
    return every > 0 and (last or epoch % every == 0)


def some_of(source: ImageSource, images: int) -> ImageSource:
    """At most `images` of a source, the same ones in every run."""
    return source if len(source) <= images else subset(source, some_positions(len(source), images))


def some_positions(count: int, most: int) -> Tensor:
    """At most so many of the positions below `count`, in order, the same ones in every run."""
    return permutation(0, 0, count)[:most].sort().values
