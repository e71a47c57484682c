"""The methods, one file each."""

from __future__ import annotations

from mvmr.methods.barlow_twins import BarlowTwins
from mvmr.methods.base import Method, MethodConfig
from mvmr.methods.byol import BYOL
from mvmr.methods.cluster_fit import ClusterFit
from mvmr.methods.compress import CompRess
from mvmr.methods.crd import CRD
from mvmr.methods.deepcluster import DeepCluster
from mvmr.methods.deepcluster_v2 import DeepClusterV2
from mvmr.methods.deepercluster import DeeperCluster
from mvmr.methods.dino import DINO
from mvmr.methods.moco import MoCo
from mvmr.methods.moco_v3 import MoCoV3
from mvmr.methods.mvmr import MVMR
from mvmr.methods.oss import OSS
from mvmr.methods.regression import Regression
from mvmr.methods.seed import SEED
from mvmr.methods.self_label import SelfLabel
from mvmr.methods.simclr import SimCLR
from mvmr.methods.simsiam import SimSiam
from mvmr.methods.swav import SwAV
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
    "swav": SwAV,
    "oss": OSS,
    "deepcluster": DeepCluster,
    "deepcluster_v2": DeepClusterV2,
    "deepercluster": DeeperCluster,
    "self_label": SelfLabel,
    "seed": SEED,
    "compress": CompRess,
    "crd": CRD,
    "cluster_fit": ClusterFit,
    "regression": Regression,
}

__all__ = [
    "BYOL",
    "CRD",
    "DINO",
    "METHODS",
    "MVMR",
    "OSS",
    "SEED",
    "BarlowTwins",
    "ClusterFit",
    "CompRess",
    "DeepCluster",
    "DeepClusterV2",
    "DeeperCluster",
    "Method",
    "MethodConfig",
    "MoCo",
    "MoCoV3",
    "Regression",
    "SelfLabel",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
]
