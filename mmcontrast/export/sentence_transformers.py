"""Export to sentence-transformers: a model of transformers with a Normalize module, which it would leave out."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.export import huggingface
from mmcontrast.export.parity import Reopened, opened_pictures, unit
from mmcontrast.export.parts import kind_of, origin_of, projection_of, unused
from mmcontrast.libraries import opening
from mmcontrast.modalities import TextModality
from mmcontrast.modalities.library import LibraryTexts
from mmcontrast.modalities.text import OPEN_CLIP
from mmcontrast.models import ContrastiveModel, TransformersTower
from mmcontrast.models.transformers import FULL_LENGTH, UNBOUNDED, positions_of

POOLING = {"mean": "mean", "first": "cls", "last": "lasttoken"}
USAGE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
rows = model.encode(["a caption"])  # pictures, where the model takes them: model.encode([PIL.Image.open("picture.jpg")])
"""


def write(model: ContrastiveModel, names: list[str], folder: Path) -> list[str]:
    """Write a model into an empty folder, and return notes.

    Raises:
        UserError: for a model that sentence-transformers cannot compute.
    """
    tower = model.towers[model.tower_of[names[0]]]
    with tempfile.TemporaryDirectory() as inner:
        if len(names) == 1 and kind_of(model, names[0]) == "text" and isinstance(tower, TransformersTower):
            modules, notes = _text_encoder(model, names[0], tower, Path(inner)), []
        elif len(names) == 1:
            raise UserError(f"field {names[0]!r}: sentence-transformers takes text encoders of transformers, or whole models")
        else:
            notes = huggingface.write(model, names, Path(inner))
            modules = [_dual_encoder(Path(inner)), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    card = folder / "README.md"
    card.unlink(missing_ok=True)
    return notes


def _dual_encoder(folder: Path) -> Transformer:
    """Return the module of a dual encoder. SigLIP's texts have one length, which its tokenizer does not name."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with opening(folder):
        module = Transformer(str(folder))
    if config["model_type"].startswith(FULL_LENGTH):
        tokenizer: Any = module.tokenizer
        length = min(
            tokenizer.model_max_length, positions_of(module.auto_model, module.auto_model.config.text_config) or UNBOUNDED
        )
        module.processing_kwargs = {"text": {"padding": "max_length", "max_length": length, "truncation": True}}
    return module


def _text_encoder(model: ContrastiveModel, name: str, tower: TransformersTower, folder: Path) -> list[nn.Module]:
    modality, projection, network = model.modality(name), projection_of(model, name), tower.network
    assert isinstance(modality, TextModality)
    if isinstance(projection, nn.Sequential):
        raise UserError(f"field {name!r}: its mlp projection is exported as onnx or safetensors; projection: linear fits here")
    origin = origin_of(model, [name])
    tensors = network.state_dict() | (dict(origin.rest) if origin and origin.library == "transformers" else {})
    network.save_pretrained(folder, state_dict=tensors)
    if isinstance(modality, LibraryTexts):
        tokenizer = unused(modality.tokenize.tokenizer)
    elif modality.name == OPEN_CLIP:
        tokenizer = huggingface.clip_tokenizer(modality.context_length)
    else:
        tokenizer = unused(modality.tokenizer)
    tokenizer.model_max_length = modality.context_length
    tokenizer.save_pretrained(folder)
    with opening(folder):
        first = Transformer(str(folder))
    first.max_seq_length = modality.context_length
    modules: list[nn.Module] = [first, Pooling(tower.width, pooling_mode=POOLING[tower.pooling])]
    if isinstance(projection, nn.Linear):
        dense = Dense(tower.width, model.embed_dim, bias=False, activation_function=nn.Identity())
        dense.linear.load_state_dict({"weight": projection.weight.detach().cpu()})
        modules.append(dense)
    return [*modules, Normalize()]


def reopen(folder: Path, names: list[str], model: ContrastiveModel) -> Reopened:
    with opening(folder):
        opened = SentenceTransformer(str(folder), device="cpu")

    @torch.no_grad()
    def embed(name: str, values: list[Any]) -> Tensor:
        batches: list[list[Any]] = [values]
        if kind_of(model, name) == "image":
            batches = [opened_pictures(values)]
        elif kind_of(model, name) == "audio":
            modality: Any = model.modality(name)
            batches = [[{"array": modality.decode(value).numpy(), "sampling_rate": modality.sample_rate}] for value in values]
        outputs = []
        for batch in batches:
            np.random.seed(0)  # noqa: NPY002 - CLAP cuts long sounds at random places
            outputs.append(opened.encode(batch, batch_size=4, convert_to_tensor=True, show_progress_bar=False))
        rows = torch.cat(outputs)
        if not torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5):
            raise UserError(f"field {name!r}: sentence-transformers does not normalise its embeddings")
        return unit(rows)

    if len(names) == 1:
        return Reopened(embed)
    network: Any = opened[0].auto_model
    state = network.state_dict()
    log_scale, bias = state.get("logit_scale", state.get("logit_scale_a")), state.get("logit_bias")
    assert log_scale is not None
    scores = log_scale.exp().item(), None if bias is None else bias.item()
    origin = origin_of(model, names)
    if origin and origin.library == "transformers":
        return Reopened(embed, *scores)

    processor: Any = opened[0].processor

    def pixels(values: list[bytes]) -> Tensor:
        return processor.image_processor(images=opened_pictures(values), return_tensors="pt")["pixel_values"]

    return Reopened(embed, *scores, pixels, processor.image_processor.image_std)
