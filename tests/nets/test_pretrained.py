"""Named weights: from the caches without the network, and no waiting where there is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mvmr.nets import pretrained
from mvmr.nets.encoders import EncoderConfig, build_timm
from mvmr.nets.pretrained import hub_file, open_clip_file, reachable, require_host, safe_first, url_file
from mvmr.nets.teachers import load_teacher
from mvmr.nets.weights import load_encoder
from mvmr.types import UserError

SMALL = "timm:test_vit.r160_in1k"
"""timm's own net for tests: 160 pixels, 64 features."""
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of the machine's own, and no proxies."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Stall:
    """A call that gives no answer for half a minute, or until the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked, self.answered = 0, 0

    def __call__(self, *arguments: object, **settings: object) -> None:
        self.asked += 1
        self.over.wait(30)
        self.answered += 1
        raise TimeoutError("no answer")


@pytest.fixture
def stall() -> Iterator[Stall]:
    made = Stall()
    yield made
    made.over.set()


def refuses(*arguments: object, **settings: object) -> None:
    raise ConnectionRefusedError("refused")


def forbidden(*arguments: object, **settings: object) -> None:
    raise AssertionError("the network was touched")


def cache_on_hub(folder: Path, repository: str, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A file laid down as the hub's client does."""
    root = folder / f"models--{repository.replace('/', '--')}"
    file = root / "snapshots" / "abc" / name
    file.parent.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("stalling", ["getaddrinfo", "create_connection"])
@pytest.mark.parametrize("name", [SMALL, "torchvision:resnet18"])
def test_a_network_that_does_not_answer_is_not_waited_for(
    name: str, stalling: str, monkeypatch: pytest.MonkeyPatch, stall: Stall
) -> None:
    monkeypatch.setattr(pretrained.reachable, "__defaults__", (0.05,))
    monkeypatch.setattr(socket, stalling, stall)
    with pytest.raises(UserError, match=rf"{name}: .*cannot be reached.*once.*local file.*take {name}@random"):
        load_encoder(name)
    assert (stall.asked, stall.answered) == (1, 0)  # asked once, and left behind while it still hangs


def test_the_probe_has_less_than_two_seconds(monkeypatch: pytest.MonkeyPatch, stall: Stall) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", stall)
    waits: list[float | None] = []
    join = threading.Thread.join

    def recorded(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)
        join(thread, 0.01)

    monkeypatch.setattr(threading.Thread, "join", recorded)
    assert not reachable("https://example.org/file")
    assert waits == [pretrained.PROBE_SECONDS]
    assert pretrained.PROBE_SECONDS < 2


def test_refused_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(socket, "create_connection", refuses)
    assert not reachable("https://example.org")
    with pytest.raises(UserError, match=r"m: .*example\.org cannot be reached"):
        require_host("https://example.org/a/b.pth", "m")
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        require_host("https://example.org/a/b.pth", "m")


def test_a_host_that_listens_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}/file")
        # Through a proxy, it is the proxy that has to answer.
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert reachable("https://nowhere.invalid/file")
        monkeypatch.setenv("no_proxy", "nowhere.invalid")
        assert not reachable("https://nowhere.invalid/file")
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")  # the server is gone
    monkeypatch.delenv("no_proxy")
    assert not reachable("https://example.org/file")


def test_the_hubs_endpoint_is_what_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.invalid")
    monkeypatch.setattr(socket, "create_connection", refuses)
    with pytest.raises(UserError, match=r"mirror\.invalid cannot be reached"):
        load_encoder(SMALL)


def test_weights_in_the_hubs_cache_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    published = timm.create_model(SMALL.removeprefix("timm:"))  # with its classifier, as published
    cache_on_hub(tmp_path / "hub", "timm/test_vit.r160_in1k", "model.safetensors", dict(published.state_dict()))
    for name in ("create_connection", "getaddrinfo", "socket"):
        monkeypatch.setattr(socket, name, forbidden)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    encoder = load_encoder(SMALL)
    assert torch.equal(torch.rand(3), expected)  # the global generator has not moved
    state = encoder.backbone.state_dict()
    assert state.keys() < published.state_dict().keys()
    assert all(torch.equal(tensor, published.state_dict()[name]) for name, tensor in state.items())
    assert (encoder.card.dim, encoder.card.image_size) == (64, 160)
    teacher = load_teacher(SMALL)
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(teacher(images), published.eval().forward_head(published.forward_features(images), True))


def test_damaged_cached_weights_are_told_with_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cache_on_hub(tmp_path / "hub", "timm/test_vit.r160_in1k", "model.safetensors", {"x": torch.zeros(1)})
    file.write_bytes(b"half a file")
    monkeypatch.setattr(socket, "create_connection", forbidden)
    with pytest.raises(UserError, match=r"cached weights .*model\.safetensors cannot be used.*delete that file"):
        load_encoder(SMALL)


def test_a_model_without_published_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", forbidden)
    with pytest.raises(UserError, match=r"timm has no pretrained weights.*timm:resnetv2_101d@random"):
        load_encoder("timm:resnetv2_101d")
    with pytest.raises(UserError, match="nosuchtag"):
        load_encoder("timm:test_vit.nosuchtag")


def test_open_clips_file_is_found_in_either_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", refuses)
    settings = {"url": "https://example.org/x/vit-1234.pt", "hf_hub": "timm/some_clip/"}
    with pytest.raises(UserError, match=r"huggingface\.co cannot be reached.*take open_clip:A@random"):
        open_clip_file(settings, "open_clip:A/tag")
    cached = cache_on_hub(tmp_path / "hub", "timm/some_clip", "open_clip_model.safetensors", {"x": torch.zeros(1)})
    assert open_clip_file(settings, "open_clip:A/tag") == str(cached)
    only_url = {"url": settings["url"]}
    with pytest.raises(UserError, match=r"example\.org cannot be reached"):
        open_clip_file(only_url, "open_clip:A/tag")
    other = tmp_path / ".cache" / "clip" / "vit-1234.pt"
    other.parent.mkdir(parents=True)
    other.touch()
    assert open_clip_file(only_url, "open_clip:A/tag") == str(other)


def test_files_are_looked_for_in_the_order_of_preference(tmp_path: Path) -> None:
    assert safe_first("a.bin") == ["a.safetensors", "a.bin"]
    assert safe_first("a.npz") == ["a.npz"]
    assert hub_file("a/b", ["x"]) is None
    cached = cache_on_hub(tmp_path / "hub", "a/b", "second", {"x": torch.zeros(1)})
    assert hub_file("a/b", ["first", "second"]) == cached
    assert hub_file("a/b@other", ["second"]) is None
    assert url_file("https://example.org/x/y.pth?download=1") is None
    kept = tmp_path / "torch" / "hub" / "checkpoints" / "y.pth"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert url_file("https://example.org/x/y.pth?download=1") == kept


def test_a_download_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: EncoderConfig, *, pretrained: bool = False) -> tuple[nn.Module, int]:
        if pretrained:
            raise OSError("connection reset")
        return build_timm(config)

    monkeypatch.setattr(pretrained, "reachable", lambda url: True)
    monkeypatch.setattr(pretrained, "build_timm", broken)
    with pytest.raises(UserError, match=rf"could not be had \(OSError: connection reset\).*take {SMALL}@random"):
        load_encoder(SMALL)
