"""Other image sizes and context lengths than a model's own: what its library computes there, before training and after."""

import json

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from timm.models import save_for_hf
from tokenizers.processors import TemplateProcessing

import mmcontrast
from mmcontrast.config import load_config
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.export import huggingface, safetensors
from mmcontrast.export import open_clip as to_open_clip
from mmcontrast.export.folder import write_export
from mmcontrast.export.samples import made_samples
from mmcontrast.models import StartOptions, open_start
from mmcontrast.runs import make_run_context
from mmcontrast.runs import open_start as open_any_start
from tests.command import train
from tests.models.open_clip_models import MODELS, save
from tests.models.samples import TEXTS, pictures, tokenizer
from tests.models.starts import embedded, start_of, write_pairs, write_run
from tests.models.transformers_models import DUAL, SIZES, VISION, opened, saved

LONG = " ".join(TEXTS)  # cut by every context length of these tests


def started(folder, **options):
    """What `model.start` opens."""
    return Embedder(open_start(StartOptions(model=str(folder), **options)), "started", "cpu")


def exported(model, kind, module, out):
    """Write an export; it holds its own parity with the model."""
    write_export(model, out, kind, module, list(model.fields), made_samples(model.model, list(model.fields)))
    return out


@torch.no_grad()
def by_open_clip(name, files, context_length=None, **options):
    """Embeddings of pictures and of texts as open_clip's own pipeline makes them."""
    if context_length:
        options["force_context_length"] = context_length
    whole, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    words = open_clip.get_tokenizer(name, context_length=context_length)([*TEXTS, LONG])
    whole.eval()
    images = whole.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
    return torch.cat([images, whole.encode_text(words, normalize=True)])


def ours(model, files):
    return torch.cat([model.embed(images=files), model.embed(texts=[*TEXTS, LONG])])


@pytest.mark.parametrize(
    ("kind", "context"), [("clip", 16), ("clip", 33), ("custom", 33), ("siglip", 33), ("coca", 16), ("bert", 33)]
)
def test_open_clips_own_sizes(kind, context, tmp_path):
    folder, files = save(tmp_path / kind, kind), pictures(tmp_path)
    size = {"siglip": 192}.get(kind, 48)
    wanted = by_open_clip(f"local-dir:{folder}", files, context, force_image_size=size)
    model = started(folder, image_size=size, context_length=context)
    torch.testing.assert_close(ours(model, files), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted[: len(files)], mmcontrast.load(folder).embed(images=files), atol=1e-3)
    if kind == "siglip":  # the trunk of timm's has the size of its name, whatever open_clip's config says
        with pytest.raises(UserError, match="test_vit.*160.*export onnx"):
            exported(model, "open_clip", to_open_clip, tmp_path / "out")
        return
    out = exported(model, "open_clip", to_open_clip, tmp_path / "out")
    about = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    assert (about["vision_cfg"]["image_size"], about["text_cfg"]["context_length"]) == (size, context)
    torch.testing.assert_close(by_open_clip(f"local-dir:{out}", files), wanted, atol=1e-5, rtol=1e-5)


