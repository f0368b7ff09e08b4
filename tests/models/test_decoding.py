"""`model.start.decoding`: our own path gives a library's pixels in training, and evaluation is as the config says."""

import io
from functools import partial

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import mmcontrast
from mmcontrast.config import load_config
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.export.folder import export_model
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.models import open_clip as open_clips
from mmcontrast.models import processors
from mmcontrast.models import timm as timms
from mmcontrast.models.decoding import our_path
from mmcontrast.runs import make_run_context, model_of
from mmcontrast.training.cost import make_values
from mmcontrast.training.loop import train
from tests.models.starts import embedded, start_of, write_pairs, write_run


def of_open_clip(**options):
    config = PreprocessCfg(**options)
    prepare = partial(open_clips._pixels, image_transform_v2(config, is_train=False))
    return LibraryImages(prepare, 32, None, as_ours=open_clips.as_ours(config))


def of_timm(**options):
    data = timm.data.resolve_data_config(options)
    prepare, augmented = (timm.data.create_transform(**data, is_training=training) for training in (False, True))
    mode = {1: "L", 3: "RGB"}[data["input_size"][0]]
    return LibraryImages(prepare, 32, mode, augmented, timms.as_ours(data, augmented))


def of_transformers(processor):
    prepare = partial(processors.prepare_pixels, processor)
    mode = None if getattr(processor, "do_convert_rgb", False) else "RGB"
    return LibraryImages(prepare, 32, mode, as_ours=processors.as_ours(processor, prepare))


SIDE = {"height": 32, "width": 32}
SQUARE, LARGER = {"input_size": (3, 32, 32)}, {"size": {"shortest_edge": 36}, "crop_size": SIDE}
SAME = {
    "open_clip": lambda: of_open_clip(size=32),
    "open_clip, bilinear": lambda: of_open_clip(size=(32, 32), interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)),
    "open_clip, squash": lambda: of_open_clip(size=32, resize_mode="squash", interpolation="random"),
    "timm": lambda: of_timm(**SQUARE, crop_pct=0.9),
    "timm, bilinear": lambda: of_timm(**SQUARE, interpolation="bilinear", crop_pct=1.0),
    "timm, squash": lambda: of_timm(**SQUARE, crop_mode="squash", crop_pct=0.95),
    "timm, grey": lambda: of_timm(input_size=(1, 32, 32), mean=(0.4,), std=(0.3,)),
    "CLIP": lambda: of_transformers(hf.CLIPImageProcessor(**LARGER)),
    "not normalised": lambda: of_transformers(hf.CLIPImageProcessor(**LARGER, do_normalize=False)),
    "SigLIP": lambda: of_transformers(hf.SiglipImageProcessor(size=SIDE)),
    "ViT": lambda: of_transformers(hf.ViTImageProcessor(size=SIDE)),
    "DINOv2": lambda: of_transformers(hf.BitImageProcessor(**LARGER)),
}
OTHERWISE = {
    "resize_mode longest": lambda: of_open_clip(size=32, resize_mode="longest"),
    r"pictures of \(32, 48\) are no squares": lambda: of_open_clip(size=(32, 48)),
    "pictures of 32×48 are no squares": lambda: of_timm(input_size=(3, 32, 48)),
    "interpolation lanczos": lambda: of_timm(**SQUARE, interpolation="lanczos"),
    "crop_mode border": lambda: of_timm(**SQUARE, crop_mode="border"),
    "mean=.*: it must be 1 numbers": lambda: of_timm(input_size=(1, 32, 32)),
    "a Siglip2ImageProcessor that scales to nothing": lambda: of_transformers(hf.Siglip2ImageProcessor()),
    "of 255 levels from ours": lambda: of_transformers(hf.ConvNextImageProcessor(size={"shortest_edge": 32})),
    "up to .* of 255 levels": lambda: of_transformers(hf.CLIPImageProcessor(**LARGER, rescale_factor=1 / 127.5)),
    "resample 0": lambda: of_transformers(hf.ViTImageProcessor(size=SIDE, resample=0)),
    "a ViTImageProcessor that scales to": lambda: of_transformers(hf.ViTImageProcessor(do_resize=False)),
}


