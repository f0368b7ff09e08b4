"""The configs of real models: complete, of the size that they say, and able to learn. Towers are built at full size without
memory, and trained for two steps with one layer each; what only a download provides is overridden, and named here."""

import io
import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import soundfile
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from mmcontrast.config import RunConfig, load_config
from mmcontrast.data import write_shard
from mmcontrast.models import make_model
from mmcontrast.plan import GIB, Plan, plan_run, without_downloads
from mmcontrast.plan.memory import count
from mmcontrast.runs import make_run_context
from mmcontrast.training.cost import fakes
from mmcontrast.training.loop import train

CONFIGS = Path(__file__).parent.parent / "configs"
REAL = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if path.stem not in ("quickstart", "letters", "stamps", "emoji", "emoji-together")
)
# the architectures of FacebookAI/roberta-base and of the first layer of FacebookAI/xlm-roberta-large, which the hub has
ARCHITECTURES = {
    "clap": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "symile": (
        "xlm-roberta",
        {"vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16,
         "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}  # fmt: skip
OPENAI = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "shortest")
HALVES = ((0.5,) * 3, (0.5,) * 3, "squash")
PUBLISHED = {  # of the image and the text tower, millions of parameters and GFLOPs: docs/model_profile.csv of open_clip
    "clip-vit-b-32": ((87.85, 8.82), (63.43, 5.96)),
    "clip-vit-b-16": ((86.19, 35.13), (63.43, 5.96)),
    "clip-vit-l-14": ((303.97, 162.03), (123.65, 13.30)),
    "siglip-vit-b-16": ((92.88, 35.42), (110.27, 11.02)),
    "siglip-so400m-14": ((427.68, 220.35), (449.68, 13.19)),
}
QUICK = {"lit", "symile"}  # to plan and to train in every run of the suite; the others are slow
WORDS = ["a", "picture", "of", "number", "with", "sound", "0", "1", "2", "3", "4", "5", "6", "7"]
VOCABULARY = 32


def local(name: str) -> list[str]:
    """Overrides for what would be downloaded."""
    if name not in ARCHITECTURES:
        return []
    model, config = ARCHITECTURES[name]
    return [f"towers.text.model={model}", f"towers.text.config={yaml.safe_dump(config, default_flow_style=True)}"]


def header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[: lines.index("")])


def planned(name: str) -> Plan:
    devices = re.search(r"--devices (\d+)", header(name))
    return plan_run(load_config(CONFIGS / f"{name}.yaml", local(name)), int(devices[1]) if devices else 1, 80 * GIB)


@pytest.mark.parametrize("name", REAL)
def test_a_config_is_of_the_size_that_it_says(name):
    config = without_downloads(load_config(CONFIGS / f"{name}.yaml", local(name)))
    with fakes():
        model = make_model(config.fields, config.towers, config.model, 0, tokenizers=False, weights=False)
    assert f" {count(model.parameters()) / 1e6:.2f} M parameters" in header(name)
    if config.model.starts:
        mean, std, resize = HALVES if name.startswith("siglip") else OPENAI
        ours = {"size": 224, "mean": list(mean), "std": list(std), "resize": resize}
        assert ours.items() <= model.modality("image").as_ours.items()
        length = {"siglip-vit-b-16": 64, "siglip-so400m-14": 16}.get(name, 77)
        assert model.modality("text").context_length == length


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK | {"clip-vit-b-32"} else [pytest.mark.slow]) for n in REAL]
)
def test_a_config_opens_with_its_command_and_with_what_plan_computes(name):
    found, said = planned(name), header(name)
    launcher = r"(torchrun --nproc-per-node \d+ -m )?"
    assert re.match(rf"{launcher}mmcontrast train configs/{name}\.yaml ", said) and "arXiv:" in said
    assert found.fits and not found.notes
    assert f"{found.parameters / 1e6:.2f} M parameters" in said
    assert (f"({found.learning / 1e6:.2f} M learn)" in said) == (found.learning < found.parameters)
    assert f"batch {found.batch_size:,}, {found.total / GIB:.1f} GiB on " in said
    assert f"{found.flops_per_sample / 1e9:.1f} GFLOPs a sample" in said
    assert (f"{found.at_a_time} samples at a time" in said) == (found.at_a_time < found.per_device)
    if published := PUBLISHED.get(name):
        assert list(found.towers) == ["image", "text"]
        for tower, (parameters, gflops) in zip(found.towers.values(), published, strict=True):
            assert tower.parameters / 1e6 == pytest.approx(parameters, abs=0.006)
            assert tower.flops / 1e9 == pytest.approx(gflops, abs=0.006)
        scalars = 2 if name.startswith("siglip") else 1
        assert found.parameters == sum(tower.parameters for tower in found.towers.values()) + scalars
        forward = sum(gflops for _, gflops in published)
        assert found.flops_per_sample == pytest.approx(3e9 * forward, rel=0.01)  # the first layer has no input's gradient