def test_open_clips_names_with_a_file(architecture, tmp_path):
    files, file = pictures(tmp_path), str(tmp_path / "epoch_1.pt")
    model = started("tiny-clip", pretrained=file, image_size=40, context_length=30)
    wanted = by_open_clip("tiny-clip", files, 30, pretrained=file, force_image_size=40)
    torch.testing.assert_close(ours(model, files), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2 naflex"])
def test_transformers_own_interpolation(kind, tmp_path):
    """Its forward with interpolate_pos_encoding, of what its processor makes at that size; texts cut earlier; written back."""
    folder, files = saved(DUAL[kind](), tmp_path / "model"), pictures(tmp_path)
    network, processor = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoProcessor.from_pretrained(folder)
    sized = {"clip": {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}}
    sized |= {"siglip": {"size": {"height": 48, "width": 48}}, "siglip2 naflex": {"max_num_patches": 9}}
    padding = True if kind == "clip" else "max_length"
    words = processor.tokenizer([*TEXTS, LONG], padding=padding, truncation=True, max_length=12, return_tensors="pt")
    images = processor.image_processor(opened(files, processor.image_processor), return_tensors="pt", **sized[kind])
    more = {} if kind == "siglip2 naflex" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        rows = [network.get_image_features(**images, **more).pooler_output, network.get_text_features(**words).pooler_output]
    wanted = F.normalize(torch.cat(rows), dim=1)
    model = started(folder, image_size=48, context_length=12)
    torch.testing.assert_close(ours(model, files), wanted, atol=1e-5, rtol=1e-5)
    again = mmcontrast.load(exported(model, "huggingface", huggingface, tmp_path / "out"))
    torch.testing.assert_close(ours(again, files), wanted, atol=1e-5, rtol=1e-5)


def test_plain_encoders_of_transformers(tmp_path):
    """ViT and DINOv2, whose crop is smaller than what it is cut from."""
    files = pictures(tmp_path)
    square = {"height": 48, "width": 48}
    made = {
        "vit": (hf.ViTModel(hf.ViTConfig(**VISION)), hf.ViTImageProcessor(size={"height": 32, "width": 32})),
        "dinov2": (
            hf.Dinov2Model(hf.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"})),
            hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        ),
    }
    sized = {"vit": {"size": square}, "dinov2": {"size": {"shortest_edge": 60}, "crop_size": square}}
    for name, (network, processor) in made.items():
        network.eval().save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        pixels = processor(opened(files, processor), return_tensors="pt", **sized[name])
        options = {"interpolate_pos_encoding": True} if name == "vit" else {}
        with torch.no_grad():
            hidden = network(**pixels, **options).last_hidden_state[:, 0]
        model = started(tmp_path / name, image_size=48, pooling="first")
        torch.testing.assert_close(model.embed(images=files), F.normalize(hidden, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_timms_own_sizes(name, tmp_path):
    """A transformer, whose checkpoint timm resizes, and a network that takes any size."""
    network, files = timm.create_model(name), pictures(tmp_path)
    save_for_hf(network, tmp_path / "saved", safe_serialization=True)
    options = {"img_size": 128} if name == "test_vit" else {}
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=0, **options).eval()
    data = timm.data.resolve_data_config({"img_size": 128}, model=theirs)
    transform = timm.data.create_transform(**data, is_training=False)
    with torch.no_grad():
        wanted = F.normalize(theirs(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])), dim=1)
    model = started(tmp_path / "saved", image_size=128)
    torch.testing.assert_close(model.embed(images=files), wanted, atol=1e-5, rtol=1e-5)
    again = mmcontrast.load(exported(model, "safetensors", safetensors, tmp_path / "out"))
    torch.testing.assert_close(again.embed(images=files), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "hf siglip"])
