"""Attention maps of a vision transformer on image files: the image, the mean over heads, each head.

python benchmarks/attention.py ENCODER IMAGE... --out FILE.png
python benchmarks/attention.py runs/dino_vit_cpu cat.jpg dog.jpg --size 64 --mass 0.6 --out maps.png

ENCODER: a run folder, its encoder.safetensors, or timm:NAME.
"""

from __future__ import annotations

import argparse

import torch

from mvmr.data.decode import UnreadableImage, decode
from mvmr.data.view_ops import plain
from mvmr.evaluation.attention import attention_maps, write_attention
from mvmr.nets.weights import load_encoder
from mvmr.types import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--out", required=True, metavar="FILE.png")
    parser.add_argument("--size", type=int, help="side that images are resized and cut to; the encoder's own if absent")
    parser.add_argument("--mass", type=float, help="show the patches that hold this share of it (paper: 0.6)")
    arguments = parser.parse_args()
    if arguments.mass is not None and not 0 < arguments.mass <= 1:
        parser.error(f"--mass {arguments.mass}: must be above 0 and at most 1")
    try:
        encoder = load_encoder(arguments.encoder)
        size = arguments.size or encoder.card.image_size
        images = torch.stack([plain(decode(path), size) for path in arguments.images])  # [B, 3, size, size]
        maps = attention_maps(encoder, images)
    except (UserError, UnreadableImage) as error:
        parser.error(str(error))
    file = write_attention(arguments.out, images, maps, mass=arguments.mass)
    _, heads, height, width = maps.shape
    print(f"{file}: {len(images)} images, {heads} heads, {height} x {width} patches each")
    print(f"attention on patches, of 1 in all: {maps.sum((-2, -1)).mean():.3f} on average")


if __name__ == "__main__":
    main()
