"""Local weight files for named architectures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mvmr.nets.released import read_checkpoint, tensors_of
from mvmr.types import UserError

SAFETENSORS = ".safetensors"
FORMATS = (SAFETENSORS, ".pt", ".pth", ".bin", ".ckpt", ".tar")


def fit_weights(net: nn.Module, file: Path, classifier: Collection[str]) -> None:
    """Load a file's weights into a net without classifier; nothing in the file is executed.

    The file may nest them under "state_dict", "model" or "teacher", and put a prefix before their names, beside other
    nets ("module.", "backbone.", "visual.", ...). `classifier` names the layers that the net lacks and the file may
    have. All other names must match, and all shapes. Raises UserError with the first that do not.
    """
    tensors = _tensors(file)
    own = net.state_dict()
    prefix = _best_prefix(tensors, own)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    found = {name: t for name, t in found.items() if not any(name.startswith(f"{layer}.") for layer in classifier)}
    # Old files lack the counters of batch norms, which nothing reads in eval mode.
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in own]
    where = f" under {prefix!r}" if prefix else ""
    if missing or unexpected:
        told = [f"{what} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
                for what, names in (("lacks", missing), ("has unknown", unexpected)) if names]  # fmt: skip
        raise UserError(f"weights={file}: does not fit the architecture:{where} it {' and '.join(told)}; "
                        "give the file of this very architecture")  # fmt: skip
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"weights={file}: {prefix}{name} has shape {list(tensor.shape)} where the architecture has "
                f"{list(own[name].shape)}; give the file of this very architecture"
            )
    net.load_state_dict({**own, **found}, strict=True)


def _tensors(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise UserError(f"weights={file}: no such file; give a local file of weights ({', '.join(FORMATS)})")
    if file.suffix == SAFETENSORS:
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"weights={file}: is not a readable safetensors file ({error}); copy it again") from None
    if file.suffix not in FORMATS:
        raise UserError(f"weights={file}: unknown ending; known: {', '.join(FORMATS)}")
    tensors = tensors_of(read_checkpoint(file))
    if not tensors:
        raise UserError(f"weights={file}: holds no tensors by name (a state_dict); give a file with weights")
    return tensors


def _best_prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What stands before most of the net's names in the file; nothing where nothing fits."""
    anchor = next(iter(own))
    candidates = {name.removesuffix(anchor) for name in tensors if name.endswith(anchor)}
    whole = sorted(prefix for prefix in candidates if prefix == "" or prefix.endswith("."))
    return max(whole, key=lambda prefix: sum(f"{prefix}{name}" in tensors for name in own), default="")
