"""Models of open_clip at random, saved as its own push to the hub leaves them."""

import json

import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from transformers import BertConfig, BertModel

from tests.models.samples import tokenizer

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
ATTENDED = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
DECODER = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 4}
MODELS = {
    "clip": {"vision_cfg": VISION, "text_cfg": TEXT},
    "custom": {"vision_cfg": VISION, "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"}, "custom_text": True},
    "siglip": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none", "image_size": 160},
        "text_cfg": TEXT | {"width": 64, "hf_tokenizer_name": "HERE", "tokenizer_kwargs": {"clean": "canonicalize"}},
        "custom_text": True, "init_logit_bias": -10.0,
    },
    "coca": {
        "vision_cfg": VISION | ATTENDED, "custom_text": True, "multimodal_cfg": DECODER,
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    },
    "bert": {
        "vision_cfg": VISION, "custom_text": True,
        "text_cfg": {"hf_model_name": "HERE", "hf_tokenizer_name": "HERE", "hf_proj_type": "mlp", "context_length": 24},
    },
}  # fmt: skip
PREPROCESS = {
    "clip": {},
    "siglip": {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
    "coca": {"resize_mode": "longest"},
}


def save(folder, kind):
    config = {"embed_dim": 64, **json.loads(json.dumps(MODELS[kind]).replace("HERE", str(folder)))}
    folder.mkdir()
    tokenizer().save_pretrained(folder)
    if kind == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        BertModel(BertConfig(**sizes, vocab_size=90)).save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS.get(kind, {})}))
    whole, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        whole.logit_scale.fill_(torch.rand(()) * 4)
        if kind == "coca":
            whole.text_decoder.text_projection.normal_(std=0.02)  # open_clip leaves it as the memory was
    saver = open_clip.get_tokenizer(f"local-dir:{folder}")
    saver.save_pretrained = lambda _: None  # the others have none to save, and these are there
    save_for_hf(whole, saver, config, folder, safe_serialization=True)
    return folder
