"""Where in a network each parameter stands, and the learning rates that fall with the distance from the output."""

from __future__ import annotations

import re

from torch import nn

from mvmr.errors import UserError

COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a network that it wraps."""

RESNET = re.compile(r"^(?:(?P<stem>conv1|bn1)|layer(?P<stage>[1-4])\.(?P<block>\d+)|(?P<last>fc))\.")
# Position and class tokens are added to the embedded patches; `norm_pre` (CLIP's) comes before the first block.
VIT = re.compile(
    r"^(?:(?P<stem>patch_embed|(?:cls|dist|reg|mask)_token|pos_embed(?:_\w+)?|norm_pre)\b"
    r"|blocks\.(?P<block>\d+)\."
    r"|(?P<last>norm|fc_norm|attn_pool|rel_pos_bias|head|head_dist)\b)"
)


def layer_depths(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """({parameter's name: depth in 0 .. L - 1}, L): 0 is next to the image, L - 1 next to the output.

    ViTs: 0 for the embedding of patches, tokens and positions, i + 1 for block i, L - 1 for the final norm (BEiT's
    code, Bao et al., ICLR 2022; also MAE, He et al., CVPR 2022, A.1). ResNets: 0 for the stem, then one depth a
    residual block. Other models of timm: the groups of their own `group_matcher`. Names are those of `backbone`,
    compiled or not.
    Raises UserError for a network of none of these kinds.
    """
    plain = getattr(backbone, COMPILED.rstrip("."), backbone)
    own = {name.replace(COMPILED, ""): name for name, _ in plain.named_parameters()}
    depths = _resnet(list(own)) or _vit(list(own)) or _of_timm(plain, own)
    if depths is None:
        raise UserError(
            f"optimizer.layer_decay needs to know the order of the layers, and {type(plain).__name__} is no ResNet, "
            "vision transformer or other model of timm: leave optimizer.layer_decay out (null), or take such an encoder"
        )
    by_parameter = {id(parameter): depths[name.replace(COMPILED, "")] for name, parameter in plain.named_parameters()}
    named = {name: by_parameter[id(parameter)] for name, parameter in backbone.named_parameters()}
    return named, 1 + max(named.values())


def layer_scales(backbone: nn.Module, decay: float) -> dict[str, float]:
    """{parameter's name: decay ** (L - 1 - depth)}, what each rate is multiplied by; heads outside are at 1.

    As in BEiT's and MAE's code, the final norm is at 1 like the head, the last block at `decay`, and the embedding of
    a ViT of n blocks at decay ** (n + 1). decay in (0, 1]. Raises UserError as `layer_depths`.
    """
    depths, count = layer_depths(backbone)
    return {name: decay ** (count - 1 - depth) for name, depth in depths.items()}


def _resnet(names: list[str]) -> dict[str, int] | None:
    found = {name: RESNET.match(name) for name in names}
    blocks = sorted({(int(m["stage"]), int(m["block"])) for m in found.values() if m and m["stage"]})
    if not blocks:
        return None
    order = {block: depth for depth, block in enumerate(blocks, start=1)}
    depths = {}
    for name, m in found.items():
        if m is None:
            return None
        if m["stage"]:
            depths[name] = order[int(m["stage"]), int(m["block"])]
        else:
            depths[name] = 0 if m["stem"] else len(blocks)
    return depths


def _vit(names: list[str]) -> dict[str, int] | None:
    found = {name: VIT.match(name) for name in names}
    blocks = {int(m["block"]) for m in found.values() if m and m["block"]}
    embedded = any(m and m["stem"] == "patch_embed" for m in found.values())
    if not blocks or not embedded:
        return None
    depths = {}
    for name, m in found.items():
        if m is None:  # a transformer of another build, such as one with several stages
            return None
        if m["block"]:
            depths[name] = int(m["block"]) + 1
        else:
            depths[name] = 0 if m["stem"] else max(blocks) + 2
    return depths


def _of_timm(backbone: nn.Module, own: dict[str, str]) -> dict[str, int] | None:
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        return None
    from timm.models import group_parameters

    groups = group_parameters(backbone, matcher(coarse=False), reverse=True)
    return {plain: groups[name] for plain, name in own.items()}
