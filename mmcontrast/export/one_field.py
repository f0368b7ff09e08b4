"""Says how transformers alone computes the embeddings of an encoder of one field, for its card."""

from torch import nn

from mmcontrast.models import TransformersTower
from mmcontrast.models.transformers import PooledTower

USAGE = """\
import torch
from transformers import NETWORK, PREPARE

model, prepare = NETWORK.from_pretrained("FOLDER").eval(), PREPARE.from_pretrained("FOLDER")
inputs = prepare(INPUT, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
    features = FEATURES
    embeddings = torch.nn.functional.normalize(features, dim=1)
"""
INPUTS = {  # of what prepares a field, and what it takes
    "text": ("AutoTokenizer", '["a caption"], padding=True, truncation=True, max_length=LENGTH'),
    "image": ("AutoImageProcessor", "[picture]"),  # of PIL
    "audio": ("AutoFeatureExtractor", "[samples], sampling_rate=prepare.sampling_rate"),
}
STATES = "outputs.last_hidden_state"
POOLED = {  # by pooling, and whether inputs are padded
    ("first", False): f"{STATES}[:, 0]",
    ("last", False): f"{STATES}[:, -1]",
    ("mean", False): f"{STATES}.mean(1)",
    ("first", True): f"{STATES}[:, 0]",
    ("last", True): f"{STATES}[torch.arange(len({STATES})), inputs.attention_mask.sum(1) - 1]  # padded on the right",
    ("mean", True): f"({STATES} * (mask := inputs.attention_mask[..., None])).sum(1) / mask.sum(1)",
}


def usage_of_one_field(tower: nn.Module, kind: str, length: int) -> str:
    """Return lines of Python.

    Args:
        tower: of a model of transformers that is no dual encoder.
        kind: of its field: "text", "image" or "audio".
        length: tokens of a text, at most.
    """
    assert isinstance(tower, PooledTower | TransformersTower)
    pooled = isinstance(tower, PooledTower)
    features = f"outputs.{tower.output}" if pooled else POOLED[str(tower.pooling), kind == "text"]
    prepare, inputs = INPUTS[kind]
    inputs = inputs.replace("LENGTH", str(length))
    words = {"NETWORK": type(tower.network).__name__, "PREPARE": prepare, "INPUT": inputs, "FEATURES": features}
    text = USAGE
    for word, value in words.items():
        text = text.replace(word, value)
    return text
