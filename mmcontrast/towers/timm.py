"""Any timm model as a tower: pictures, or spectrograms as pictures of one channel."""

from pathlib import Path
from typing import Any

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.library_messages import library_messages
from mmcontrast.towers.base import Tower, library_errors
from mmcontrast.trust import library_code_refused


class TimmTower(Tower):
    """The pooled features of a timm model, its classifier removed.

    Args:
        model: a name of timm's, like "vit_base_patch16_224" or "resnet50".
        pretrained: with timm's weights, from its hub; or a checkpoint's file.
        **options: anything `timm.create_model` takes for that model: in_chans, img_size, drop_path_rate, channels, …
    """

    def __init__(self, model: str, pretrained: bool | str = False, **options: Any) -> None:
        super().__init__()
        import timm

        if not timm.is_model(model.split(".")[0]):
            raise UserError(f"timm has no model {model!r}; {nearest(model, timm.list_models())[:200]}")
        what = f"timm's {model!r} refuses an option, or has no weights"
        refused = library_code_refused(model, runs_transformers=False)
        with library_errors(what), library_messages(f"timm tower {model}"), refused:
            if isinstance(pretrained, str):
                options = from_file(model, pretrained) | options
            self.network = timm.create_model(model, pretrained=bool(pretrained), **({"num_classes": 0} | options))
            if isinstance(pretrained, str):
                self.network.reset_classifier(0)
        self.width = getattr(self.network, "head_hidden_size", self.network.num_features)


def from_file(model: str, file: str) -> dict[str, Any]:
    """Return what `timm.create_model` takes to load a checkpoint's file strictly: with as many classes as it has.

    Raises:
        FileNotFoundError: if there is no such file.
        others: as timm does.
    """
    import timm

    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}")
    config = timm.get_pretrained_cfg(model)
    names = config.classifier if config else None
    head = names if isinstance(names, str) else next(iter(names or ()), "")
    weight = timm.models.load_state_dict(file, weights_only=True).get(f"{head}.weight")
    classes = 0 if weight is None else len(weight)
    return {"num_classes": classes, "pretrained_cfg_overlay": {"file": file, "num_classes": classes}}