def test_a_run_at_another_size(kind, tmp_path):
    """Trained at a rate of 0, resumed, loaded: the library's embeddings at that size; exported, a start again; not as a run."""
    folder, files = start_of(kind, tmp_path / "start"), write_pairs(kind, tmp_path)
    sizes = {"image_size": 48, "context_length": 12}
    start = {"start": {"model": str(folder)} | sizes} | ({"lora": {"rank": 2}} if kind == "hf siglip" else {})
    config = write_run(tmp_path, str(folder), model=start, train={"lr": 0.0, "checkpoint_every": 1})
    assert (done := train(config)).returncode == 0, done.stderr
    assert (done := train(config, "--resume", "train.steps=3")).returncode == 0, done.stderr
    run, wanted = mmcontrast.load(tmp_path / "runs" / "tuned"), embedded(started(folder, **sizes), files)
    torch.testing.assert_close(embedded(run, files), wanted, rtol=0, atol=1e-6)
    form = ("open_clip", to_open_clip) if kind == "clip" else ("huggingface", huggingface)
    out = exported(run, *form, tmp_path / "out")
    assert open_start(StartOptions(model=str(out), image_size=64)).towers["image"](torch.zeros(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(UserError, match=r"image_size=64: a run has the sizes of its own config: export it to open_clip or"):
        open_any_start(StartOptions(model=str(tmp_path / "runs" / "tuned"), image_size=64))


def test_what_a_library_cannot_resize_is_refused(tmp_path):
    def message(**options):
        with pytest.raises(UserError) as error:
            started(tmp_path / options.pop("name"), **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    saved(DUAL["clap"](), tmp_path / "clap")
    assert "image_size=64: a ClapModel has no field of images" in message(name="clap", image_size=64)
    assert "context_length=99: it has 16 positions" in message(name="clap", context_length=99)
    saved(DUAL["clip"](), tmp_path / "clip")
    assert "context_length=17: it has 16 positions, which transformers cannot" in message(name="clip", context_length=17)
    beit = hf.BeitModel(hf.BeitConfig(**VISION | {"use_relative_position_bias": True, "vocab_size": 90}))
    beit.save_pretrained(tmp_path / "beit")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "beit")
    assert "transformers cannot resize" in message(name="beit", image_size=48)
    save_for_hf(timm.create_model("test_vit"), tmp_path / "vit", safe_serialization=True)
    assert "context_length=9: timm's models take no texts" in message(name="vit", context_length=9)
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}  # named: timm 1.0.26 does not keep them by itself
    save_for_hf(timm.create_model("cait_xxs24_224", **small), tmp_path / "cait", safe_serialization=True, model_args=small)
    assert "image_size=64: timm does not resize pos_embed" in message(name="cait", image_size=64)
    save(tmp_path / "bert", "bert")
    assert "takes 512 tokens: set that or less" in message(name="bert", context_length=513)
    for kind, vision in (("resnet", {"layers": [1, 1, 1, 1], "width": 16}), ("wide", {"image_size": [16, 64], "layers": 1})):
        sizes = {"image_size": 32, "patch_size": 8, "width": 64} if kind == "wide" else {"image_size": 32}
        MODELS[kind] = {"vision_cfg": sizes | vision, "text_cfg": MODELS["clip"]["text_cfg"]}
        try:
            save(tmp_path / kind, kind)
        finally:
            del MODELS[kind]
    assert "square pictures' positions alone, its own are [16, 64]" in message(name="wide", image_size=48)
    assert "positions in a ResNet's attention pool" in message(name="resnet", image_size=64)
    hf.BertModel(hf.BertConfig(**SIZES, vocab_size=90)).save_pretrained(tmp_path / "words")
    tokenizer(model_max_length=16).save_pretrained(tmp_path / "words")
    assert "image_size=32: a BertModel has no field of images" in message(name="words", image_size=32)
    write_pairs("clip", tmp_path)
    with pytest.raises(UserError, match="image_size"):
        make_run_context(load_config(write_run(tmp_path, {"model": str(tmp_path / "clip"), "image_size": 0})))


@pytest.mark.parametrize("kind", ["clip", "siglip", "clap", "bert"])
def test_new_tokens_are_transformers_own(kind, tmp_path):
    """The rows and ids that its own functions give; other texts stay what they were; written back."""
    tokens = ["zugzwang", "<fianchetto>"]
    if kind == "bert":
        made = hf.BertModel(hf.BertConfig(**SIZES, vocab_size=90)), tokenizer(model_max_length=16), {}
        folder = saved(made, tmp_path / kind)
    elif kind == "clip":  # as those that were saved before transformers 4.31: texts end with the highest id
        words = tokenizer(model_max_length=16)
        words.add_special_tokens({"eos_token": "[EOT]"})
        ends = [("[CLS]", 1), ("[EOT]", words.eos_token_id)]
        words.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [EOT]", special_tokens=ends)
        folder = saved(DUAL["clip"](words, vocab_size=len(words), bos_token_id=1, eos_token_id=2), tmp_path / kind)
    else:
        folder = saved(DUAL[kind](), tmp_path / kind)
    network, words = hf.AutoModel.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    text, before = getattr(network, "text_model", network), mmcontrast.load(folder)
    words.add_tokens(tokens)
    torch.manual_seed(0)
    start = StartOptions(model=str(folder), new_tokens=tokens)
    model = Embedder(open_start(start), "started", "cpu")
    old, new = (one.model.towers["text"].network for one in (before, model))
    old, new = (getattr(one, "text_model", one).get_input_embeddings().weight for one in (old, new))
    rows = max(len(words), len(old))
    text.resize_token_embeddings(rows)
    assert new.shape == text.get_input_embeddings().weight.shape and torch.equal(new[: len(old)], old)
    found = model.embed(texts=[*TEXTS, "a zugzwang", "a <fianchetto>"])
    torch.testing.assert_close(found[: len(TEXTS)], before.embed(texts=TEXTS), atol=1e-5, rtol=1e-5)
    assert rows == len(old) or torch.allclose(new[len(old) :], old.mean(0), atol=1e-3)  # the library's own way to begin
    ids = [model.model.modality("text").tokens(one).tolist() for one in ("a zugzwang", "a <fianchetto>")]
    assert all(words.convert_tokens_to_ids(token) in one for token, one in zip(tokens, ids, strict=True))
    if kind != "bert":
        for part in text.modules() if kind == "clip" else ():
            if hasattr(part, "eos_token_id"):  # as transformers says that such a config must be for new tokens
                part.eos_token_id = words.eos_token_id
        padding = "max_length" if kind == "siglip" else True
        inputs = words(["a zugzwang"], padding=padding, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            text.get_input_embeddings().weight.copy_(new)
            features = network.eval().get_text_features(**{k: v for k, v in inputs.items() if k != "token_type_ids"})
        torch.testing.assert_close(found[-2:-1], F.normalize(features.pooler_output, dim=1), atol=1e-5, rtol=1e-5)
    out = mmcontrast.load(exported(model, "huggingface", huggingface, tmp_path / "out"))
    torch.testing.assert_close(out.embed(texts=["a zugzwang", "a <fianchetto>"]), found[-2:], atol=1e-5, rtol=1e-5)
    if kind == "clip":
        saved(DUAL["clip"](), tmp_path / "other end")
        with pytest.raises(UserError, match="texts end with the highest id, which would be that of a new token"):
            started(tmp_path / "other end", new_tokens=tokens)
    with pytest.raises(UserError, match="'zugzwang' is no new token"):
        started(tmp_path / "out", new_tokens=["zugzwang"])


def test_a_run_with_new_tokens(tmp_path):
    """They learn, are resumed and loaded; open_clip and low-rank updates refuse them."""
    folder, files = start_of("hf siglip", tmp_path / "start"), write_pairs("hf siglip", tmp_path)
    start = {"model": str(folder), "new_tokens": ["zugzwang", "gambit"]}
    (tmp_path / "pairs.csv").write_text((tmp_path / "pairs.csv").read_text().replace("queen", "zugzwang gambit"))
    config = write_run(tmp_path, start, train={"lr": 1e-2, "warmup_steps": 0, "checkpoint_every": 1})
    assert (done := train(config)).returncode == 0, done.stderr
    run = tmp_path / "runs" / "tuned"
    weights = "towers.text.network.text_model.embeddings.token_embedding.weight"
    first, last = (mmcontrast.load(run, checkpoint=step).model.state_dict()[weights] for step in ("1", "2"))
    assert not torch.equal(first[-2:], last[-2:])
    assert embedded(mmcontrast.load(run), files).isfinite().all()
    with pytest.raises(UserError, match="new_tokens: their embeddings are new, and model.lora locks them"):
        make_run_context(
            load_config(write_run(tmp_path, start, model={"start": start, "lora": {"rank": 2}}, run={"name": "lora"}))
        )
    save(tmp_path / "clip", "clip")
    with pytest.raises(UserError, match=r"new_tokens=\['queen'\]: open_clip's tokenizers cannot grow: export"):
        started(tmp_path / "clip", new_tokens=["queen"])
