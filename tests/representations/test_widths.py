"""The widths that a run finds out are those of its batches, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvmr.engine.train import assemble, build
from mvmr.representations.widths import widths_in_batches
from tiny import tiny

KINDS: dict[str, Any] = {
    "vit": {"kind": "teacher", "model": "timm:test_vit@random"},
    "pixels": {},
    "augmented_pixels": {},
    "hog": {"bins": 8, "cell": 4},
    "scattering": {},
}


@pytest.mark.parametrize("width", [None, 100])
@pytest.mark.parametrize("enabled", [True, False])
def test_widths_are_those_of_a_batch(enabled: bool, width: int | None, tmp_path: Path) -> None:
    cache = {"enabled": enabled, "width": width}
    run = tiny(representations=KINDS, cache=cache, data__cache=str(tmp_path / "cache"), data__limit=32)
    parts = build(run)
    found = widths_in_batches(parts.maker.representations, run.cache, size=run.views.size)
    _, _, data = assemble(run, parts, tmp_path, quiet=True)
    data.weights = None  # no engine runs here
    assert data.prepare is not None
    data.prepare()
    rows = parts.maker(next(iter(data.loader()))).representations
    assert found == {name: value.shape[1] for name, value in rows.items()}
    assert (found["hog"] == 100) == (enabled and width == 100), "narrowed by the cache alone"
    assert (found["pixels"], found["vit"]) == (3 * 16 * 16, found["vit"])


def test_a_function_is_measured_too(tmp_path: Path) -> None:
    run = tiny(representations={"mine": {"kind": "teacher", "model": "python"}})
    parts = build(run, teachers={"mine": lambda images: images.mean((2, 3))})
    assert widths_in_batches(parts.maker.representations, run.cache, size=16) == {"mine": 3}
