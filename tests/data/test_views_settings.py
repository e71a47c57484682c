"""Settings of views: recipes, what is laid over them, and the mistakes that are caught."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mvmr.data.views import VIEW_RECIPES, Blur, Crop, Jitter, PadCrop, Solarise, View, Views, view_settings

MOCO_JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
STRONG = Jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, probability=0.8)
BYOL_JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8)
BICUBIC = Crop(scale=(0.08, 1.0), interpolation="bicubic")
DINO_GLOBAL = Crop(scale=(0.4, 1.0), interpolation="bicubic")
COMMON = ("crop", "rotate90", "flip", "jitter", "gray", "blur", "solarise")
EXPECTED: dict[str, dict[str, View]] = {
    "mvmr": {"augmented": View(crop=Crop(), flip=0.5, jitter=STRONG, gray=0.2, blur=Blur(probability=1.0))},
    "mvmr_cifar": {"augmented": View(crop=None, pad_crop=PadCrop(padding=4), flip=0.5)},
    "mvmr_cifar20": {
        "augmented": View(
            order=("jitter", "gray", "crop", "rotate90", "flip", "blur", "solarise"),
            jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            gray=0.1,
            crop=Crop(scale=(0.2, 1.0), interpolation="bicubic"),
        )
    },
    "simclr": {"augmented": View(count=2, crop=BICUBIC, jitter=STRONG, gray=0.2, blur=Blur(probability=0.5))},
    "moco_v1": {
        "augmented": View(
            count=2,
            order=("crop", "rotate90", "flip", "gray", "jitter", "blur", "solarise"),
            crop=Crop(scale=(0.2, 1.0)),
            gray=0.2,
            jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, probability=1.0),
        )
    },
    "moco_v2": {
        "augmented": View(
            count=2,
            crop=Crop(scale=(0.2, 1.0)),
            jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            gray=0.2,
            blur=Blur(probability=0.5),
        )
    },
    "byol": {
        "first": View(crop=BICUBIC, jitter=BYOL_JITTER, gray=0.2, blur=Blur(probability=1.0)),
        "second": View(
            crop=BICUBIC, jitter=BYOL_JITTER, gray=0.2, blur=Blur(probability=0.1),
            solarise=Solarise(threshold=0.5, probability=0.2),
        ),
    },
    "multicrop": {
        "global": View(count=2, crop=Crop(scale=(0.14, 1.0)), jitter=STRONG, gray=0.2, blur=Blur(probability=0.5)),
        "local": View(
            stream="local", count=6, size=96,
            crop=Crop(scale=(0.05, 0.14)), jitter=STRONG, gray=0.2, blur=Blur(probability=0.5),
        ),
    },
    "dino": {
        "first": View(crop=DINO_GLOBAL, jitter=BYOL_JITTER, gray=0.2, blur=Blur(probability=1.0)),
        "second": View(
            crop=DINO_GLOBAL, jitter=BYOL_JITTER, gray=0.2, blur=Blur(probability=0.1),
            solarise=Solarise(threshold=0.5, probability=0.2),
        ),
        "local": View(
            stream="local", count=8, size=96, crop=Crop(scale=(0.05, 0.4), interpolation="bicubic"),
            jitter=BYOL_JITTER, gray=0.2, blur=Blur(probability=0.5),
        ),
    },
    "cifar_strong": {"augmented": View(count=2, crop=BICUBIC, jitter=STRONG, gray=0.2, blur=Blur(probability=0.5))},
    "cifar_weak": {"augmented": View(count=2, crop=BICUBIC, jitter=MOCO_JITTER, gray=0.2, blur=Blur(probability=0.5))},
    "cifar_pair": {
        "first": View(crop=BICUBIC, jitter=BYOL_JITTER, gray=0.2),
        "second": View(crop=BICUBIC, jitter=BYOL_JITTER, gray=0.2, solarise=Solarise(threshold=0.5, probability=0.2)),
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_recipes_have_their_papers_values(recipe: str):
    settings = view_settings(recipe, size=224)
    assert settings.crops == EXPECTED[recipe]
    assert list(settings.crops) == list(EXPECTED[recipe])
    assert all(set(view.order) == set(COMMON) for view in settings.crops.values())


def test_every_recipe_is_expected():
    assert set(VIEW_RECIPES) == set(EXPECTED)


def test_defaults_of_the_operations():
    assert Crop().scale == (0.08, 1.0)
    assert Crop().ratio == (3 / 4, 4 / 3)
    assert Crop().interpolation == "bilinear"
    assert Crop().antialias is True
    assert PadCrop().padding == 4
    assert Jitter().probability == 0.8
    assert (Blur().kernel, Blur().sigma, Blur().probability) == (None, (0.1, 2.0), 1.0)
    assert Solarise().threshold == 0.5
    assert View().order == COMMON
    assert View().rotate90 is False


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (96, 9), (224, 23)])
def test_blur_kernels_grow_with_the_view(size, kernel):
    assert view_settings("mvmr", size=size).kernel("augmented") == kernel


@pytest.mark.parametrize(("size", "local"), [(224, 96), (32, 14), (96, 41)])
def test_local_views_keep_their_proportion(size, local):
    settings = view_settings("multicrop", size=size)
    assert settings.side("local") == local
    assert settings.side("global") == size
    given = Views(recipe="multicrop", size=size, crops={"local": {"size": 20}})
    assert given.side("local") == 20


def test_given_values_are_laid_over_the_recipe_key_by_key():
    given = {"recipe": "mvmr", "size": 32, "crops": {"augmented": {"crop": {"scale": [0.2, 1]}, "gray": 0}}}
    view = Views.model_validate(given).crops["augmented"]
    expected = EXPECTED["mvmr"]["augmented"]
    assert view == expected.model_copy(update={"crop": Crop(scale=(0.2, 1.0)), "gray": 0.0})
    assert VIEW_RECIPES["mvmr"]["augmented"]["crop"] == {}  # the recipe itself is left alone


def test_null_switches_an_operation_off():
    crops: dict[str, Any] = {"augmented": {"blur": None, "jitter": None, "crop": None}}
    view = Views.model_validate({"recipe": "mvmr", "size": 32, "crops": crops}).crops["augmented"]
    assert view.blur is None
    assert view.jitter is None
    assert view.crop is None


def test_an_operation_that_is_off_can_be_switched_on_in_part():
    crops: dict[str, Any] = {"augmented": {"solarise": {"threshold": 0.25}, "rotate90": True}}
    view = Views.model_validate({"recipe": "moco_v1", "size": 32, "crops": crops}).crops["augmented"]
    assert view.solarise == Solarise(threshold=0.25, probability=0.2)
    assert view.rotate90


def test_settings_are_taken_as_objects_too():
    views = Views(recipe="simclr", size=32, crops={"augmented": View(flip=0.0, crop=Crop(scale=(0.5, 1.0)))})
    assert views.crops["augmented"] == View(flip=0.0, crop=Crop(scale=(0.5, 1.0)))


def test_new_views_come_after_the_recipes_in_any_order_of_writing():
    crops: list[dict[str, Any]] = [{"zoom": {"flip": 0}, "also": {}}, {"also": {}, "zoom": {"flip": 0}}]
    made = [Views(recipe="byol", size=32, crops=c) for c in crops]
    assert made[0] == made[1]
    assert list(made[0].crops) == list(made[1].crops) == ["first", "second", "also", "zoom"]


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize("change", [{}, {"gray": 0.7, "blur": None}, {"count": 3, "extra": True}])
def test_resolved_settings_give_themselves_back(recipe: str, change: dict[str, Any]):
    change = dict(change)
    crops: dict[str, Any] = {"another": {"stream": "more", "size": 16}} if change.pop("extra", False) else {}
    crops[next(iter(VIEW_RECIPES[recipe]))] = change
    settings = Views(recipe=recipe, size=64, crops=crops)
    for mode in ("json", "python"):
        again = Views.model_validate(settings.model_dump(mode=mode))
        assert again == settings
    through_yaml = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))  # sorts keys
    assert Views.model_validate(through_yaml) == settings
    assert list(Views.model_validate(through_yaml).crops) == list(settings.crops)


@pytest.mark.parametrize(
    ("given", "where", "message"),
    [
        ({"recipe": "nothing", "size": 32}, (), "'nothing' is not known; choose one of mvmr, mvmr_cifar"),
        ({"size": 32}, ("recipe",), "Field required"),
        ({"recipe": "mvmr"}, ("size",), "Field required"),
        ({"recipe": "mvmr", "size": "big"}, ("size",), "valid integer"),
        ({"recipe": "multicrop", "size": 0}, ("size",), "greater than or equal to 1"),
        ({"recipe": "mvmr", "size": 32, "crops": 3}, ("crops",), "valid dictionary"),
        ({"recipe": "mvmr", "size": 32, "crops": {"augmented": None}}, ("crops", "augmented"), "valid dictionary"),
        ({"augmented": {"fliip": 1}}, ("crops", "augmented", "fliip"), "Extra inputs"),
        ({"augmented": {"crop": {"scal": 1}}}, ("crops", "augmented", "crop", "scal"), "Extra inputs"),
        ({"augmented": {"crop": {"scale": [0.5, 0.2]}}}, ("crops", "augmented", "crop"), "0 < least <= greatest <= 1"),
        ({"augmented": {"crop": {"scale": [0, 1]}}}, ("crops", "augmented", "crop"), "scale must be"),
        ({"augmented": {"crop": {"ratio": [2, 1]}}}, ("crops", "augmented", "crop"), "ratio must be"),
        ({"augmented": {"blur": {"kernel": 4}}}, ("crops", "augmented", "blur"), "odd, not 4; try 5"),
        ({"augmented": {"blur": {"sigma": [0, 1]}}}, ("crops", "augmented", "blur"), "sigma must be"),
        ({"augmented": {"blur": {"kernel": 65}}}, (), "65 is too wide, at most 63"),
        ({"augmented": {"flip": 1.5}}, ("crops", "augmented", "flip"), "less than or equal to 1"),
        ({"augmented": {"jitter": {"hue": 0.6}}}, ("crops", "augmented", "jitter", "hue"), "less than or equal to 0.5"),
        ({"augmented": {"pad_crop": {}}}, ("crops", "augmented"), "set one of them to null"),
        ({"augmented": {"stream": "plain"}}, ("crops", "augmented"), "without augmentation"),
        ({"augmented": {"order": ["flip"]}}, ("crops", "augmented"), "order must name crop"),
        ({"augmented": {"order": ["crop", "crop"]}}, ("crops", "augmented"), "at most once"),
        ({"augmented": {"order": ["crop", "flip"]}}, ("crops", "augmented"), "jitter, gray, blur: switched on"),
        ({"augmented": {"order": ["crop", "shear"]}}, ("crops", "augmented", "order", 1), "Input should be"),
        ({"second": {"size": 16}}, (), "crops.second.size: stream global has views of another size"),
    ],
)
def test_mistakes_are_named_with_their_key(given, where, message):
    given = given if "size" in given or "recipe" in given else {"recipe": "mvmr", "size": 32, "crops": given}
    with pytest.raises(ValidationError, match="validation error") as caught:
        Views.model_validate(given)
    problems = caught.value.errors()
    assert any(problem["loc"] == where and message in problem["msg"] for problem in problems), problems


def test_unknown_recipes_are_refused_by_name():
    with pytest.raises(ValueError, match="recipe: 'simclr2' is not known"):
        view_settings("simclr2", size=32)
