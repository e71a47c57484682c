"""OSS term by term: Eqs. 1 to 7 by loops, where gradients go, and Table 6's schemes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvmr.config import load
from mvmr.methods.oss import OSS, SCHEMES
from mvmr.methods.swav import SwAV, SwAVConfig
from pool import Pool
from small_oss import B, V, batch, codes_by_hand, cross_entropy, gradients, method, of, of_network, step


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
    whole, alone = gradients(method(), batch()), without(method(), "student")  # all of the method's own loss but L_S
    of_teacher = [name for name in whole if name.startswith("teacher.")]
    assert all(whole[name].any() for name in of_teacher if "weight" in name)
    for name in of_teacher:
        torch.testing.assert_close(whole[name], alone[name], rtol=1e-10, atol=1e-13)
    assert any((whole[name] - alone[name]).abs().max() > 1e-4 for name in whole if name.startswith("student."))


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
