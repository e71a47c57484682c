"""OSS: dropout, the offline scheme, the queue, what is saved, and every option."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from mvmr.config import Run, load
from mvmr.engine.module import Adapter
from mvmr.engine.train import build, train
from mvmr.errors import UserError
from mvmr.methods.oss import OSS, SCHEMES, OSSConfig
from mvmr.methods.swav import SwAV
from mvmr.nets.encoders import build_encoder
from mvmr.nets.weights import load_encoder
from mvmr.types import Batch, Step
from small_oss import SMALL, TEACHER, B, V, batch, codes_by_hand, gradients, method, of, of_network, step
from tiny import METHODS, parts_and_data, tiny


def test_dropout_is_a_function_of_image_and_seed() -> None:
    oss, given = method(), batch()
    first, again = of(oss, given)[0], of(oss, given)[0]
    assert torch.equal(first["student/dropout"], again["student/dropout"])
    assert not torch.equal(first["student/dropout"], first["student"])
    torch.manual_seed(8)
    assert not torch.equal(oss.embed(given)["student/dropout"], first["student/dropout"])


def swav_checkpoint(folder: Path, *, released: bool) -> tuple[Path, SwAV]:
    """What a run of swav with that teacher's network leaves, or the same as SwAV's authors publish it."""
    torch.manual_seed(3)
    run = tiny("swav", encoder=TEACHER, method={"name": "swav", "hidden": 11, "dim": 6, "prototypes": 9, "queue": 8})
    swav = SwAV(*build_encoder(run.encoder), run.method)
    state = swav.state_dict()
    if released:
        names = {"encoder.": "module.", "projector.": "module.projection_head.", "prototypes.": "module.prototypes."}
        state = {new + name.removeprefix(old): value for name, value in state.items() for old, new in names.items()
                 if name.startswith(old)}  # fmt: skip
        state["module.prototypes.weight"] = 1.5 * state["module.prototypes.weight"]  # not normalised there
        file = folder / "swav.pth.tar"
    else:
        state = {f"method.{name}": value for name, value in state.items()}
        file = folder / "checkpoints" / "last.ckpt"
        file.parent.mkdir()
    torch.save({"state_dict": state, "epoch": 3}, file)
    return (file if released else folder), swav


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("prototypes", ["frozen", "trained"])
def test_offline_scheme_learns_from_a_frozen_teacher(released: bool, prototypes: str, tmp_path: Path) -> None:
    path, swav = swav_checkpoint(tmp_path, released=released)
    oss = method(scheme="off_kd_drop", teacher_weights=str(path), offline_prototypes=prototypes)
    assert oss.also_exported() == {}
    given = batch()
    embeddings, terms = of(oss, given)
    swav = swav.double().eval()
    z = [normalize(swav.projector(swav.encoder(view)), dim=1) for view in given.views["global"]]
    c = swav.prototypes.weight
    torch.testing.assert_close(oss.prototypes.weight, c, rtol=1e-6, atol=1e-7)
    for i in range(2):
        torch.testing.assert_close(normalize(embeddings["coder"][:, i], dim=1), z[i])
    w, dropped = (normalize(embeddings[name].detach(), dim=2) for name in ("student", "student/dropout"))
    expected = of_network(w, dropped, c.detach(), codes_by_hand(torch.stack(z, dim=1), c))
    count = 2 + 2 * V + 2 * (V + 2)
    assert terms["loss"].item() == pytest.approx(expected / count, rel=1e-5)  # prototypes were kept in float32
    before = {name: value.clone() for name, value in oss.coder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in oss.parameters() if p.requires_grad], 0.1)
    terms["loss"].backward()
    assert all(p.grad is None for p in oss.coder.parameters())
    optimizer.step()
    oss.after_step(step())
    assert all(torch.equal(value, before[name]) for name, value in oss.coder.state_dict().items())
    torch.testing.assert_close(oss.coder_prototypes.weight, c, rtol=1e-6, atol=1e-7)
    assert torch.equal(oss.prototypes.weight, oss.coder_prototypes.weight) == (prototypes == "frozen")


def test_offline_scheme_says_what_does_not_fit(tmp_path: Path) -> None:
    path, _ = swav_checkpoint(tmp_path, released=False)
    with pytest.raises(UserError, match=r"its projector does not fit; set method.teacher, method.teacher_hidden"):
        method(scheme="off_kd_drop", teacher_weights=str(path), teacher_hidden=10)
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no projector"):
        method(scheme="off_kd_drop", teacher_weights=str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="no such file"):
        method(scheme="off_kd_drop", teacher_weights=str(tmp_path / "none.ckpt"))
    with pytest.raises(
        UserError, match=r"method\.teacher_weights=.*holds the encoder alone.*give the folder of the run"
    ):
        method(scheme="off_kd_drop", teacher_weights=str(tmp_path / "teacher.safetensors"))
    for wrong in ({"scheme": "off_kd_drop"}, {"teacher_weights": str(path)}):
        with pytest.raises(ValidationError, match=r"goes with method\.scheme=off_kd_drop"):
            OSSConfig.model_validate(wrong)


def test_codes_may_come_from_a_moving_average() -> None:
    oss, given = method(code_momentum=0.9, alpha=0.0), batch()
    embeddings, terms = of(oss, given)
    assert not embeddings["coder"].requires_grad
    before = oss.coder.projector[0].weight.clone()
    with torch.no_grad():
        oss.teacher.projector[0].weight.add_(1.0)
    oss.after_step(step())
    torch.testing.assert_close(oss.coder.projector[0].weight, before + 0.1)
    live = of(method(alpha=0.0), given)[1]
    # The average meets the large crops alone, so batch norm gives it other embeddings, and other codes.
    assert terms["loss"].item() != live["loss"].item()


def test_queue_holds_the_teachers_embeddings() -> None:
    oss, given = method(queue=B, queue_epoch=1), batch()
    of(oss, given, step(4))
    oss.after_step(step(4))
    assert not oss.codes.queue.keys.any()
    embeddings, _ = of(oss, given, step(5))
    oss.after_step(step(5))
    expected = normalize(embeddings["teacher"].detach(), dim=2)[:, :2]
    torch.testing.assert_close(oss.codes.queue.keys.unflatten(1, (2, 6)), expected, rtol=1e-6, atol=1e-7)
    assert oss._pending == []


@pytest.mark.parametrize(
    "changed",
    [
        {"classifier_input": "raw"},
        {"classifier_batch_norm": True},
        {"dropout_after": "relu"},
        {"dropout": [0.5, 0.05]},
        {"alpha": -0.1},
        {"reduction": "paper_sum"},
    ],
)
def test_options_change_what_is_learned(changed: dict[str, Any]) -> None:
    key = "student.projector.0.weight"
    found, plain = gradients(method(**changed), batch())[key], gradients(method(), batch())[key]
    assert (found - plain).abs().max() > 1e-6


def test_dropout_pass_may_leave_statistics_alone() -> None:
    for tracks, passes in ((True, 2), (False, 1)):
        oss = method(dropout_tracks_statistics=tracks)
        oss.embed(batch())
        assert oss.student.projector[1].num_batches_tracked == passes


def test_alpha_may_grow_as_in_dann() -> None:
    assert {method().alpha(step(at)) for at in (0, 10, 19)} == {-1.0}
    ramp = method(alpha=-0.5, alpha_ramp=True)
    assert ramp.alpha(step(0)) == 0.0
    assert ramp.alpha(Step(5, 11, 5)) == pytest.approx(-0.5 * (2 / (1 + math.exp(-5)) - 1))
    assert ramp.alpha(step(19)) == pytest.approx(-0.5, rel=1e-3)


def test_prototypes_are_frozen_at_first_and_unit_rows() -> None:
    oss = method(freeze_prototypes_epochs=1)
    for at in (0, 4, 5):
        oss.zero_grad()
        of(oss, batch())[1]["loss"].backward()
        oss.after_backward(step(at))
        assert (oss.prototypes.weight.grad is None) == (at < 5)
    with torch.no_grad():
        oss.prototypes.weight *= 3
    oss.after_step(step())
    torch.testing.assert_close(oss.prototypes.weight.norm(dim=1), torch.ones(9, dtype=torch.float64))


def test_student_and_teacher_are_both_saved(tmp_path: Path) -> None:
    run = tiny("oss", schedule__epochs=1)
    out = train(run, tmp_path / "run", quiet=True)
    student, teacher = load_encoder(out), load_encoder(out / "teacher.safetensors")
    assert student.card.encoder == run.encoder
    assert teacher.card.encoder == run.method.teacher
    assert (student.card.dim, teacher.card.dim) == (64, 128)
    state = torch.load(out / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, encoder in {"student": student, "teacher": teacher}.items():
        for key, value in encoder.backbone.state_dict().items():
            assert torch.equal(value, state[f"method.{name}.encoder.{key}"]), key


class Stopped(Exception):
    """What a run dies of here."""


def test_offline_scheme_learns_from_a_run_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_swav = tiny("swav", schedule__epochs=1)
    folder = train(of_swav, tmp_path / "swav", quiet=True)
    settings = {
        **METHODS["oss"]["method"], "scheme": "off_kd_drop", "teacher_weights": str(folder),
        "teacher": of_swav.encoder.model_dump(), "teacher_hidden": of_swav.method.hidden,
    }  # fmt: skip
    run = tiny("oss", method=settings, engine__checkpoint_every_steps=2)
    whole = train(run, tmp_path / "whole", quiet=True)
    step = Adapter.training_step

    def stop(self: Adapter, *arguments: Any) -> Any:
        if self.global_step == 9:
            raise Stopped
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Adapter, "training_step", stop)
        with pytest.raises(Stopped):
            train(run, tmp_path / "stopped", quiet=True)
    stopped = train(run, tmp_path / "stopped", resume=True, quiet=True)
    expected, found, teacher = (
        torch.load(out / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for out in (whole, stopped, folder)
    )
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    losses = [
        [json.loads(line)["train/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (whole, stopped)
    ]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    assert (whole / "encoder.safetensors").read_bytes() == (stopped / "encoder.safetensors").read_bytes()
    assert not (whole / "teacher.safetensors").exists(), "it is the run's that it is from"
    for key in teacher:  # nothing of the teacher has moved, running statistics included
        part = key.removeprefix("method.")
        if part.startswith(("encoder.", "projector.")):
            assert torch.equal(expected[f"method.coder.{part}"], teacher[key]), key
    assert any(not torch.equal(expected[f"method.student.{part}"], value) for part, value in start(run).items())


def start(run: Run) -> dict[str, torch.Tensor]:
    """The student's weights before the first step."""
    return {name: value for name, value in build(run).method.student.state_dict().items() if "weight" in name}


