"""Tokenizers of every make, learnt of a few captions by the library of that name: what pads, what ends a text, where."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CAPTIONS = [
    "a != b", "wow!✨", "Sale!→ here", "a photo of a dog", "!", "!!!", "two dogs! and a cat, by the sea 0 1 2",
    "é — ünïcödé 中文", "the quick brown fox jumps over the lazy dog, again and again and again and again",
]  # fmt: skip
LONG = " ".join(CAPTIONS)


def _ended(made: Tokenizer, *, start: str = "", end: str = "") -> Tokenizer:
    ids = [(token, made.token_to_id(token)) for token in dict.fromkeys((start, end)) if token]
    made.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}".strip(), special_tokens=ids)
    return made


def byte_level(special: list[str]) -> Tokenizer:
    """GPT-2's kind: any text, without an unknown token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" comes first, as in CLIP's and GPT-2's vocabularies
    made.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special))
    return made


def gpt2(**options) -> PreTrainedTokenizerFast:
    """Id 0 is "!", the end of a text has the highest id, nothing is written around a text, and there is no padding."""
    made = byte_level([])
    made.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", **options)


def gpt2_padded_by_its_end() -> PreTrainedTokenizerFast:
    words = gpt2(pad_token="<|endoftext|>")
    _ended(words.backend_tokenizer, end="<|endoftext|>")
    return words


def llama_padded_before() -> PreTrainedTokenizerFast:
    """It begins texts, ends them with what it pads with, and pads before them."""
    made = _ended(byte_level(["<s>", "</s>"]), start="<s>", end="</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


def bert() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CAPTIONS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=_ended(made, start="[CLS]", end="[SEP]"), **roles)


def roberta() -> PreTrainedTokenizerFast:
    """Id 0 begins every text, 1 pads."""
    made = _ended(byte_level(["<s>", "<pad>", "</s>"]), start="<s>", end="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def t5() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(CAPTIONS, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>"))
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=_ended(made, end="</s>"), **roles)


TOKENIZERS = {
    "bert": bert,
    "gpt2": gpt2,
    "gpt2 padded by its end": gpt2_padded_by_its_end,
    "llama padded before": llama_padded_before,
    "roberta": roberta,
    "t5": t5,
}
