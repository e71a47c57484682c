"""Pretrained weights by name: from the local caches, or the network, without waiting for one that is not there."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
from torch import Tensor, nn

from mvmr.nets.encoders import TIMM, EncoderConfig, build_timm, output_width, timm_settings
from mvmr.types import UserError

PROBE_SECONDS = 1.5
"""How long a host may take to be found and to accept a connection."""
RANDOM = "@random"
"""After a name: the architecture with random weights."""
TORCHVISION = "torchvision:"
OPEN_CLIP = "open_clip:"

TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
DEFAULT_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}


def pretrained_timm(name: str) -> tuple[nn.Module, int]:
    """timm:NAME without classifier, with its pretrained weights from the cache or else the network, and its width.

    Raises UserError where timm has no such model or no weights for it, or where neither has them.
    """
    config = EncoderConfig(name=name)
    settings = _timm_settings(config)
    hub, url, own = (str(settings.get(key) or "") for key in ("hf_hub_id", "url", "hf_hub_filename"))
    if not (hub or url):
        raise UserError(f"{name}: timm has no pretrained weights for this model; take {name}{RANDOM} for random ones")
    kind = settings.get("custom_load")
    # timm's own order: the hub first. What it keeps there is in timm's layout, whatever the first address holds.
    cached = hub_file(hub, safe_first(own) if own else TIMM_FILES) if hub else url_file(url)
    if cached is None:
        require_host(hub_address() if hub else url, name)
    try:
        if cached is None:
            return build_timm(config, pretrained=True)
        import timm

        overlay = {"file": str(cached), "custom_load": kind == "hf" if hub else kind}
        bare = name.removeprefix(TIMM)
        net = timm.create_model(bare, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
        return net, output_width(net, config)
    except Exception as error:  # whatever the download or the reading raises
        _failed(name, error, cached)


def pretrained_torchvision(model: str) -> dict[str, Tensor]:
    """The tensors of torchvision's default weights for a model, classifier included, from the cache or the network.

    Raises UserError where neither has them.
    """
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(model)
    name = TORCHVISION + model
    cached = url_file(weights.DEFAULT.url)
    if cached is None:
        require_host(weights.DEFAULT.url, name)
    try:
        # Reads the cached file if there is one; nothing in it is executed.
        return weights.DEFAULT.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:
        _failed(name, error, cached)


def open_clip_file(settings: Mapping[str, Any], name: str) -> str:
    """The file of open_clip's pretrained weights (`get_pretrained_cfg`), downloaded if it is not cached.

    Raises UserError where neither the cache nor the network has it.
    """
    repository, url = settings.get("hf_hub", ""), settings.get("url", "")
    if repository:
        owner, file = os.path.split(repository)
        cached = hub_file(owner, safe_first(file) if file else OPEN_CLIP_FILES)
    else:
        cached = url_file(url, Path("~/.cache/clip").expanduser())
    if cached is not None:
        return str(cached)
    require_host(hub_address() if repository else url, name)
    from open_clip.pretrained import download_pretrained

    try:
        return str(download_pretrained(dict(settings)))
    except Exception as error:
        _failed(name, error, None)


def hub_file(repository: str, names: Iterable[str]) -> Path | None:
    """The first of these files of a Hugging Face repository (OWNER/NAME or OWNER/NAME@REVISION) that is cached."""
    from huggingface_hub import try_to_load_from_cache

    identifier, _, revision = repository.partition("@")
    for name in names:
        found = try_to_load_from_cache(identifier, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def url_file(url: str, folder: Path | None = None) -> Path | None:
    """The file that torch.hub, or who uses `folder`, keeps for an address, if it is there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else folder
    file = folder / os.path.basename(urlsplit(url).path)
    return file if file.is_file() else None


def safe_first(name: str) -> list[str]:
    """A file name of the hub, after the safetensors file that would be preferred to it."""
    stem, ending = os.path.splitext(name)
    return [f"{stem}.safetensors", name] if ending in (".bin", ".pth", ".pt") else [name]


def hub_address() -> str:
    """Where the Hugging Face hub is (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def require_host(url: str, name: str) -> None:
    """Raise UserError, within two seconds, if the network does not lead to the host of `url`."""
    from huggingface_hub import constants

    host = urlsplit(url).hostname or url
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif not reachable(url):
        why = f"{host} cannot be reached"
    else:
        return
    raise UserError(
        f"{name}: its pretrained weights are not in the cache and {why}; connect to the network once so that they are "
        f"cached, give a local file (a teacher's `weights`), or take {_random(name)} for random weights"
    )


def reachable(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the host of an address, or the proxy that leads to it, accepts a connection within `seconds`.

    In a thread of its own, because looking up a name has no time limit: it is left behind when the time is over.
    """
    address = _way_to(url)
    answered: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            answered.append(True)
        except OSError:
            return

    thread = threading.Thread(target=connect, daemon=True, name="mvmr-probe")
    thread.start()
    thread.join(seconds)
    return bool(answered)


def _way_to(url: str) -> tuple[str, int]:
    """Host and port that a client connects to first: those of the proxy where the environment names one."""
    there = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(there.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(there.hostname or ""):
        there = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return there.hostname or "", there.port or DEFAULT_PORTS.get(there.scheme, 443)


def _timm_settings(config: EncoderConfig) -> dict[str, Any]:
    """What timm records of a model, without building it: that takes seconds for a large one."""
    import timm

    bare = config.name.removeprefix(TIMM)
    if timm.is_model(bare):
        with contextlib.suppress(RuntimeError):  # a tag that timm does not have
            record: Any = timm.get_pretrained_cfg(bare, allow_unregistered=False)
            return record.to_dict()
    return timm_settings(build_timm(config)[0])  # which says what is wrong with the name


def _random(name: str) -> str:
    # Of open_clip, a tag names the weights and not the architecture.
    return f"{name.partition('/')[0] if name.startswith(OPEN_CLIP) else name}{RANDOM}"


def _failed(name: str, error: Exception, cached: Path | None) -> NoReturn:
    if cached is not None:
        raise UserError(
            f"{name}: its cached weights {cached} cannot be used ({type(error).__name__}: {error}); delete that file "
            "so that it is downloaded anew"
        ) from error
    raise UserError(
        f"{name}: its pretrained weights could not be had ({type(error).__name__}: {error}); connect to the network "
        f"once so that they are cached, or take {_random(name)} for random weights"
    ) from error
