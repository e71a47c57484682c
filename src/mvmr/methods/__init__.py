"""The methods, one file each."""

from __future__ import annotations

from mvmr.methods.barlow_twins import BarlowTwins
from mvmr.methods.base import Method, MethodConfig
from mvmr.methods.byol import BYOL
from mvmr.methods.dino import DINO
from mvmr.methods.moco import MoCo
from mvmr.methods.moco_v3 import MoCoV3
from mvmr.methods.mvmr import MVMR
from mvmr.methods.simclr import SimCLR
from mvmr.methods.simsiam import SimSiam
from mvmr.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "mvmr": MVMR,
    "simclr": SimCLR,
    "moco_v3": MoCoV3,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "dino": DINO,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
}

__all__ = [
    "BYOL",
    "DINO",
    "METHODS",
    "MVMR",
    "BarlowTwins",
    "Method",
    "MethodConfig",
    "MoCo",
    "MoCoV3",
    "SimCLR",
    "SimSiam",
    "VICReg",
]
