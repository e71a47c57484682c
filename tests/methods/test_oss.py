"""OSS term by term: Eqs. 1 to 7 by loops, where gradients go, Table 6's schemes, and every option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvmr.config import load
from mvmr.engine.train import train
from mvmr.errors import UserError
from mvmr.methods.oss import OSS, SCHEMES, OSSConfig
from mvmr.methods.swav import SwAV, SwAVConfig
from mvmr.nets.weights import load_encoder
from mvmr.ops.sinkhorn import sinkhorn
from mvmr.types import Batch, Step
from tiny import METHODS, tiny

TEACHER = {"name": "resnet18", "stem": "cifar", "width": 0.0625, "zero_init_residual": False}
SMALL: dict[str, Any] = {
    "teacher": TEACHER, "teacher_hidden": 11, "student_hidden": 12, "dim": 6, "prototypes": 9,
    "queue": 0, "classifier_hidden": 7, "freeze_prototypes_epochs": 0,
}  # fmt: skip
B, V = 4, 3


class Pool(nn.Module):
    """An encoder of any size of image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.layer(images.mean((2, 3))))


def method(**settings: Any) -> OSS:
    torch.manual_seed(0)
    return OSS(Pool(), 5, OSSConfig.model_validate({**SMALL, **settings})).double().train()


