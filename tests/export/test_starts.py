"""A field beside a model of a library's: the library's own fields go back, as if nothing had been added."""

import pytest
import torch

import mmcontrast
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.export import huggingface, open_clip, safetensors
from mmcontrast.export.folder import write_export
from mmcontrast.export.samples import made_samples
from mmcontrast.modalities import VectorModality
from mmcontrast.models import ContrastiveModel, LinearTower, Origin
from tests.models.open_clip_models import save
from tests.models.samples import TEXTS, pictures
from tests.models.transformers_models import DUAL, saved


def extended(whole):
    """The whole with a field `sensor` beside its own, as training from a start makes it."""
    modalities = {**{field: whole.modality(field) for field in whole.modalities}, "sensor": VectorModality(4)}
    towers, tower_of = {**whole.towers, "sensor": LinearTower(4, 6)}, whole.tower_of | {"sensor": "sensor"}
    kinds = dict.fromkeys(whole.towers, "none") | {"sensor": "linear"}
    bias = None if whole.logit_bias is None else whole.logit_bias.item()
    model = ContrastiveModel(modalities, towers, tower_of, whole.embed_dim, kinds, 5.0, bias)
    model.origin = Origin(
        "mmcontrast", config={"fields": {}, "towers": {}, "model": {}}, starts=dict.fromkeys(whole.towers, whole.origin)
    )
    return Embedder(model.eval(), "extended", "cpu")


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_the_start_of_a_model_goes_back(library, tmp_path):
    source = save(tmp_path / "clip", "coca") if library == "open_clip" else saved(DUAL["siglip"](), tmp_path / "siglip")
    embedder, names = extended(mmcontrast.load(source).model), ["image", "text"]
    writer = open_clip if library == "open_clip" else huggingface
    for kind, module in ((library, writer), ("safetensors", safetensors)):
        out = tmp_path / kind
        kind = "huggingface" if kind == "transformers" else kind
        write_export(embedder, out, kind, module, names, made_samples(embedder.model, names))
        again = mmcontrast.load(out)
        files = pictures(tmp_path) if not (tmp_path / "pictures").exists() else sorted((tmp_path / "pictures").iterdir())
        assert torch.equal(again.embed(images=files), embedder.embed(images=files))
        assert torch.equal(again.embed(texts=TEXTS), embedder.embed(texts=TEXTS))
        assert again.model.log_logit_scale.exp().item() == pytest.approx(5.0)
    every = [*names, "sensor"]
    samples = made_samples(embedder.model, every)
    with pytest.raises(UserError, match="--fields image,text"):
        write_export(embedder, tmp_path / "all", "safetensors", safetensors, every, samples)
