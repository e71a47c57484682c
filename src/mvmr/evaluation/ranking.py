"""Checkpoints ranked by label-free diagnostics, and how far that is the ranking by a probe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from mvmr.types import UserError

BETTER: dict[str, str | float] = {
    "rankme": "higher",
    "lidar": "higher",
    "alpha": 1.0,
    "effective_dim": "higher",
    "embedding_std": "higher",
    "uniformity": "lower",
    "alignment": "lower",
    "dependence": "higher",
}
"""What is better of each diagnostic: "higher", "lower", or nearer to a number. "dependence" is of all dependence/NAME.

alpha-ReQ holds spectra that fall as 1 / rank for the best (Agrawal et al., NeurIPS 2022); MV-MR maximises
dependence. alignment is best, and so is uniformity worst, for a collapsed encoder: neither ranks well alone.
"""


PROBES = ("knn", "linear", "linear_fast", "logistic", "finetune", "head", "robustness", "zero_shot")
"""Evaluations that give the accuracy to compare with, top1."""


@dataclass(frozen=True)
class Ranking:
    """Checkpoints in the order of one diagnostic."""

    order: tuple[str, ...]
    """Best first; of equal ones the one given first."""
    tau: float | None = None
    """Kendall's tau-b with the probe's ranking, in [-1, 1]; None without a probe, and where either is constant."""
    rho: float | None = None
    """Spearman's rho with it, likewise."""
    cost: float | None = None
    """What the choice of the first one costs: the probe's best accuracy less that of the first, in points."""


def rank_checkpoints(
    scores: Mapping[str, Mapping[str, float]],
    accuracies: Mapping[str, float] | None = None,
    *,
    better: Mapping[str, str | float] = BETTER,
) -> dict[str, Ranking]:
    """{diagnostic: Ranking} of the checkpoints in `scores`, {checkpoint: {diagnostic: value}}.

    accuracies: {checkpoint: a probe's accuracy}, to compare with; labels play no part in the orders. better: see
    BETTER. A diagnostic that is not in `better`, or that some checkpoint lacks, is left out; one that is not finite
    ranks last. Raises UserError for fewer than two checkpoints, missing accuracies, and no diagnostic in common.
    """
    if len(scores) < 2:
        raise UserError(f"a ranking needs two checkpoints or more, and there are {len(scores)}")
    missing = [name for name in scores if accuracies is not None and not math.isfinite(accuracies.get(name, math.nan))]
    if missing:
        raise UserError(f"accuracies: none for {', '.join(missing)}; give one for every checkpoint, or none at all")
    first, *others = scores.values()
    common = [name for name in first if _kind(name) in better and all(name in each for each in others)]
    if not common:
        raise UserError(f"the checkpoints have no diagnostic in common that can be ranked: {', '.join(better)}")
    return {name: _ranking(name, scores, accuracies, better[_kind(name)]) for name in common}


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _ranking(
    name: str, scores: Mapping[str, Mapping[str, float]], accuracies: Mapping[str, float] | None, better: str | float
) -> Ranking:
    merits = {checkpoint: _merit(each[name], better) for checkpoint, each in scores.items()}
    order = tuple(sorted(merits, key=lambda checkpoint: -merits[checkpoint]))  # Python's sort keeps equals in order
    if accuracies is None:
        return Ranking(order)
    by_probe = [accuracies[checkpoint] for checkpoint in merits]
    merit = list(merits.values())
    return Ranking(order, kendall(merit, by_probe), spearman(merit, by_probe), max(by_probe) - accuracies[order[0]])


def _merit(value: float, better: str | float) -> float:
    if not math.isfinite(value):
        return -math.inf
    if isinstance(better, str):
        return {"higher": value, "lower": -value}[better]
    return -abs(value - better)


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b: (agreeing - disagreeing pairs) / sqrt(pairs untied in x * pairs untied in y).

    Values that can be ordered, infinite ones too. None where all of one side are equal. Raises ValueError for unequal
    lengths.
    """
    agree = untied_x = untied_y = 0
    for (a, b), (c, d) in combinations(zip(x, y, strict=True), 2):
        of_x, of_y = (a > c) - (a < c), (b > d) - (b < d)
        agree, untied_x, untied_y = agree + of_x * of_y, untied_x + abs(of_x), untied_y + abs(of_y)
    return agree / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho: the correlation of ranks, equal values sharing the mean of theirs; otherwise as `kendall`."""
    a, b = _centred_ranks(x), _centred_ranks(y)
    product = sum(p * q for p, q in zip(a, b, strict=True))
    scale = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    return product / scale if scale else None


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Half the number of values below, less half that above: the mean rank of equals, about zero."""
    return [sum((value > other) - (value < other) for other in values) / 2 for value in values]


def checkpoints_of(run: str | Path) -> list[Path]:
    """The encoders that a run kept in training, in the order of their epochs. Raises UserError for fewer than two."""
    found = sorted((Path(run) / "checkpoints").glob("epoch-*.safetensors"))
    if len(found) < 2:
        raise UserError(
            f"{run}: keeps {len(found)} encoders of earlier epochs, and a ranking needs two; train with "
            "engine.keep_every_epochs, rank what was watched with --online, or name several encoders"
        )
    return found


def _records(file: Path) -> Iterator[dict[str, float]]:
    """The lines of metrics.jsonl, without the last where a kill cut it. Raises UserError for another that is none."""
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{file}: line {number} is not JSON ({error}); restore it, or take it out") from None


def epochs_of(
    run: str | Path, *, probe: str | None = "knn/top1"
) -> tuple[dict[str, dict[str, float]], dict[str, float] | None]:
    """(scores, accuracies) of a run's epochs, as `rank_checkpoints` takes them, from what was watched in training.

    Epochs are named as their checkpoints, "epoch-0010". probe: the measure to compare with, knn/top1 or head/top1; only
    epochs that have it count. None takes every epoch with diagnostics, and no accuracies. Raises UserError where
    metrics.jsonl is missing or holds no such epoch.
    """
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: there is none; give the folder of a run that mvmr trained")
    watched: dict[str, dict[str, float]] = {}
    for record in _records(file):
        if any(_kind(name) in BETTER for name in record) or probe in record:
            watched.setdefault(f"epoch-{int(record['epoch']) + 1:04d}", {}).update(record)
    kept = {
        epoch: {name: value for name, value in record.items() if _kind(name) in BETTER}
        for epoch, record in watched.items()
        if probe is None or probe in record
    }
    kept = {epoch: record for epoch, record in kept.items() if record}
    if not kept:
        wanted = "diagnostics" if probe is None else f"diagnostics and {probe}"
        raise UserError(f"{file}: no epoch has {wanted}; train with online.every_epochs and online.knn_every_epochs")
    return kept, None if probe is None else {epoch: watched[epoch][probe] for epoch in kept}
