"""Settings: defaults < recipe < overrides, presets, and what is written back."""

from __future__ import annotations

import pytest

from mvmr.api import flat
from mvmr.config import load, parse, recipe_names
from mvmr.errors import UserError
from tiny import tiny


def test_overrides_of_every_form_agree() -> None:
    words = load("mvmr_digits", ["schedule.epochs=5", "views.crops.augmented.crop.scale=[0.2,0.9]", "method.power=1"])
    mapping = load("mvmr_digits", flat({"schedule": {"epochs": 5}, "views.crops.augmented.crop.scale": [0.2, 0.9],
                                        "method": {"power": 1}}))  # fmt: skip
    assert words == mapping
    assert words.schedule.epochs == 5
    assert words.views.crops["augmented"].crop is not None
    assert words.views.crops["augmented"].crop.scale == (0.2, 0.9)
    assert words.resolved()["method"]["power"] == 1


def test_numbers_with_exponents_are_numbers() -> None:
    assert load("mvmr_digits", ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


def test_auto_rate_follows_the_batch() -> None:
    assert load("mvmr_digits", ["optimizer.lr=auto", "data.batch_size=512"]).peak_lr == pytest.approx(2e-4)
    assert load("mvmr_digits", ["optimizer.lr=auto", "data.batch_size=256"]).peak_lr == pytest.approx(1e-4)


def test_official_preset_sets_loss_and_representations() -> None:
    run = load("mvmr_digits", ["method.preset=official"])
    method = run.resolved()["method"]
    expected = {"l3_sign": "official", "power": 1, "distance_floor": 1e-4, "divisor": 32.0, "variance_epsilon": 0.0,
                "gather": False, "mse_reduction": "mean", "estimator": "v"}  # fmt: skip
    assert {key: method[key] for key in expected} == expected
    assert run.representations["hog"]["variant"] == "official"
    assert run.representations["augmented_pixels"]["batch_shared"] is True
    paper = load("mvmr_digits")
    assert paper.resolved()["method"]["l3_sign"] == "paper"
    assert paper.representations["hog"]["variant"] == "correct"
    assert paper.representations["augmented_pixels"]["batch_shared"] is False


def test_what_is_given_comes_on_top_of_the_preset() -> None:
    run = load("mvmr_digits", ["method.preset=official", "method.power=2", "representations.hog.variant=correct"])
    assert run.resolved()["method"]["power"] == 2
    assert run.resolved()["method"]["l3_sign"] == "official"
    assert run.representations["hog"]["variant"] == "correct"


def test_resolved_settings_are_complete_and_frozen() -> None:
    run = tiny()
    assert run.representations["hog"]["bins"] == 8
    assert "variant" in run.representations["hog"]
    assert parse(run.resolved()) == run
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


def test_views_are_needed() -> None:
    with pytest.raises(UserError, match="views"):
        parse({"method": "mvmr"})


def test_method_may_be_a_name_alone() -> None:
    assert parse({"method": "mvmr", "views": {"recipe": "mvmr", "size": 32}}).method.name == "mvmr"


def test_shipped_recipes_are_named_as_their_files() -> None:
    assert all(load(name).name == name for name in recipe_names())
    assert {"mvmr_digits", "mvmr_cifar10_cpu", "mvmr_folder"} <= set(recipe_names())


def test_a_method_says_which_views_it_takes() -> None:
    run = tiny()
    assert run.views.counts() == {"global": 1}
    assert run.method.remarks({"global": 1}, ["hog"]) == []
    assert run.method.remarks({"global": 3, "local": 4}, ["hog"]) == [
        "mvmr does not look at the stream `local` of views, which is made all the same",
        "mvmr does not look at 2 of the views of the stream `global`, which is made all the same",
    ]
    with pytest.raises(UserError, match=r"mvmr takes 1 views of the stream `global`, and `views` makes 0"):
        tiny(views={"recipe": "mvmr", "size": 16, "crops": {"augmented": {"stream": "other"}}})


def test_a_method_says_which_batches_it_takes() -> None:
    with pytest.raises(UserError, match=r"batch_norm_groups=8 does not cut a batch of 20.*divides data\.batch_size"):
        tiny("moco", method={"name": "moco", "batch_norm_groups": 8}, data__batch_size=20)
    assert tiny("moco", method={"name": "moco", "batch_norm_groups": 1}, data__batch_size=20).data.batch_size == 20


def test_clipping_each_tensor_needs_a_norm() -> None:
    with pytest.raises(UserError, match=r"engine: clip_each is true.*set engine\.clip_norm"):
        tiny(engine__clip_each=True)


def test_every_side_and_stream_of_views() -> None:
    views = load("mvmr_cifar10_cpu", ["views.recipe=dino", "views.crops={local: {size: 16}}"]).views
    assert views.counts() == {"global": 2, "local": 8}
    assert views.sides() == [16, 32]
    none = load("mvmr_cifar10_cpu", ["views.recipe=dino", "views.crops={local: {count: 0}}"]).views
    assert (none.counts(), none.sides()) == ({"global": 2}, [32])
