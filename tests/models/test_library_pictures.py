"""Pictures of every mode reach a library's model, and a run that starts from its weights, as its preprocessing gives them."""

import io
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import mmcontrast
from mmcontrast.embedder import Embedder
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.models import make_modalities, make_model
from mmcontrast.models.open_clip import _pixels as open_clips
from mmcontrast.models.options import FieldOptions, ModelOptions
from mmcontrast.models.processors import prepare_pixels as transformers_pixels
from tests.modalities.picture_files import files

FILES = files()
PROCESSORS = {
    "CLIP": hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "SigLIP": hf.SiglipImageProcessor(size={"height": 32, "width": 32}),
    "DINOv2": hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
}


def test_open_clip_scales_before_it_converts():
    for resize_mode in ("shortest", "longest", "squash"):
        theirs = image_transform_v2(PreprocessCfg(size=32, resize_mode=resize_mode), is_train=False)
        modality = LibraryImages(partial(open_clips, theirs), 32, None)
        for name, data in FILES.items():
            mine = modality.transform(modality.decode(data), False)
            assert torch.equal(mine, theirs(Image.open(io.BytesIO(data)))), name
            mine = modality.as_rgb().transform(modality.as_rgb().decode(data), False)
            assert torch.equal(mine, theirs(Image.open(io.BytesIO(data)).convert("RGB"))), name


def test_timm_converts_first():
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({"input_size": (3, 32, 32)}), is_training=False)
    modality = LibraryImages(theirs, 32, "RGB")
    for name, data in FILES.items():
        mine = modality.transform(modality.decode(data), False)
        assert torch.equal(mine, theirs(Image.open(io.BytesIO(data)).convert("RGB"))), name


@pytest.mark.parametrize("kind", PROCESSORS)
def test_transformers_converts_in_its_own_way(kind):
    """Over white, since version 5."""
    modality = LibraryImages(partial(transformers_pixels, PROCESSORS[kind]), 32, None)
    for name, data in FILES.items():
        mine = modality.transform(modality.decode(data), False)
        theirs = PROCESSORS[kind](images=Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(mine, theirs), name


def test_a_run_that_starts_from_weights_sees_what_the_library_saw(architecture, tmp_path):
    preprocess = PreprocessCfg(size=32)
    picture = {"type": "image", "size": 32, "mean": preprocess.mean, "std": preprocess.std}
    tower = {"type": "open_clip", "model": "tiny-clip", "part": "image", "pretrained": str(tmp_path / "epoch_1.pt")}

    def tuned(picture, tower):
        fields = {"image": FieldOptions(modality=picture, tower="image")}
        return make_model(fields, {"image": tower}, ModelOptions(embed_dim=16, projection="none"), 0)

    model, library = tuned(picture, tower), mmcontrast.load("tiny-clip", pretrained=tmp_path / "epoch_1.pt")
    values = list(FILES.values())
    ours, theirs = Embedder(model, "run", "cpu").embed(images=values), library.embed(images=values)
    assert F.cosine_similarity(ours, theirs).min() > 0.999
    white = Embedder(tuned(picture | {"background": "white"}, tower), "run", "cpu").embed(images=values)
    assert F.cosine_similarity(white, theirs).min() < 0.99
    backgrounds = {
        "open_clip": tower,
        "drop": {"type": "timm", "model": "test_vit", "pretrained": True},
        "white": {"type": "timm", "model": "test_vit"},
    }
    for expected, spec in backgrounds.items():
        fields = {"image": FieldOptions(modality={"type": "image", "size": 32}, tower="t")}
        assert make_modalities(fields, {"t": spec})["image"].background == expected
