"""Any timm model as a tower: pictures, or spectrograms as pictures of one channel."""

from typing import Any

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.library_messages import library_messages
from mmcontrast.towers.base import Tower
from mmcontrast.trust import library_code_refused


class TimmTower(Tower):
    """The pooled features of a timm model, its classifier removed.

    Args:
        model: a name of timm's, like "vit_base_patch16_224" or "resnet50".
        pretrained: with timm's weights, from its hub.
        **options: anything `timm.create_model` takes for that model: in_chans, img_size, drop_path_rate, channels, …
    """

    def __init__(self, model: str, pretrained: bool = False, **options: Any) -> None:
        super().__init__()
        import timm

        if not timm.is_model(model.split(".")[0]):
            raise UserError(f"timm has no model {model!r}; {nearest(model, timm.list_models())[:200]}")
        try:
            with library_messages(f"timm tower {model}"), library_code_refused(model):
                self.network = timm.create_model(model, pretrained=pretrained, num_classes=0, **options)
        except TypeError as error:
            raise UserError(f"timm's {model!r} refuses an option: {error}") from error
        self.width = getattr(self.network, "head_hidden_size", self.network.num_features)