STUDENTS = {"mobilenetv2_100": 1280, "regnety_006": 608, "efficientnet_b0": 1280}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_papers_students_are_two_overrides_of_the_recipe(name: str) -> None:
    of_timm = f"encoder.name=timm:{name}"
    with pytest.raises(
        UserError, match=r"ResNets only: set it back to encoder\.zero_init_residual=true, or take one of"
    ):
        load("oss_imagenet", [of_timm])
    run = load("oss_imagenet", [of_timm, "encoder.zero_init_residual=true"])
    net, dim = build_encoder(run.encoder)
    assert dim == STUDENTS[name]
    assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, dim)


TEACHERS: dict[tuple[str, ...], tuple[int, int]] = {
    ("method.teacher.name=resnet34",): (512, 2048),
    (): (2048, 2048),
    ("method.teacher.width=2", "method.teacher_hidden=8192"): (4096, 8192),
}


@pytest.mark.parametrize("overrides", TEACHERS)
def test_the_papers_teachers_are_overrides_of_the_recipe(overrides: tuple[str, ...]) -> None:
    """Figure 3; without storage, as shapes are all that is looked at."""
    dim, hidden = TEACHERS[overrides]
    run = load("oss_imagenet", overrides)
    with torch.device("meta"):
        oss = OSS(*build_encoder(run.encoder), run.method)
        views = {"global": torch.zeros(2, 2, 3, 64, 64), "local": torch.zeros(6, 2, 3, 32, 32)}
        features = oss.teacher([views["global"], views["local"]])
    assert features.shape == (8, 2, dim) == (8, 2, oss.teacher.dim)
    assert [tuple(layer.weight.shape) for layer in list(oss.teacher.projector)[::3]] == [(hidden, dim), (128, hidden)]
    assert [tuple(layer.weight.shape) for layer in list(oss.student.projector)[::3]] == [(2048, 512), (128, 2048)]
    assert oss.teacher.project(features).shape == (2, 8, 128)


