from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.head import HEAD_FILE, HeadConfig, head, load_head, save_head
from mvmr.types import Features, RunError, UserError

NAMES = ("a", "b", "c", "d", "e", "f")


def blobs() -> tuple[torch.Tensor, torch.Tensor, Features]:
    """A head whose scores are the features themselves, and features of six classes of which one in six is wrong."""
    y = torch.arange(36) % 6
    shown = torch.where(torch.arange(36) < 6, (y + 1) % 6, y)
    return torch.eye(6), torch.zeros(6), Features(torch.eye(6)[shown], y, NAMES)


def test_a_saved_head_is_measured_as_it_is(tmp_path: Path) -> None:
    weight, bias, test = blobs()
    save_head(tmp_path, weight, bias, NAMES)
    metrics = head(Features(torch.zeros(1, 3)), test, HeadConfig(folder=tmp_path))  # train is not looked at
    assert metrics["top1"] == pytest.approx(100 * 30 / 36)
    assert metrics["top5"] == pytest.approx(100 * 34 / 36)  # of equal scores the lower class comes first
    bias = torch.tensor([9.0, 0, 0, 0, 0, 0])
    save_head(tmp_path, weight, bias, NAMES)  # in place of the other
    assert head(test, test, HeadConfig(folder=tmp_path))["top1"] == pytest.approx(100 * 6 / 36)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    weight, bias = torch.randn(3, 7, dtype=torch.float64), torch.randn(3)
    file = save_head(tmp_path / "new" / "folder", weight.requires_grad_(), bias, ("x", "ü", "z"))
    assert file == tmp_path / "new" / "folder" / HEAD_FILE
    assert [path.name for path in file.parent.iterdir()] == [HEAD_FILE]
    loaded = load_head(file.parent)
    assert torch.equal(loaded.weight, weight.float())
    assert torch.equal(loaded.bias, bias)
    assert loaded.classes == ("x", "ü", "z")
    x = torch.randn(4, 7)
    assert torch.equal(loaded(x), torch.nn.functional.linear(x, weight.detach().float(), bias))
    save_head(tmp_path, weight, bias)
    assert load_head(tmp_path).classes == ()


def test_a_head_of_shapes_that_do_not_fit_is_not_saved(tmp_path: Path) -> None:
    for weight, bias, names in [
        (torch.zeros(3, 2), torch.zeros(2), ()),
        (torch.zeros(3), torch.zeros(3), ()),
        (torch.zeros(3, 2), torch.zeros(3), ("a",)),
    ]:
        with pytest.raises(ValueError, match=r"weight \[C, D\], bias \[C\]"):
            save_head(tmp_path, weight, bias, names)
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_fit_the_data(tmp_path: Path) -> None:
    weight, bias, test = blobs()
    save_head(tmp_path, weight, bias, NAMES)
    config = HeadConfig(folder=tmp_path)
    with pytest.raises(UserError, match="features of 6 dimensions, the encoder's have 5"):
        head(test, Features(test.x[:, :5], test.y, NAMES), config)
    with pytest.raises(UserError, match="other classes than the data set's, for example f"):
        head(test, Features(test.x, test.y, (*NAMES[:5], "g")), config)
    with pytest.raises(UserError, match="or another order of them"):
        head(test, Features(test.x, test.y, NAMES[::-1]), config)
    with pytest.raises(UserError, match="knows 6 classes, and the test split has label 6"):
        head(test, Features(test.x, test.y + 1), config)
    with pytest.raises(UserError, match="test split has no labels"):
        head(test, Features(test.x), config)
    with pytest.raises(RunError, match="not finite"):
        head(test, Features(test.x / 0, test.y), config)


def test_heads_that_cannot_be_read(tmp_path: Path) -> None:
    _, _, test = blobs()
    with pytest.raises(UserError, match=r"head.folder is not set"):
        head(test, test, HeadConfig())
    with pytest.raises(UserError, match=r"holds no head.safetensors; .*--on finetune"):
        head(test, test, HeadConfig(folder=tmp_path))
    file = tmp_path / HEAD_FILE
    file.write_bytes(b"no head")
    with pytest.raises(UserError, match="is not a head that mvmr wrote"):
        load_head(tmp_path)
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="is not a head that mvmr wrote"):
        load_head(tmp_path)
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, file, {"mvmr": json.dumps({"classes": []})})
    with pytest.raises(UserError, match="do not fit together"):
        load_head(tmp_path)


def test_the_table_has_it() -> None:
    assert EVALUATIONS["head"].on == "features"
    assert EVALUATIONS["head"].function is head
    assert EVALUATIONS["head"].config is HeadConfig
