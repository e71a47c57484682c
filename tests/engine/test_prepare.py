"""Buffers as long as the data set: made before anything else, so that a checkpoint finds them in their final size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvmr.engine.train import assemble, build
from mvmr.methods import MVMR
from tiny import tiny


def note_images(self: MVMR, images: int) -> None:
    self.register_buffer("labels", torch.randint(1000, (images,)))


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MVMR, "prepare", note_images)


def test_a_method_is_told_how_many_images_there_are(labelled: None) -> None:
    labels = build(tiny()).method.labels
    assert labels.shape == (96,)
    assert torch.equal(labels, build(tiny()).method.labels), "under the run's seed"
    assert not torch.equal(labels, build(tiny(seed=1)).method.labels)
    assert build(tiny(data__limit=64)).method.labels.shape == (64,)


def test_the_caller_s_random_numbers_go_on_as_before(labelled: None) -> None:
    torch.manual_seed(7)
    build(tiny())
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_a_checkpoint_holds_these_buffers_and_is_read_back(labelled: None, tmp_path: Path) -> None:
    run = tiny(schedule__epochs=1)
    parts = build(run)
    parts.method.labels.copy_(torch.arange(96))
    trainer, adapter, data = assemble(run, parts, tmp_path, quiet=True)
    trainer.fit(adapter, datamodule=data)
    again = build(run)
    assert not torch.equal(again.method.labels, torch.arange(96))
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    again.method.load_state_dict({key.removeprefix("method."): value for key, value in saved.items()})
    assert torch.equal(again.method.labels, torch.arange(96))
