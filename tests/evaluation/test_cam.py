"""Grad-CAM where its map is known in closed form, against hooks written out, and the sheets of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mvmr.data.images import ArraySource
from mvmr.evaluation.attention import GAP
from mvmr.evaluation.cam import cam_sheet, class_score, grad_cam, similarity_to, write_cam
from mvmr.evaluation.head import Head
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.resnet import LAYOUTS, ResNet
from mvmr.types import UserError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Tiny(nn.Module):
    """Maps that are the image's own channels, rectified in place and averaged: the CAM is known."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 3, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            self.maps.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.maps(x))).flatten(1)


HEAD = Head(torch.tensor([[1.0, 2.0, -3.0], [0.0, -1.0, 0.5]]), torch.tensor([0.3, 0.1]))


def test_the_map_of_a_class_in_closed_form() -> None:
    images = torch.rand(5, 3, 4, 6) + 0.1  # above 0, where the ReLU passes
    classes = torch.tensor([0, 1, 1, 0, 1])
    found = grad_cam(Tiny(), images, class_score(HEAD, classes), layer="maps")
    # d score / d A^k is w_k / (h w) everywhere.
    weights = HEAD.weight[classes][:, :, None, None] / 24
    torch.testing.assert_close(found, (weights * images).sum(1).relu())
    assert found.shape == (5, 4, 6)
    assert (found == 0).any()
    assert (found > 0).any()


def test_without_classes_it_is_of_the_class_that_the_head_chooses() -> None:
    images = torch.rand(6, 3, 4, 4)
    chosen = HEAD(images.mean((2, 3))).argmax(1)
    assert len(set(chosen.tolist())) == 2
    found = grad_cam(Tiny(), images, class_score(HEAD), layer="maps")
    torch.testing.assert_close(found, grad_cam(Tiny(), images, class_score(HEAD, chosen), layer="maps"))


def test_the_map_of_a_similarity_in_closed_form() -> None:
    images, other = torch.rand(4, 3, 5, 5) + 0.1, torch.randn(4, 3)
    found = grad_cam(Tiny(), images, similarity_to(other), layer="maps")
    features = images.mean((2, 3))
    unit, length = functional.normalize(other, dim=1), features.norm(dim=1, keepdim=True)
    cosine = (features / length * unit).sum(1, keepdim=True)
    slope = (unit - cosine * features / length) / length  # of the cosine, by the features
    torch.testing.assert_close(found, (slope[:, :, None, None] / 25 * images).sum(1).relu(), rtol=1e-4, atol=1e-7)
    one = grad_cam(Tiny(), images, similarity_to(other[:1]), layer="maps")
    torch.testing.assert_close(one[0], found[0])


def test_only_where_the_relu_passes_is_there_a_slope() -> None:
    images = torch.tensor([-1.0, 1.0, 2.0, -5.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    head = Head(torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1))
    found = grad_cam(Tiny(), images, class_score(head), layer="maps")
    # Two of four places have the slope 1/4: a mean of 1/8; where A is below 0, so is the sum.
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.125], [0.25, 0.0]]]))


def resnet() -> ResNet:
    return ResNet(LAYOUTS["resnet18"], stem="cifar", width=0.125, zero_init_residual=False)


@pytest.mark.parametrize("layer", ["layer4", "layer3.1", "layer2.0.conv1", "bn1", "layer4.1.relu"])
def test_equals_hooks_written_out(layer: str) -> None:
    net, images = resnet().eval(), torch.randn(3, 3, 16, 16)
    head = Head(torch.randn(5, 64), torch.randn(5))
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        made.retain_grad()
        kept.append(made)
        return made.clone()

    handle = net.get_submodule(layer).register_forward_hook(keep)
    head(net(images)).amax(1).sum().backward()
    handle.remove()
    maps, slope = kept[-1].detach(), kept[-1].grad
    assert slope is not None
    expected = torch.einsum("bk,bkhw->bhw", slope.mean((2, 3)), maps).relu()
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        found = grad_cam(net, images, class_score(head), layer=layer)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert found.shape == (3, *maps.shape[2:])
    single = torch.cat([grad_cam(net, image[None], class_score(head), layer=layer) for image in images])
    torch.testing.assert_close(single, found, rtol=1e-3, atol=1e-6)  # images do not mix
    assert found.max() > 0


