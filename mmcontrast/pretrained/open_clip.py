"""open_clip's models: CLIP, CoCa, SigLIP and others by an architecture's name, from the hub, or from a folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.modalities.image import without_palette_alpha
from mmcontrast.model import ContrastiveModel
from mmcontrast.pretrained.base import LibraryTower, assembled
from mmcontrast.pretrained.modalities import LibraryImages, LibraryTexts
from mmcontrast.towers.open_clip import quick_gelu


def is_architecture(name: str) -> bool:
    """Whether it is "ViT-B-32" or "ViT-B-32/laion2b_s34b_b79k"."""
    import open_clip

    return name.partition("/")[0] in open_clip.list_models()


def open_open_clip(name: str, pretrained: str | None) -> ContrastiveModel:
    """Fields image and text.

    Args:
        name: an architecture, "ARCHITECTURE/TAG", "hf-hub:org/name", or "local-dir:FOLDER".
        pretrained: of an architecture: a tag of open_clip's, or a checkpoint's file.

    Raises:
        UserError: for an architecture without weights, or an unknown tag.
        others: as open_clip does.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if ":" not in name:
        name, _, tag = name.partition("/")
        pretrained = pretrained or tag or None
        if not is_architecture(name):
            raise UserError(f"open_clip has no model {name!r}; {nearest(name, open_clip.list_models())[:200]}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
            raise UserError(
                f"open_clip's {name} with pretrained={pretrained!r}: no such file, and no such tag: it takes a checkpoint's"
                f" file, or a tag ({nearest(pretrained or '', tags)[:200] if tags else 'there is none'})"
            )
    elif pretrained:
        raise UserError(f"{name} has its own weights: leave out pretrained={pretrained!r}")
    quick = quick_gelu(name, pretrained)
    whole = open_clip.create_model(name, pretrained, force_custom_text=True, require_pretrained=True, force_quick_gelu=quick)
    preprocess = PreprocessCfg(**whole.visual.preprocess_cfg)
    prepare, augmented = (partial(_pixels, image_transform_v2(preprocess, is_train=train)) for train in (False, True))
    size = preprocess.size if isinstance(preprocess.size, int) else max(preprocess.size)
    tokenizer = open_clip.get_tokenizer(name)
    modalities = {
        "image": LibraryImages(prepare, size, None, augmented),
        "text": LibraryTexts(partial(_tokens, tokenizer), tokenizer.context_length),
    }
    towers = {"image": LibraryTower(whole.visual), "text": LibraryTower(whole.text)}
    bias = None if whole.logit_bias is None else whole.logit_bias.item()
    return assembled(modalities, towers, whole.logit_scale.exp().item(), bias)


def _pixels(transform: Callable[[Image.Image], Tensor], picture: Image.Image) -> Tensor:
    """What open_clip makes of a picture in any mode: it scales it before it converts it to RGB."""
    return transform(without_palette_alpha(picture))


def _tokens(tokenizer: Any, text: str) -> Tensor:
    """Of the whole context's length, as open_clip pads them."""
    return tokenizer([text])[0]
