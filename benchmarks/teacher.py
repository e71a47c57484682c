"""A teacher trained with labels, for studies of distillation on a machine that cannot fetch a pretrained one.

    python benchmarks/teacher.py --data cifar100 --root DIR --out DIR [--epochs N] [--width W]

ResNet-18 by cross-entropy: SGD with Nesterov momentum, one-cycle rate, random crop of the padded image and flip. Writes
OUT/encoder.safetensors, which `representations.teacher.model=OUT` takes, and OUT/teacher.json with the accuracy of its
own classifier on the official test set after the last epoch. A killed run goes on from its last whole epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mvmr import __version__
from mvmr.data.datasets import DATASETS
from mvmr.data.loading import Loader
from mvmr.data.sources import DataConfig, ImageSource, open_source
from mvmr.data.views import ViewMaker, Views
from mvmr.engine.environment import environment
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.weights import EncoderCard, save_encoder

BATCH, PEAK, DECAY = 128, 0.1, 5e-4


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data, size = DATASETS[arguments.data], DATASETS[arguments.data].size
    assert size is not None, "a data set of one image size is needed"
    train, test = (open_source(DataConfig(name=arguments.data, root=arguments.root), split, size=size)
                   for split in ("train", "test"))  # fmt: skip
    views = ViewMaker(Views(recipe="mvmr_cifar", size=size), mean=data.mean, std=data.std, seed=arguments.seed)
    torch.manual_seed(arguments.seed)
    config = EncoderConfig(name="resnet18", stem=arguments.stem, width=arguments.width, zero_init_residual=False)
    encoder, dim = build_encoder(config)
    net = nn.Sequential(encoder, nn.Linear(dim, len(train.classes))).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=PEAK, momentum=0.9, nesterov=True, weight_decay=DECAY)
    loader = Loader(train, batch_size=BATCH, seed=arguments.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=arguments.epochs * len(loader))
    first, seconds = resumed(arguments.out, net, optimizer, schedule)
    for epoch in range(first, arguments.epochs):
        started = time.monotonic()
        loader.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            labels = train.labels[batch.index]
            images = views(batch.images, batch.index, epoch)["global"][0]
            loss = functional.cross_entropy(net(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds += time.monotonic() - started
        print(f"epoch {epoch + 1}/{arguments.epochs} loss {total / len(loader):.3f} {seconds:.0f} s", flush=True)
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                    "epoch": epoch + 1, "seconds": seconds}, arguments.out / "last.part")  # fmt: skip
        (arguments.out / "last.part").replace(arguments.out / "last.ckpt")
    card = EncoderCard(encoder=config, dim=dim, image_size=size, mean=data.mean, std=data.std, method="supervised",
                       data=arguments.data, version=__version__)  # fmt: skip
    save_encoder(arguments.out / "encoder.safetensors", net[0], card)
    record = {
        "data": arguments.data, "epochs": arguments.epochs, "seed": arguments.seed, "encoder": config.model_dump(),
        "parameters": sum(p.numel() for p in encoder.parameters()), "seconds": round(seconds),
        "test_top1": accuracy(net, test, data.mean, data.std), "machine": environment(),
    }  # fmt: skip
    (arguments.out / "teacher.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: record[key] for key in ("parameters", "seconds", "test_top1")}))


def resumed(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, schedule: object) -> tuple[int, float]:
    """The epoch to go on with, and the seconds spent before it."""
    if not (folder / "last.ckpt").exists():
        return 0, 0.0
    state = torch.load(folder / "last.ckpt", weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])  # type: ignore[attr-defined]
    return state["epoch"], state["seconds"]


@torch.no_grad()
def accuracy(net: nn.Module, source: ImageSource, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """Top-1 in percent over a whole split."""
    net.eval()
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    right = 0
    for index in torch.arange(len(source)).split(500):
        images: Tensor = torch.stack([source.read(i) for i in index.tolist()]).float() / 255
        right += int((net((images - shift) / scale).argmax(1) == source.labels[index]).sum())
    return 100.0 * right / len(source)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar100", help="a labelled data set of one image size")
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--stem", default="mvmr", choices=["cifar", "mvmr", "imagenet"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