def shallow(name: str, config: RunConfig, folder: Path) -> list[str]:
    """Overrides for towers of one layer, without their weights, for a vocabulary that takes no time to learn or to save. In the
    place of a start comes an architecture that open_clip then knows, of the same kinds and widths."""
    overrides = []
    for start in config.model.starts:
        whole = open_clip.get_model_config(start.model)
        assert whole is not None and start.pretrained is False
        vision, text = whole["vision_cfg"], whole["text_cfg"]
        if "timm_model_name" in vision:
            vision = {**vision, "timm_model_name": one_layer(vision["timm_model_name"])}
        else:
            vision = {**vision, "layers": 1}
        (folder / f"{name}.json").write_text(
            json.dumps({**whole, "vision_cfg": vision, "text_cfg": {**text, "layers": 1, "vocab_size": VOCABULARY}})
        )
        open_clip.add_model_config(folder / f"{name}.json")
        overrides.append(f"model.start.model={name}")
    for tower, spec in config.towers.items():
        assert isinstance(spec, dict)
        changed: dict[str, object] = {}
        if spec["type"] == "timm":
            changed = {"depths": [1, 1, 1, 1]} if "swin" in spec["model"] else {"depth": 1}
        elif spec["type"] == "open_clip":
            whole = open_clip.get_model_config(spec["model"])
            assert whole is not None
            image = {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32}  # of the half that is not used
            image = {**whole["vision_cfg"], "layers": 1} if spec["part"] == "image" else image
            changed = {"vision_cfg": image, "text_cfg": {**whole["text_cfg"], "layers": 1, "vocab_size": VOCABULARY}}
        elif spec["type"] == "transformers":
            model, architecture = ARCHITECTURES.get(name, (spec["model"], {}))
            changed = {"model": model, "config": {**architecture, "num_hidden_layers": 1, "vocab_size": VOCABULARY}}
        if spec.get("pretrained"):
            changed["pretrained"] = None
        overrides += [f"towers.{tower}.{option}={one_line(value)}" for option, value in changed.items()]
    return overrides


def one_layer(name: str) -> str:
    """The name of a timm model of one layer that is otherwise that of a name."""

    def make(pretrained: bool = False, **options: object) -> nn.Module:
        return timm.create_model(name, depth=1, **options)

    make.__name__ = f"{name}_of_one_layer"
    if not timm.is_model(make.__name__):
        timm.models.register_model(make)
    return make.__name__


def one_line(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer of the words at hand, in place of those of the hub."""
    ids = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS, "[END]"])}
    made = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", ids["[END]"])])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """all.tar, captions.tar and sounds.tar of eight samples: noise, under every name that a config asks for."""
    folder, generator = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)

    def written(write) -> bytes:
        target = io.BytesIO()
        write(target)
        return target.getvalue()

    samples = []
    for number in range(8):
        picture = Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        sound, rows = generator.uniform(-0.5, 0.5, 24_000), generator.standard_normal((2, 1280), dtype=np.float32)
        samples.append({
            "__key__": f"{number:03d}",
            "jpg": written(lambda file, picture=picture: picture.save(file, "JPEG")),
            "wav": written(lambda file, sound=sound: soundfile.write(file, sound, 16_000, format="WAV")),
            "image.npy": written(lambda file, rows=rows: np.save(file, rows[0, :1024])),
            "audio.npy": written(lambda file, rows=rows: np.save(file, rows[1])),
            "txt": f"a picture of number {number} with a sound",
        })  # fmt: skip
    for name, without in (("all", ()), ("captions", ("wav",)), ("sounds", ("txt",))):
        kept = [{member: value for member, value in sample.items() if member not in without} for sample in samples]
        write_shard(folder / f"{name}.tar", kept)
    return folder


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps one precision for a process; threads are those of before."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in REAL])
def test_a_config_learns_for_two_steps(name, shards, tokenizer, tmp_path, fresh_accelerator):
    config = load_config(CONFIGS / f"{name}.yaml")
    sources = config.data.train if isinstance(config.data.train, dict) else {}
    data = [f"data.train.{source}.shards={shards / source}.tar" for source in sources] or [f"data.train={shards / 'all.tar'}"]
    small = ["train.steps=2", "train.batch_size=4", "train.warmup_steps=0", "train.log_every=1", "data.num_workers=0"]
    small += [] if name == "clip-vit-b-32" else ["train.precision=fp32"]  # many CPUs have no fast products of bf16
    texts = {f: options.modality for f, options in config.fields.items() if (options.modality or {}).get("type") == "text"}
    for field, words in (texts or {"text": {"type": "text", "context_length": 16}}).items():
        small += [f"fields.{field}.modality={one_line(words | {'tokenizer': str(tokenizer)})}"]
    small += ["train.micro_batch_size=2"] if config.train.micro_batch_size else []
    small += ["evaluation.splits={}", f"run.dir={tmp_path}", "data.block=4", "train.async_checkpoints=false"]
    job = make_run_context(load_config(CONFIGS / f"{name}.yaml", [*shallow(name, config, tmp_path), *data, *small]))
    before = {key: weight.clone() for key, weight in job.model.state_dict().items() if weight.dim() < 2}
    job.folder.mkdir()
    train(job)
    lines = [yaml.safe_load(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(np.isfinite(line["loss"]) for line in lines)
    moved = {key.split(".")[1] for key, weight in before.items() if key.startswith("towers") and
             not torch.equal(weight, job.model.state_dict()[key])}  # fmt: skip
    locked = {pattern.split(".")[1] for pattern in config.train.freeze if pattern.startswith("towers")}
    assert moved == job.model.towers.keys() - locked
    if config.model.starts:
        assert job.dataset[0].values["image"].dtype == torch.uint8
