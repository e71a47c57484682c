"""mvmr pictures: a sheet of what an encoder sees."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """What a sheet shows."""

    cam = "cam"
    attention = "attention"
    neighbours = "neighbours"


def pictures(
    encoder: Annotated[str, typer.Argument(help="Run folder, encoder.safetensors, timm:NAME or torchvision:NAME.")],
    kind: Annotated[
        Kind,
        typer.Argument(help="cam: where a score comes from; attention: where a ViT looks; neighbours: what is alike."),
    ],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    data: Annotated[str | None, typer.Option(help="Data set (`mvmr list data`); by default the run's own.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    images: Annotated[int, typer.Option(help="Test images, drawn at random.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of which ones.", min=0)] = 0,
    k: Annotated[int, typer.Option(help="neighbours: how many, from the training split.", min=1)] = 8,
    layer: Annotated[str, typer.Option(help="cam: the module whose maps are weighted.")] = "layer4",
    head: Annotated[Path | None, typer.Option(help="cam: folder of a head.safetensors, whose class is shown.")] = None,
) -> None:
    """Write a sheet of pictures of an encoder; without --head, cam shows the similarity to another image."""
    import torch

    from mvmr.api import data_config, device, open_encoder
    from mvmr.cli.screen import say
    from mvmr.data.loading import plain_batches
    from mvmr.data.sources import open_source, subset
    from mvmr.errors import UserError
    from mvmr.evaluation.attention import attention_maps, write_attention
    from mvmr.evaluation.cam import cam_sheet
    from mvmr.evaluation.head import load_head
    from mvmr.evaluation.neighbours import neighbour_sheet
    from mvmr.evaluation.workplace import Workplace
    from mvmr.ops.random import permutation

    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name the PNG to write")
    config = data_config(encoder, data, root)
    loaded = open_encoder(encoder, config.name)
    test = open_source(config, "test", size=loaded.card.image_size)
    order = permutation(seed, 0, len(test))
    if kind is Kind.neighbours:
        train = open_source(config, "train", size=loaded.card.image_size)
        place = Workplace(device(), config.workers)
        neighbour_sheet(loaded, train, out, positions=order[:images], queries=test, k=k, workplace=place)
    elif kind is Kind.attention:
        shown = [image for _, image in plain_batches(subset(test, order[:images]), batch_size=images,
                                                     size=loaded.card.image_size)]  # fmt: skip
        write_attention(out, torch.cat(shown), attention_maps(loaded, torch.cat(shown)))
    elif head is not None:
        cam_sheet(loaded, test, order[:images], out, head=load_head(head), layer=layer)
    else:
        cam_sheet(loaded, test, order[:images], out, like=order[-images:], layer=layer)
    say(f"{out}: written")