def batch(*, small: int = V, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {"global": torch.randn(2, B, 3, 8, 8, generator=generator, dtype=torch.float64)}
    if small:
        views["local"] = torch.randn(small, B, 3, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(torch.arange(B), views)


def step(at: int = 0) -> Step:
    return Step(at, 20, 5)


def of(oss: OSS, given: Batch, at: Step | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(embeddings, terms) with equal dropout at every call."""
    torch.manual_seed(7)
    embeddings = oss.embed(given)
    return embeddings, oss.objective(embeddings, given, at or step())


def gradients(oss: OSS, given: Batch) -> dict[str, Tensor]:
    oss.zero_grad()
    of(oss, given)[1]["loss"].backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in oss.named_parameters()}


def cross_entropy(u: Tensor, c: Tensor, q: Tensor) -> float:
    """L_c of Eq. 3 at tau = 0.1, number by number: u [d], C [K, d], q [K]."""
    e = [math.exp(float(u @ row) / 0.1) for row in c]
    return -sum(float(q[k]) * math.log(e[k] / sum(e)) for k in range(len(c)))


def codes_by_hand(z: Tensor, c: Tensor) -> Tensor:
    return torch.stack([sinkhorn(z[:, i] @ c.T, epsilon=0.05) for i in range(2)], dim=1)  # [B, 2, K]


def of_network(z: Tensor, dropped: Tensor, c: Tensor, q: Tensor) -> float:
    """Eq. 2 (or 4) and Eq. 5 as a sum over terms, averaged over images: [B, 2 + V, d] twice."""
    total = 0.0
    for n in range(B):
        total += cross_entropy(z[n, 0], c, q[n, 1]) + cross_entropy(z[n, 1], c, q[n, 0])
        for i in range(2):
            total += sum(cross_entropy(dropped[n, v], c, q[n, i]) for v in range(dropped.shape[1]))
            total += sum(cross_entropy(z[n, v], c, q[n, i]) for v in range(2, z.shape[1]))
    return total / B


def by_hand(oss: OSS, embeddings: Mapping[str, Tensor]) -> dict[str, float]:
    """L_T, L_S and L_D of Eqs. 2 to 7 as sums over terms, averaged over images."""
    unit = {name: normalize(x.detach(), dim=2) for name, x in embeddings.items()}
    c = oss.prototypes.weight.detach()
    q = codes_by_hand(unit["teacher"], c)
    found = {name: of_network(unit[name], unit[f"{name}/dropout"], c, q) for name in ("teacher", "student")}
    found["classifier"] = 0.0
    for n in range(B):
        for i in range(2):  # Eq. 7: teacher 0, student 1
            for label, name in enumerate(("teacher", "student")):
                d = torch.softmax(oss.classifier(unit[name][n, i]), 0)
                found["classifier"] -= math.log(d[label].item()) / B
    return found


@pytest.mark.parametrize("small", [0, V])
def test_every_term_is_the_papers(small: int) -> None:
    oss = method(reduction="paper_sum")
    embeddings, terms = of(oss, batch(small=small))
    expected = by_hand(oss, embeddings)
    for name, value in expected.items():
        assert terms[f"loss/{name}"].item() == pytest.approx(value, rel=1e-10), name
    assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-10)  # Eq. 1


def test_means_are_over_30_30_and_4_terms_at_six_small_crops() -> None:
    sums, means = (of(method(reduction=reduction), batch(small=6))[1] for reduction in ("paper_sum", "mean"))
    for name, count in {"teacher": 30, "student": 30, "classifier": 4}.items():
        assert sums[f"loss/{name}"].item() == pytest.approx(count * means[f"loss/{name}"].item(), rel=1e-12)
    parts = [means[f"loss/{name}"] for name in ("teacher", "student", "classifier")]
    assert means["loss"].item() == pytest.approx(torch.stack(parts).sum().item())


def without(oss: OSS, *names: str) -> dict[str, Tensor]:
    """Gradients of the parts of the loss that are not named."""
    oss.zero_grad()
    torch.manual_seed(7)
    given = batch()
    embeddings = oss.embed(given)
    unit = {name: normalize(x, dim=2) for name, x in embeddings.items()}
    codes = oss.codes(unit["teacher"][:, :2].detach(), oss.prototypes)
    losses = {name: oss._cluster_loss(name, unit, codes) for name in ("teacher", "student")}
    if oss.classifier is not None:
        losses["classifier"] = oss._adversarial(unit, step())[0]
    torch.stack([loss for name, loss in losses.items() if name not in names]).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in oss.named_parameters()}


def test_the_students_loss_has_no_gradient_to_the_teacher() -> None:
    found = without(method(), "teacher", "classifier")
    assert all(not gradient.any() for name, gradient in found.items() if name.startswith("teacher."))
    assert any(gradient.any() for name, gradient in found.items() if name.startswith("student."))
    other = without(method(), "student", "classifier")
    assert all(not gradient.any() for name, gradient in other.items() if name.startswith("student."))


def test_gradients_of_prototypes_add_up() -> None:
    key = "prototypes.weight"
    whole = gradients(method(), batch())[key]
    teacher, student = without(method(), "student")[key], without(method(), "teacher")[key]
    assert student.abs().max() > 1e-4
    torch.testing.assert_close(whole, teacher + student, rtol=1e-10, atol=1e-13)
    alone = gradients(method(student_prototype_gradient=False), batch())
    torch.testing.assert_close(alone[key], teacher, rtol=1e-10, atol=1e-13)
    for name, gradient in gradients(method(), batch()).items():
        if name != key:
            torch.testing.assert_close(alone[name], gradient, rtol=1e-10, atol=1e-13)


def test_codes_have_no_gradient() -> None:
    oss, given = method(), batch()
    torch.manual_seed(7)
    embeddings = oss.embed(given)
    z = normalize(embeddings["teacher"], dim=2)[:, :2]
    assert not oss.codes(z, oss.prototypes).requires_grad


def test_the_reversed_gradient_is_alpha_times_the_classifiers() -> None:
    """alpha = 0: L_D moves D alone; -2: it moves the networks by -2 times its gradient, teacher and student alike."""
    forward, cut, back = (gradients(method_with(alpha), batch()) for alpha in (1.0, 0.0, -2.0))
    networks = [name for name in forward if name.startswith(("teacher.", "student."))]
    assert any((forward[name] - cut[name]).abs().max() > 1e-6 for name in networks if name.startswith("teacher."))
    for name in networks:
        expected = cut[name] - 2 * (forward[name] - cut[name])
        torch.testing.assert_close(back[name], expected, rtol=1e-9, atol=1e-12)
    for name in forward:
        if name.startswith("classifier."):
            assert forward[name].any()
            torch.testing.assert_close(back[name], forward[name])
            torch.testing.assert_close(cut[name], forward[name])
    plain = gradients(method(scheme="kd_drop"), batch())
    for name in networks:  # alpha = 0 leaves what there is without a classifier
        torch.testing.assert_close(cut[name], plain[name], rtol=1e-9, atol=1e-12)


def method_with(alpha: float) -> OSS:
    oss = method()
    oss.config = oss.config.model_copy(update={"alpha": alpha})  # 1 is no setting: it is the classifier's own gradient
    return oss


def test_the_teacher_may_be_spared() -> None:
    cut, spared, both = (
        gradients(method(**settings), batch()) for settings in ({"alpha": 0.0}, {"adversarial_teacher": False}, {})
    )
    for name in both:
        if name.startswith("teacher."):
            torch.testing.assert_close(spared[name], cut[name])
        if name.startswith("student."):
            torch.testing.assert_close(spared[name], both[name])


def test_without_rates_dropout_repeats_the_crops() -> None:
    oss = method(dropout=[0.0, 0.0], reduction="paper_sum")
    embeddings, terms = of(oss, batch())
    for name in ("teacher", "student"):
        assert torch.equal(embeddings[f"{name}/dropout"], embeddings[name])
    plain = of(method(scheme="kd", reduction="paper_sum"), batch())[1]
    unit, c = normalize(embeddings["student"].detach(), dim=2), oss.prototypes.weight.detach()
    q = codes_by_hand(normalize(embeddings["teacher"].detach(), dim=2), c)
    again = sum(cross_entropy(unit[n, v], c, q[n, i]) for n in range(B) for v in range(2 + V) for i in range(2)) / B
    assert terms["loss/student"].item() == pytest.approx(plain["loss/student"].item() + again, rel=1e-10)


def test_twins_have_one_loss_and_an_undecided_classifier_costs_four_times_ln_2() -> None:
    oss = method(scheme="kd_drop_adv", dropout=[0.0, 0.0], reduction="paper_sum")
    embeddings, _ = of(oss, batch())
    twins = {name: embeddings["teacher"].clone() for name in embeddings}
    nn.init.zeros_(oss.classifier[-1].weight)
    nn.init.zeros_(oss.classifier[-1].bias)
    terms = oss.objective(twins, batch(), step())
    assert terms["loss/student"].item() == terms["loss/teacher"].item()
    assert terms["loss/classifier"].item() == pytest.approx(4 * math.log(2))


def test_schemes_of_swav_are_swav() -> None:
    oss = method(scheme="swav")
    assert oss.teacher is None
    assert oss.classifier is None
    torch.manual_seed(0)
    settings = {"hidden": 12, "dim": 6, "prototypes": 9, "queue": 0}
    swav = SwAV(Pool(), 5, SwAVConfig.model_validate(settings)).double().train()
    swav.load_state_dict({name.removeprefix("student."): value for name, value in oss.state_dict().items()})
    found, expected = of(oss, batch())[1], swav.loss(batch(), step())
    for name in ("loss", "agreement", "entropy/code", "entropy/mean"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-12), name
    assert found["loss"].item() == pytest.approx(found["loss/student"].item())
    assert of(method(scheme="swav_drop"), batch())[1]["loss"].item() != pytest.approx(found["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "off_kd_drop"])
def test_every_scheme_is_one_override(scheme: str) -> None:
    """Table 6: what each row has and has not, and that all of it learns."""
    run = load("oss_imagenet", [f"method.scheme={scheme}"])
    assert run.method.scheme == scheme
    oss = method(scheme=scheme)
    assert (oss.teacher is not None) == scheme.startswith("kd")
    assert (oss.classifier is not None) == (scheme == "kd_drop_adv")
    embeddings, terms = of(oss, batch())
    assert ("student/dropout" in embeddings) == ("drop" in scheme)
    terms["loss"].backward()
    assert all(p.grad is not None for p in oss.parameters())
    assert sorted(oss.also_exported()) == (["teacher"] if scheme.startswith("kd") else [])
    assert oss.exported() is oss.student.encoder


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
    from mvmr.nets.encoders import build_encoder

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


@pytest.mark.parametrize("name", ["mobilenetv2_100", "regnety_006", "efficientnet_b0"])
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
    assert remarks(scheme="kd", alpha=-0.5, dropout=[0.2, 0.1]) == [
        "no effect with method.scheme=kd: method.dropout, method.alpha"
    ]
    (said,) = remarks(scheme="swav_drop", teacher=TEACHER, classifier_hidden=3, code_momentum=0.9, dropout=[0.2, 0.1])
    assert said.endswith("method.teacher, method.code_momentum, method.classifier_hidden")
    assert "offline_prototypes" in remarks(offline_prototypes="trained")[0]


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"alpha": 0.5}, {"dropout": [0.1, 1.0]}, {"scheme": "kd_adv"}, {"code_momentum": 1.5}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            OSSConfig.model_validate(wrong)
    with pytest.raises(UserError, match=r"method\.teacher\.name: no encoder of that name"):
        tiny("oss", method={**METHODS["oss"]["method"], "teacher": {"name": "resnet51"}})