def photograph(width, height):
    """A PNG of colours that change smoothly, and of some that are hidden."""
    noise = np.random.default_rng(width).integers(0, 256, (height // 6 + 2, width // 6 + 2, 4), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise, "RGBA").resize((width, height), Image.Resampling.BICUBIC).save(target, "PNG")
    return target.getvalue()


@pytest.mark.parametrize("kind", SAME)
def test_our_path_gives_the_librarys_pixels(kind):
    library = SAME[kind]()
    ours, levels = our_path(library), 255 * torch.tensor(library.as_ours["std"]).view(-1, 1, 1)
    for picture in (photograph(90, 61), photograph(45, 120), photograph(20, 25)):
        theirs = library.transform(library.decode(picture), False)
        mine = ours(ours.collate([ours.transform(ours.decode(picture), False)]))[0]
        apart = ((theirs - mine) * levels).abs()
        assert apart.max() < 12 and apart.mean() < 0.7  # transparent edges round more than once
    augmented = ours.transform(ours.decode(photograph(90, 61)), True)
    assert augmented.shape == ours.blank().shape and augmented.dtype == torch.uint8
    same = torch.equal(augmented, ours.transform(ours.decode(photograph(90, 61)), False))
    assert same == (kind.split(",")[0] not in ("open_clip", "timm"))  # transformers augments nothing


@pytest.mark.parametrize("reason", OTHERWISE)
def test_what_our_path_cannot_do_is_refused(reason):
    with pytest.raises(ValueError, match=reason):
        our_path(OTHERWISE[reason]())


def test_timms_augmentation_is_taken_over():
    """By the numbers of its own transforms: a crop that is drawn, mirrored, of other colours."""
    torch.manual_seed(0)
    library = of_timm(**SQUARE, interpolation="bilinear")
    ours = our_path(library)
    crop, mirror, colours = ours.train_transform.transforms[:3]
    theirs = library.augmented.transforms
    assert (crop.scale, crop.ratio, mirror.p) == (theirs[0].scale, theirs[0].ratio, theirs[1].p)
    assert crop.interpolation == theirs[0].interpolation and crop.interpolation.value == "bilinear"
    assert tuple(colours.brightness) == tuple(theirs[2].brightness) and colours.hue in (None, (0.0, 0.0))


@pytest.mark.parametrize("kind", ["clip", "siglip", "hf clip"])
def test_training_reads_by_our_path_and_evaluation_as_the_config_says(kind, tmp_path):
    folder, files = start_of(kind, tmp_path / "start"), write_pairs(kind, tmp_path)
    made = {
        decoding: model_of(load_config(write_run(tmp_path, {"model": str(folder), "decoding": decoding})))
        for decoding in ("library", "fast", "fast_everywhere")
    }
    training = {decoding: model.modality("image").for_training() for decoding, model in made.items()}
    dtypes = [make_values(model, 2)["image"].dtype for model in made.values()]
    assert dtypes == [torch.float32, torch.uint8, torch.uint8]  # what plan counts as a batch
    raw = {decoding: images.decode(files[0].read_bytes()) for decoding, images in training.items()}
    assert isinstance(raw["library"], Image.Image) and isinstance(raw["fast"], torch.Tensor)
    library, fast, everywhere = (embedded(Embedder(model, "start", "cpu"), files) for model in made.values())
    assert torch.equal(library, fast) and not torch.equal(library, everywhere)
    assert F.cosine_similarity(library, everywhere).min() > 0.99
    rgb = made["fast_everywhere"].modality("image").as_rgb()
    assert rgb.decode(files[0].read_bytes()).dtype == torch.uint8 and rgb.background != "open_clip"


def test_a_run_that_reads_by_our_path_alone_is_exported_with_its_librarys(tmp_path):
    """Two steps that learn nothing, of our own pixels; the folder has the library's preprocessing, and its numbers."""
    folder, files = start_of("siglip", tmp_path / "start"), write_pairs("siglip", tmp_path)
    start = {"model": str(folder), "decoding": "fast_everywhere"}
    job = make_run_context(load_config(write_run(tmp_path, start, train={"lr": 0.0})))
    assert job.dataset[0].values["image"].dtype == torch.uint8
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(job.config)
    train(job)
    library, run = embedded(mmcontrast.load(folder), files), embedded(mmcontrast.load(job.folder), files)
    assert not torch.equal(run, library) and F.cosine_similarity(run, library).min() > 0.99
    export_model(str(job.folder), tmp_path / "out", "open_clip")
    torch.testing.assert_close(embedded(mmcontrast.load(tmp_path / "out"), files), library, rtol=0, atol=1e-5)
    again = load_config(write_run(tmp_path, {"model": str(job.folder), "decoding": "fast"}, run={"name": "again"}))
    images = model_of(again).modality("image")
    assert images.for_training() is images.fast and not images.fast_in_evaluation


def test_decoding_that_does_nothing_is_refused(tmp_path):
    folder = start_of("hf clap", tmp_path / "start")
    write_pairs("hf clap", tmp_path)
    with pytest.raises(UserError, match="decoding=fast: it has no field of pictures: leave it out"):
        model_of(load_config(write_run(tmp_path, {"model": str(folder), "decoding": "fast"})))
    clip = start_of("clip", tmp_path / "clip")
    fields = {"image": {"modality": {"type": "image", "size": 32}}}
    start = {"model": str(clip), "decoding": "fast"}
    with pytest.raises(UserError, match=r"fields.image.modality says how .*, and decoding=fast of model.start another way"):
        model_of(load_config(write_run(tmp_path, start, fields=fields)))
    coca = start_of("coca", tmp_path / "coca")
    with pytest.raises(UserError, match=r"coca: decoding=fast: our path cannot read field 'image' .*: resize_mode longest"):
        model_of(load_config(write_run(tmp_path, {"model": str(coca), "decoding": "fast"})))


def test_pictures_of_a_library_are_as_large_as_train_resolution_says():
    """In training alone, whether they come as floats or as bytes."""
    library = SAME["open_clip"]()
    library.fast = our_path(library)
    library.side = 48
    for batch in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
        assert library.train()(batch).shape[-1] == 48 and library.eval()(batch).shape[-1] == 32
    grey = library(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8))[0, :, 0, 0]
    mean, std = map(torch.tensor, (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    torch.testing.assert_close(grey, (0.2 - mean) / std)
