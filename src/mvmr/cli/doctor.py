"""mvmr doctor: what this machine can do, and whether mvmr works on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

EXTRAS = {"report": "tensorboard", "clip": "open_clip", "detection": "faster_coco_eval", "export": "onnx"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show versions, devices, precisions, room and extras, and take one training step."""
    from mvmr.cli.screen import show_json, show_table

    found = findings()
    if as_json:
        show_json(found)
    else:
        show_table("mvmr doctor", ["", "found"], [[key, str(value)] for key, value in found.items()])
    if found["training step"] != "works":
        raise typer.Exit(1)


def findings() -> dict[str, Any]:
    """{what: found}."""
    import importlib.util
    import shutil
    from pathlib import Path

    import torch

    from mvmr.data.files import cache_folder
    from mvmr.engine.environment import environment

    known = environment()
    libraries = " ".join(f"{name} {version}" for name, version in known["libraries"].items() if version)
    gpus = known["gpus"]
    bf16 = bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False)
    cache = cache_folder(None, "arrays").parent
    return {
        "mvmr": known["mvmr"],
        "python": known["python"],
        "libraries": libraries,
        "processor": f"{known['processor']}, {known['cores']} cores, {known['threads']} torch threads",
        "GPUs": ", ".join(gpus) or "none: runs use the CPU",
        "precision": ("bf16" if bf16 else "fp16") if gpus else "float32",
        "cache": f"{cache} ({shutil.disk_usage(cache).free / 1e9:.0f} GB free)",
        "run folders": f"{Path.cwd() / 'runs'} ({shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free)",
        "extras": ", ".join(
            f"{extra} {'installed' if importlib.util.find_spec(module) else 'missing'}"
            for extra, module in EXTRAS.items()
        ),
        "training step": _one_step(),
    }


def _one_step() -> str:
    """Takes one step of the digits recipe on the device that a run would use."""
    import torch

    from mvmr.api import device
    from mvmr.config import load
    from mvmr.data.module import TrainingData
    from mvmr.engine.train import build
    from mvmr.types import Step

    try:
        run = load("mvmr_digits", {"data.batch_size": 32})
        parts = build(run)
        data = TrainingData(parts.source, parts.maker, batch_size=32, seed=0, workers=0)
        batch = parts.maker.to(device())(next(iter(data.loader())), device())
        loss = parts.method.to(device()).loss(batch, Step(0, 1, 1))["loss"]
        loss.backward()
        return "works" if bool(torch.isfinite(loss)) else f"the loss is {loss.item()}"
    except Exception as error:  # a doctor reports what it finds, whatever it is
        return f"fails: {type(error).__name__}: {error}"
