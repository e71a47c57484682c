"""What can be compared, and what is refused because a difference would say nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvmr.errors import UserError
from mvmr.evaluation.comparison import compare
from mvmr.evaluation.intervals import statistic_interval
from mvmr.types import Result


def result(encoder: str, value: float = 1.0, **changes: Any) -> Result:
    fields: dict[str, Any] = {"evaluation": "knn", "data": "digits", "settings": {"k": 3}, **changes}
    return Result(
        fields["evaluation"], fields["data"], "test", {"top1": value}, fields["settings"], encoder, 0.0,
        outcomes={"top1": torch.full((4,), value)},
    )  # fmt: skip


def test_an_unknown_reference_is_named() -> None:
    with pytest.raises(UserError, match=r"no encoder is called runs/c \(did you mean runs/[ab]\?\); there are runs/a"):
        compare([result("runs/a"), result("runs/b")], against="runs/c")


def test_other_settings_are_no_comparison() -> None:
    with pytest.raises(UserError, match=r"knn was made with different settings of k for b and a; evaluate both with"):
        compare([result("a"), result("b", settings={"k": 200})])
    with pytest.raises(UserError, match="different settings of temperature"):
        compare([result("a"), result("b", settings={"k": 3, "temperature": 0.1})])
    # Of other data, or of another evaluation, nothing is compared; where a head lies differs with the encoder.
    assert compare([result("a"), result("b", settings={"k": 200}, data="cifar10")]) == []
    (found,) = compare(
        [result("a", settings={"k": 3, "folder": "runs/a"}), result("b", 3.0, settings={"k": 3, "folder": "runs/b"})]
    )
    assert (found.difference, found.low, found.high) == (2.0, 2.0, 2.0)


def test_results_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"two results of knn on digits are of an encoder called encoder, .* one call"):
        compare([result("encoder"), result("encoder")])


def test_what_is_no_mean_over_images_is_compared_too() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(200, generator=generator) + shift for shift in (0.0, 0.5)]

    def of(number: int) -> Result:
        def median(chosen: Tensor) -> float:
            return float(values[number][chosen].median())

        measured = {"median": median(torch.arange(200)), "alone": 1.0}
        statistics = {"median": median} | ({"alone": median} if number else {})
        return Result("e", "d", "test", measured, {}, f"{number}", 0.0, statistics=statistics, images=200)

    (found,) = compare([of(0), of(1)])
    expected = statistic_interval(
        lambda chosen: float(values[1][chosen].median()) - float(values[0][chosen].median()), 200, kind="centred",
        resamples=1000,
    )  # fmt: skip
    assert (found.metric, found.encoder, found.against) == ("median", "1", "0")
    assert (found.difference, found.low, found.high) == (expected.value, expected.low, expected.high)
    assert found.is_certain == (expected.low > 0)
    assert compare([]) == []
    assert compare([of(0)]) == []