def test_leaves_no_trace_and_ignores_autocast() -> None:
    net, images, head = resnet().train(), torch.randn(2, 3, 16, 16), Head(torch.randn(3, 64), torch.zeros(3))
    net.layer1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():  # as around most evaluations
        exact = grad_cam(net, images, class_score(head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(grad_cam(net, images, class_score(head)), exact)
    assert not exact.requires_grad
    assert not net.layer4._forward_hooks
    assert [part.training for part in (net.layer1, net.layer4)] == [False, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def loaded() -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(), dim=64, image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), method="none",
        data="none", version="0",
    )  # fmt: skip
    return Encoder(resnet(), card)


def test_takes_a_loaded_encoder_with_images_as_they_are() -> None:
    encoder, head = loaded(), Head(torch.randn(3, 64), torch.zeros(3))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    normalised = (images / 255 - encoder.mean) / encoder.std
    found = grad_cam(encoder, images, class_score(head))
    torch.testing.assert_close(found, grad_cam(encoder.backbone, normalised, class_score(head)))


def test_what_is_refused() -> None:
    images, net = torch.zeros(2, 3, 16, 16), resnet()
    score = class_score(Head(torch.randn(3, 64), torch.zeros(3)))
    with pytest.raises(UserError, match=r"layer=layer5: .* a ResNet has conv1, bn1, .*layer4, avgpool.*attention maps"):
        grad_cam(net, images, score, layer="layer5")
    net.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(UserError, match=r"layer=spare: is not called"):
        grad_cam(net, images, score, layer="spare")
    net.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"layer=avgpool: .*gives no maps"):
        grad_cam(net, images, score, layer="avgpool")
    with pytest.raises(ValueError, match=r"one number an image; this one is \[2, 64\]"):
        grad_cam(net, images, lambda x: x)
    assert not net.layer4._forward_hooks


def cell(sheet: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    at = side + GAP
    return sheet[row * at : row * at + side, column * at : column * at + side].astype(int)


def test_sheet_has_a_row_an_image(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 2], maps[0, 3, 0] = 7.0, 3.5
    file = write_cam(tmp_path / "new" / "cam.png", images, maps, others=images.flip(0), side=16)
    with Image.open(file) as image:
        assert image.format == "PNG"
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 16 + GAP, 4 * 16 + 3 * GAP, 3)
    doubled = images.permute(0, 2, 3, 1).repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
    for row in (0, 1):
        assert (cell(sheet, row, 0, 16) == doubled[row]).all()
        assert (cell(sheet, row, 3, 16) == doubled[1 - row]).all()
        both = (cell(sheet, row, 0, 16) + cell(sheet, row, 1, 16)) / 2
        assert np.abs(cell(sheet, row, 2, 16) - both).max() <= 1
    bright = cell(sheet, 0, 1, 16).sum(-1)
    assert np.unravel_index(bright.argmax(), bright.shape)[0] // 4 == 1
    assert np.unravel_index(bright.argmax(), bright.shape)[1] // 4 == 2
    assert bright[14, 1] > 200 > bright[0, 0] == 4  # half as hot, and cold
    assert (cell(sheet, 1, 1, 16).sum(-1) == 4).all()  # a map of zeros stays dark
    assert (sheet[:, 16 : 16 + GAP] == 255).all()
    floats = write_cam(tmp_path / "floats.png", images.float() / 255, 10 * maps, others=images.flip(0), side=16)
    assert floats.read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="are needed"):
        write_cam(tmp_path / "x.png", images, maps[:1])
    with pytest.raises(ValueError, match="others must be"):
        write_cam(tmp_path / "x.png", images, maps, others=images[:1])


def test_sheets_of_a_source(tmp_path: Path) -> None:
    source = ArraySource(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), None, name="drawn/test")
    encoder, positions = loaded().train(), torch.tensor([4, 1])
    head = Head(torch.randn(3, 64), torch.zeros(3))
    file = cam_sheet(encoder, source, positions, tmp_path / "a.png", head=head, layer="layer3")
    images = source.images[positions]
    expected = write_cam(tmp_path / "b.png", images, grad_cam(encoder, images, class_score(head), layer="layer3"))
    assert file.read_bytes() == expected.read_bytes()
    like = torch.tensor([0, 2])
    file = cam_sheet(encoder, source, positions, tmp_path / "c.png", like=like)
    assert encoder.training
    others = source.images[like]
    with torch.no_grad():
        maps = grad_cam(encoder, images, similarity_to(encoder.eval()(others)))
    assert file.read_bytes() == write_cam(tmp_path / "d.png", images, maps, others=others).read_bytes()
    with pytest.raises(UserError, match="either a head"):
        cam_sheet(encoder, source, positions, tmp_path / "x.png")
    with pytest.raises(UserError, match="2 images are to be compared with 1"):
        cam_sheet(encoder, source, positions, tmp_path / "x.png", like=like[:1])