def test_a_teacher_that_cannot_take_the_views_is_refused_as_a_student_is() -> None:
    def of(teacher: dict[str, Any]) -> Run:
        return tiny("oss", method={**METHODS["oss"]["method"], "teacher": teacher})

    vit = {"name": "timm:vit_tiny_patch16_224", "patch_size": 4}
    for given in (vit, {**vit, "image_size": 32}):
        with pytest.raises(
            UserError, match=r"^method\.teacher\.name=.* the run's, of 16 .* method\.teacher\.image_size=16"
        ):
            build(of(given))
    with pytest.raises(
        UserError, match=r"^method\.teacher\.name=.* views of 8 pixels: set method\.teacher\.any_size=true"
    ):
        build(of({**vit, "image_size": 16}))
    with pytest.raises(UserError, match=r"^method\.teacher\.patch_size=4: timm's resnet10t"):
        build(of({"name": "timm:resnet10t", "patch_size": 4}))
    with pytest.raises(
        UserError,
        match=r"method\.teacher\.stem is set with method\.teacher\.name=timm:resnet10t, .*\.stem=imagenet, or",
    ):
        of({"name": "timm:resnet10t", "stem": "mvmr"})
    parts, data = parts_and_data(of({**vit, "image_size": 16, "any_size": True}))
    assert "sides" not in parts.method.config.model_dump()
    batch = parts.maker(next(iter(data.loader())))
    assert parts.method.train().loss(batch, Step(0, 10, 5))["loss"].isfinite()


