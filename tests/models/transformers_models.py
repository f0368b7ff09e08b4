"""Models of transformers at random with their processors, saved as it saves them."""

import torch
import transformers as hf
from PIL import Image

from tests.models.samples import tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = SIZES | {"vocab_size": 90, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
SWIN = {
    "spec_size": 256,
    "num_mel_bins": 64,
    "hidden_size": 32,
    "patch_embeds_hidden_size": 16,
    "depths": [1, 2],
    "num_attention_heads": [2, 4],
}
SWIN |= {"window_size": 8, "patch_stride": [4, 4], "projection_dim": 24}
SOUND = {"feature_size": 64, "sampling_rate": 8000, "hop_length": 80, "max_length_s": 1, "frequency_max": 3900}


def clip(words=None, **text):
    sizes = {"projection_dim": 24}
    config = hf.CLIPConfig(text_config=WORDS | sizes | text, vision_config=VISION | sizes, **sizes)
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return hf.CLIPModel(config), hf.CLIPProcessor(processor, words or tokenizer(model_max_length=16)), {"padding": True}


def siglip(names=("input_ids",)):
    config = hf.SiglipConfig(text_config=WORDS | {"projection_size": 32}, vision_config=VISION)
    processor = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    words = tokenizer(model_max_length=16, model_input_names=list(names))
    return hf.SiglipModel(config), hf.SiglipProcessor(processor, words), {"padding": "max_length"}


def naflex():
    vision = SIZES | {"patch_size": 16, "num_patches": 256}
    config = hf.Siglip2Config(text_config=WORDS | {"projection_size": 32, "max_position_embeddings": 64}, vision_config=vision)
    words = tokenizer(model_max_length=64, padding_side="left")
    return (
        hf.Siglip2Model(config),
        hf.Siglip2Processor(hf.Siglip2ImageProcessor(), words),
        {"padding": "max_length", "max_length": 64},
    )


def clap(fusion=False):
    text = WORDS | {"projection_dim": 24, "pad_token_id": 1, "max_position_embeddings": 18}
    audio = SWIN | {"enable_fusion": fusion, "fusion_type": "aff_2d" if fusion else None, "aff_block_r": 2}
    config = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    extractor = hf.ClapFeatureExtractor(**SOUND, truncation="fusion" if fusion else "rand_trunc")
    words = tokenizer("[PAD]", model_max_length=16, pad_token="[CLS]")
    return hf.ClapModel(config), hf.ClapProcessor(extractor, words), {"padding": True}


def clip_padded_by_its_end():
    words = tokenizer("[SEP]", "[CLS]", pad_token="[CLS]", model_max_length=16)
    return clip(words, bos_token_id=2, eos_token_id=1, pad_token_id=1)


DUAL = {
    "clip": clip,
    "clip, padded by its end": clip_padded_by_its_end,
    "siglip": siglip,
    "siglip2 naflex": naflex,
    "clap": clap,
}
DUAL |= {"siglip, masked": lambda: siglip(("input_ids", "attention_mask"))}


def saved(made, folder):
    network, processor, _ = made
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "logit" in name:
                value.fill_(torch.rand(()) * 3)
    network.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def opened(files, processor):
    """As the processor takes them: in any mode where it converts to RGB itself, in its own way of treating transparency."""
    return [Image.open(file) if processor.do_convert_rgb else Image.open(file).convert("RGB") for file in files]
