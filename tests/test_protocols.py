"""Evaluation recipes: what is shipped is valid, mistakes are named, and the command line's settings come on top."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from mvmr.api import data_config, evaluate
from mvmr.config import recipe_names
from mvmr.data.sources import DataConfig
from mvmr.errors import UserError
from mvmr.evaluation import EVALUATIONS
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import EncoderCard, random_encoder
from mvmr.protocols import FOLDER, load_protocol, protocol_names

CARD = EncoderCard(
    encoder=EncoderConfig(name="resnet18", stem="mvmr", width=0.125), dim=64, image_size=16, mean=(0.3, 0.3, 0.3),
    std=(0.4, 0.4, 0.4), method="none", data="digits", version="0",
)  # fmt: skip


def test_the_shipped_recipes_are_valid() -> None:
    assert {"semi_imagenet_1", "semi_imagenet_10", "voc07"} <= set(protocol_names())
    assert set(protocol_names()) & set(recipe_names()) == set()
    for name in protocol_names():
        protocol = load_protocol(name)
        assert set(protocol.evaluations) <= set(EVALUATIONS)
        assert set(protocol.settings) <= set(protocol.evaluations)
        DataConfig.model_validate(protocol.data)
        for evaluation, settings in protocol.settings.items():
            EVALUATIONS[evaluation].config.model_validate(settings)
        text = (resources.files("mvmr.recipes") / FOLDER / f"{name}.yaml").read_text()
        assert text.startswith("# "), "a recipe starts with what it is"
        assert f"--recipe {name}" in text


def test_a_recipe_says_what_is_evaluated_and_settings_come_on_top(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("evaluations: [knn]\ndata: {name: digits}\nsettings: {knn: {k: 3, temperature: 0.5}}\n")
    encoder = random_encoder(CARD, seed=0)
    (result,) = evaluate(encoder, recipe=file)
    assert (result.evaluation, result.data) == ("knn", "digits")
    assert result.settings == {"k": 3, "temperature": 0.5}
    (result,) = evaluate(encoder, recipe=file, settings={"knn.k": 5})
    assert result.settings == {"k": 5, "temperature": 0.5}
    (result,) = evaluate(encoder, recipe=file, on=["linear_fast"])
    assert result.evaluation == "linear_fast"


def test_data_named_on_the_command_line_replace_those_of_the_recipe() -> None:
    encoder = random_encoder(CARD, seed=0)
    proposed = {"name": "voc07", "workers": 4}
    assert data_config(encoder, None, "here", proposed) == DataConfig(name="voc07", workers=4, root=Path("here"))
    assert data_config(encoder, "voc07", None, proposed).workers == 4
    assert data_config(encoder, "digits", None, proposed) == DataConfig(name="digits")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("evaluations: [knn]\nfrom: here\n", "from"),
        ("evaluations: 3\n", "evaluations"),
        ("a: b: c", "not valid YAML"),
        ("[1]", "file"),
    ],
)
def test_mistakes_in_a_recipe_are_named(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        load_protocol(file)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean voc07\?"):
        load_protocol("voc7")