@pytest.mark.parametrize("name", STUDENTS)
def test_the_papers_students_learn(name: str) -> None:
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0)
    settings = OSSConfig.model_validate({**SMALL, "scheme": "kd_drop"})
    oss = OSS(net, net.num_features, settings).train()
    generator = torch.Generator().manual_seed(0)
    given = Batch(torch.arange(2), {"global": torch.randn(2, 2, 3, 32, 32, generator=generator)})
    of(oss, given)[1]["loss"].backward()
    assert all(p.grad is not None for p in oss.student.parameters())


def test_settings_without_effect_are_remarked() -> None:
    def remarks(**settings: Any) -> list[str]:
        return OSSConfig.model_validate(settings).remarks({"global": 2, "local": 6}, [])

    assert remarks() == remarks(scheme="swav") == remarks(alpha=-0.5, dropout=[0.2, 0.1], code_momentum=0.9) == []
    assert remarks(scheme="kd", alpha=-0.5, alpha_ramp=True, dropout=[0.2, 0.1]) == [
        "no effect with method.scheme=kd: method.dropout, method.alpha_ramp"
    ]
    (said,) = remarks(scheme="swav_drop", classifier_input="raw", code_momentum=0.9, dropout=[0.2, 0.1])
    assert said.endswith(": method.code_momentum, method.classifier_input")
    assert "offline_prototypes" in remarks(offline_prototypes="trained")[0]


@pytest.mark.parametrize("recipe", ["oss_imagenet", "oss_cifar10", "oss_cifar10_cpu"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_of_a_shipped_recipe_is_told_nothing_that_the_user_did_not_set(recipe: str, scheme: str) -> None:
    weights = ["method.teacher_weights=runs/swav"] if scheme == "off_kd_drop" else []
    run = load(recipe, [f"method.scheme={scheme}", *weights])
    assert run.method.remarks(run.views.counts(), run.representations) == []


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"alpha": 0.5}, {"dropout": [0.1, 1.0]}, {"scheme": "kd_adv"}, {"code_momentum": 1.5}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            OSSConfig.model_validate(wrong)
    with pytest.raises(UserError, match=r"method\.teacher\.name: no encoder of that name"):
        tiny("oss", method={**METHODS["oss"]["method"], "teacher": {"name": "resnet51"}})
