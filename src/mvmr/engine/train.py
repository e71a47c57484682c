"""train: from a Run to a run folder with a loadable encoder."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy

from mvmr import __version__
from mvmr.config import EngineConfig, OnlineConfig, Run, load
from mvmr.data.batches import BatchMaker
from mvmr.data.datasets import DATASETS
from mvmr.data.files import write_unreadable
from mvmr.data.module import SHARE, TrainingData
from mvmr.data.sources import ImageSource, Progress, open_source
from mvmr.data.views import ViewMaker
from mvmr.engine.checkpoints import LAST, Checkpoints
from mvmr.engine.environment import environment
from mvmr.engine.metrics import Metrics, MetricsFile
from mvmr.engine.module import Adapter
from mvmr.engine.online import Online
from mvmr.engine.progress import ProgressBar, counting
from mvmr.errors import RunError, UserError
from mvmr.methods import METHODS, Method
from mvmr.nets.encoders import build_encoder
from mvmr.nets.weights import ENCODER_FILE, EncoderCard, save_encoder
from mvmr.representations import build_representations
from mvmr.representations.cache import CacheRequest, cache_representations
from mvmr.representations.widths import width_in_batches

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
# What changes where a run is computed or how it is watched, not what it learns: a resumed run may change it.
FREE_ON_RESUME = {
    "name",
    *(f"data.{key}" for key in ("root", "workers", "cache", "download")),
    *(f"engine.{key}" for key in ("accelerator", "devices", "nodes", "compile", "channels_last", "deterministic")),
    *(f"engine.{key}" for key in ("checkpoint_every_steps", "keep_every_epochs", "log_every_steps", "tensorboard")),
    *(f"online.{key}" for key in OnlineConfig.model_fields),
}


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before any engine."""

    method: Method
    source: ImageSource
    maker: BatchMaker
    card: EncoderCard


def train(
    run: Run, out: Path, *, resume: bool = False, quiet: bool = False, teachers: Mapping[str, Any] | None = None
) -> Path:
    """Train `run` into the folder `out`; returns the folder. teachers: those of `model: python`, by name.

    Raises UserError for settings, data or a folder that do not fit, RunError when the loss is not finite or the disk is
    full.
    """
    _claim(out, run, resume=resume)
    with counting(quiet=quiet or not is_first_rank()) as progress:
        parts = build(run, progress=progress, teachers=teachers)
    trainer, adapter, data = assemble(run, parts, out, quiet=quiet)
    if is_first_rank():
        _write_start(out, run, parts.source)
    _warn_of_settings_without_effect(run)
    checkpoint = out / "checkpoints" / LAST
    resumed = checkpoint if resume and checkpoint.exists() else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.", message="|".join(NOISE))
        try:
            trainer.fit(adapter, datamodule=data, ckpt_path=resumed, weights_only=True)
        except SystemExit:  # how Lightning ends a fit that was interrupted from the keyboard
            if not trainer.interrupted:
                raise
            raise RunError(
                f"interrupted at step {trainer.global_step}; continue with `mvmr train {out / CONFIG} --resume`"
            ) from None
    if trainer.is_global_zero:
        save_encoder(out / ENCODER_FILE, adapter.method.exported(), parts.card)
        for name, other in adapter.method.also_exported().items():
            card = parts.card.model_copy(update={"encoder": other.encoder, "dim": other.dim})
            save_encoder(out / f"{name}.safetensors", other.net, card)
    return out


def is_first_rank() -> bool:
    """Whether this process is the one that writes; known before the ranks have met."""
    return getattr(rank_zero_only, "rank", 0) == 0


