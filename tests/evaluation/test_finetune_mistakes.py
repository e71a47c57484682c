"""Settings, labels and nets that fine-tuning takes, and what it says of those that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.short_finetuning import CPU, SHORT, array, digits, tiny, tuned
from mvmr.evaluation import EVALUATIONS, Workplace
from mvmr.evaluation.finetune import FinetuneConfig, finetune, positions
from mvmr.types import RunError, UserError


def test_small_subsets(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="batch_size is 128, and there are 10 images"):
        _, metrics = tuned(tmp_path, fraction=None, labels_per_class=1, batch_size=128, epochs=1)
    assert metrics["n_train"] == 10
    with pytest.raises(UserError, match=r"batch norm cannot be trained on one; .*freeze_batch_norm=true"):
        tuned(tmp_path, batch_size=1)
    _, metrics = tuned(tmp_path, fraction=0.005, batch_size=1, epochs=1, freeze_batch_norm=True)
    assert metrics["n_train"] == 10  # 6.5, but one of each class
    _, metrics = tuned(tmp_path, fraction=0.005, batch_size=1, epochs=1, freeze_encoder=True)


def test_all_labels_by_default() -> None:
    train = digits("train")
    assert positions(train, FinetuneConfig()).tolist() == list(range(1297))
    assert len(positions(train, FinetuneConfig(labels_per_class=3))) == 30
    assert positions(train, FinetuneConfig(labels_per_class=3, seed=1)).tolist() != positions(
        train, FinetuneConfig(labels_per_class=3)).tolist()  # fmt: skip


def test_the_papers_settings_are_the_defaults() -> None:
    config = FinetuneConfig()
    assert (config.epochs, config.batch_size, config.optimizer, config.encoder_lr) == (100, 128, "adam", 1e-4)
    assert (config.head_lr, config.fraction) == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.1, "labels_per_class": 3}, "fraction and labels_per_class are set"),
        ({"fraction": 0.0}, "greater than 0"),
        ({"fraction": 1.1}, "less than or equal to 1"),
        ({"views": "simclrr"}, "did you mean simclr"),
        ({"freeze_encoder": True, "layer_decay": 0.5}, "layer_decay has no effect"),
        ({"nesterov": True}, "no effect with optimizer=adam"),
        ({"momentum": 0.5, "optimizer": "adamw"}, "no effect with optimizer=adamw"),
        ({"nesterov": True, "momentum": 0.0, "optimizer": "sgd"}, "nesterov needs a momentum"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**settings)


def test_labels_that_cannot_be_trained_on() -> None:
    good = array(torch.tensor([0, 1, 0, 1]), ("a", "b"))
    for train, message in [
        (array(None), "the train split has no labels"),
        (array(torch.tensor([0, 1, 0, -1])), "train split has images without label"),
        (array(torch.zeros(4, 2, dtype=torch.int8), ("a", "b")), "finetune is for one label an image; own/train has"),
        (array(torch.tensor([0, 1, 0, 1]), ("a", "c")), "different classes"),
    ]:
        with pytest.raises(UserError, match=message):
            finetune(tiny(), train, good, FinetuneConfig(), CPU)
    with pytest.raises(UserError, match="the test split has no labels"):
        finetune(tiny(), good, array(None), FinetuneConfig(), CPU)


def test_a_net_that_cannot_be_trained() -> None:
    frozen = tiny()
    frozen.requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter of the encoder .*freeze_encoder=true"):
        finetune(frozen, digits("train"), digits("test"), FinetuneConfig(**SHORT), CPU)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf) in epoch 1; lower finetune.encoder_lr"):
        tuned(tmp_path, encoder_lr=1e30, optimizer="sgd", head_init="uniform")
    assert list(tmp_path.iterdir()) == []


def test_a_net_that_the_last_step_ruins_has_no_accuracy(tmp_path: Path) -> None:
    few = digits("train").take(torch.arange(40))
    config = FinetuneConfig(epochs=1, batch_size=40, encoder_lr=1e30, optimizer="sgd", head_init="uniform")
    with pytest.raises(RunError, match="not finite: the encoder or its classifier has diverged"):
        finetune(tiny(), few, digits("test"), config, Workplace(CPU.device, out=tmp_path))  # its only loss is finite
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_table_has_it() -> None:
    assert EVALUATIONS["finetune"].on == "images"
    assert EVALUATIONS["finetune"].function is finetune
    assert EVALUATIONS["finetune"].config is FinetuneConfig