def build(run: Run, *, progress: Progress | None = None, teachers: Mapping[str, Any] | None = None) -> Parts:
    """The networks under the run's seed, the images, and the maker of batches."""
    mean, std = run.data.mean, run.data.std
    assert mean is not None  # a Run fills them
    assert std is not None
    source = open_source(run.data, "pretrain", size=run.views.size, seed=run.seed, progress=progress)
    views = ViewMaker(run.views, mean=mean, std=std, seed=run.seed)
    representations = build_representations(
        run.representations, mean=mean, std=std, seed=run.seed, teachers=teachers or {}
    )
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        encoder, dim = build_encoder(run.encoder, side=run.views.size, local_sides=run.views.sides())
        width = partial(width_in_batches, representations, run.cache, size=run.views.size, device=_device(run.engine))
        config = run.method.fitted(width, (run.views.size, *run.views.sides()))
        method = METHODS[run.method.name](encoder, dim, config)
        method.prepare(len(source))
    card = EncoderCard(
        encoder=run.encoder, dim=dim, image_size=run.views.size, mean=mean, std=std,
        method=run.method.name, data=run.data.name, version=__version__,
    )  # fmt: skip
    return Parts(method, source, BatchMaker(views, representations), card)


def assemble(run: Run, parts: Parts, out: Path, *, quiet: bool) -> tuple[Trainer, Adapter, TrainingData]:
    """Lightning's trainer and the two modules that it runs."""
    data = TrainingData(
        parts.source, parts.maker, batch_size=run.data.batch_size, seed=run.seed, workers=run.data.workers
    )
    batches = len(data.loader())
    steps_per_epoch = -(-batches // run.engine.accumulate)
    adapter = Adapter(parts.method, run, steps_per_epoch=steps_per_epoch, source=parts.source, maker=parts.maker)
    data.weights = adapter.sampling_weights
    metrics = Metrics(
        MetricsFile(out, tensorboard=run.engine.tensorboard),
        every_steps=run.engine.log_every_steps, batch_size=run.data.batch_size,
    )  # fmt: skip
    online = Online(
        run.online, metrics, parts.card,
        source=parts.source, maker=parts.maker, labelled=_labelled(run), folder=out,
    )  # fmt: skip
    checkpoints = Checkpoints(
        out / "checkpoints",
        parts.card,
        every_steps=run.engine.checkpoint_every_steps,
        keep_every_epochs=run.engine.keep_every_epochs,
    )
    # The order matters: a checkpoint comes after everything that its epoch writes to metrics.jsonl.
    callbacks = [metrics, ProgressBar(metrics, quiet=quiet), online, checkpoints]
    trainer = trainer_of(run, callbacks)
    data.prepare = partial(keep_representations, run, parts, trainer, quiet=quiet)
    return trainer, adapter, data


def keep_representations(run: Run, parts: Parts, trainer: Trainer, *, quiet: bool) -> None:
    """Fill the cache of representations, or find it filled; from now on batches look them up."""
    if not run.cache.enabled:
        return
    assert run.data.mean is not None
    assert run.data.std is not None
    device = trainer.strategy.root_device
    with counting(quiet=quiet or not trainer.is_global_zero) as progress:
        request = CacheRequest(
            size=run.views.size, mean=run.data.mean, std=run.data.std, folder=run.data.cache, device=device,
            workers=run.data.workers, rank=trainer.global_rank, world_size=trainer.world_size,
            barrier=trainer.strategy.barrier, progress=progress,
        )  # fmt: skip
        kept = cache_representations(parts.source, parts.maker.representations, run.cache, request=request)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(rows.nbytes for rows in kept.values()) < SHARE * free:
            kept = {name: rows.resident(device) for name, rows in kept.items()}
    parts.maker.kept = {name: rows.rows for name, rows in kept.items()}


def trainer_of(run: Run, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer for the run's engine section."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    engine = run.engine
    gpu = _device(engine).type == "cuda"
    devices = engine.devices if engine.devices != "auto" else (torch.cuda.device_count() if gpu else 1)
    if engine.accelerator == "gpu" and not gpu:
        raise UserError("engine.accelerator is gpu, but no CUDA GPU is visible; use engine.accelerator=cpu or auto")
    many = devices * engine.nodes > 1
    # Buffers stay as each rank has them: with synchronised batch norm and gathered losses they are equal anyway.
    strategy: Any = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True) if many else "auto"
    return Trainer(
        accelerator=engine.accelerator, devices=devices, num_nodes=engine.nodes, strategy=strategy,
        precision=_precision(engine.precision, gpu=gpu),  # type: ignore[arg-type]
        max_epochs=run.schedule.epochs, accumulate_grad_batches=engine.accumulate,
        gradient_clip_val=engine.clip_norm, deterministic=engine.deterministic or None,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, num_sanity_val_steps=0,
    )  # fmt: skip


def _device(engine: EngineConfig) -> torch.device:
    """Where this process will compute, known before there is a trainer that says so."""
    if torch.cuda.is_available() and engine.accelerator in ("auto", "gpu"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    mps = engine.accelerator in ("auto", "mps") and torch.backends.mps.is_available()
    return torch.device("mps" if mps else "cpu")


def _precision(wanted: str, *, gpu: bool) -> str:
    if wanted == "auto":
        wanted = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16") if gpu else "32"
    return {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[wanted]


def _labelled(run: Run) -> tuple[ImageSource, ImageSource] | None:
    if run.online.knn_every_epochs == 0 or not DATASETS[run.data.name].labelled:
        return None
    try:
        train = open_source(run.data, "train", size=run.views.size, seed=run.seed)
        test = open_source(run.data, "test", size=run.views.size, seed=run.seed)
    except UserError as error:  # pretraining does not need labelled splits
        warnings.warn(f"online kNN is off: {error}", stacklevel=2)
        return None
    if train.labels is not None and train.labels.ndim > 1:  # several labels an image: not for nearest neighbours
        return None
    return train, test


def _claim(out: Path, run: Run, *, resume: bool) -> None:
    """Refuse a folder that holds another run, or a resume that would change what is learned."""
    if not is_first_rank():
        return
    written = out / CONFIG
    if not resume:
        if written.exists():
            raise UserError(f"{out} already holds a run: continue it with --resume, or give another folder with --out")
        return
    if not written.exists():
        raise UserError(f"{out} holds no run to resume ({CONFIG} is missing): leave out --resume, or give --out")
    # Read as a run, so that a setting that came with a newer version counts as its default.
    before, now = load(written).resolved(), run.resolved()
    changed = sorted(_differences(before, now) - FREE_ON_RESUME)
    if changed:
        raise UserError(
            f"{written}: the run was started with other values of {', '.join(changed)}; "
            f"resume with `mvmr train {written} --resume`, or start anew with --out"
        )


def _differences(before: Any, now: Any, prefix: str = "") -> set[str]:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return set() if before == now else {prefix}
    return {
        changed
        for key in set(before) | set(now)
        for changed in _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
    }


def _write_start(out: Path, run: Run, source: ImageSource) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(yaml.safe_dump(run.resolved(), sort_keys=False))
    (out / ENVIRONMENT).write_text(json.dumps(environment(), indent=2) + "\n")
    write_unreadable(out / "unreadable.txt", source.unreadable)
    if source.unreadable:
        warnings.warn(
            f"{len(source.unreadable)} unreadable files are left out; {out / 'unreadable.txt'} lists them", stacklevel=2
        )


def _warn_of_settings_without_effect(run: Run) -> None:
    for remark in run.method.remarks(run.views.counts(), run.representations):
        warnings.warn(remark, stacklevel=2)
    base = METHODS[run.method.name].base_optimizer
    if run.optimizer.lr == "auto" and run.optimizer.name.removesuffix("w") != base.removesuffix("w"):
        warnings.warn(
            f"optimizer.lr is auto: {run.peak_lr:g}, which {run.method.name} has for {base}; it is not made for "
            f"optimizer.name={run.optimizer.name}: set optimizer.lr",
            stacklevel=2,
        )
    if run.engine.accumulate > 1:
        warnings.warn(
            "engine.accumulate enlarges neither the batch that the loss sees nor that of batch norm", stacklevel=2
        )


# What Lightning says of choices made here on purpose.
NOISE = (
    ".*does not have many workers.*",
    ".*no .val_dataloader. was found.*",
    ".*ModelCheckpoint.*",
    ".*num_training_batches.*smaller than the logging interval.*",
    ".*Checkpoint directory.*",
    ".*in eval mode at the start of training.*",  # frozen teachers
)
