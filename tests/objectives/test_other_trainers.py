"""The classes that docs/score_statistics.md shows for other trainers, as they stand there, in those trainers."""

import json
import os
import re
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from open_clip.loss import ClipLoss

import mmcontrast
from tests.command import call_on_ranks, free_port
from tests.objectives.textbook import unit


def class_in_the_docs(name):
    """A class that docs/score_statistics.md shows, as it stands there."""
    page = Path(__file__).parents[2] / "docs" / "score_statistics.md"
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if f"class {name}(" in block)
    names = {"torch": torch, "F": F, "mmcontrast": mmcontrast, "open_clip": open_clip, "transformers": transformers}
    exec(code, names)
    return names[name]


def test_it_takes_the_place_of_open_clips_loss():
    x, y = unit(9, 5, seed=0, dtype=torch.float32), unit(9, 5, seed=1, dtype=torch.float32)
    losses = class_in_the_docs("TiledClipLoss")(), ClipLoss()
    ours, theirs = (loss(x, y, torch.tensor(10.0), output_dict=True) for loss in losses)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"])


class Encoder(torch.nn.Embedding):
    """As theirs: it adds the embeddings of a column to its features."""

    def forward(self, features, **_):
        return {**features, "sentence_embedding": super().forward(features["input_ids"]).mean(1)}


def ranking_loss(model, columns, symmetric):
    """MultipleNegativesRankingLoss (arXiv:1705.00652): all positives and hard negatives are candidates of each anchor."""
    anchors, *others = (F.normalize(model(features)["sentence_embedding"], dim=1) for features in columns)
    scores, own = 20.0 * anchors @ torch.cat(others).T, torch.arange(len(anchors))
    there = F.cross_entropy(scores, own)
    return (there + F.cross_entropy(scores[:, : len(anchors)].T, own)) / 2 if symmetric else there


def sentence_transformers_loss(model, columns, symmetric):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    return MultipleNegativesRankingLoss(model, **options)(columns, None)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("theirs", [ranking_loss, sentence_transformers_loss])
def test_it_is_a_loss_of_sentence_transformers(theirs, negatives, symmetric):
    """Their losses get a model, and at each step the features of every column."""
    if theirs is sentence_transformers_loss:
        pytest.importorskip("sentence_transformers", minversion="5.3")
    model = Encoder(50, 16)
    columns = [{"input_ids": torch.randint(0, 50, (9, 5))} for _ in range(2 + negatives)]
    loss, want = (
        class_in_the_docs("TiledRankingLoss")(model, symmetric=symmetric)(columns, None),
        theirs(model, columns, symmetric),
    )
    torch.testing.assert_close(loss, want)
    grads = (torch.autograd.grad(value, model.weight)[0] for value in (loss, want))
    torch.testing.assert_close(*grads)


def test_hard_negatives_of_sentence_transformers_move_away_from_their_anchors():
    torch.manual_seed(0)
    model = Encoder(30, 16)
    columns = [{"input_ids": torch.arange(10 * k, 10 * k + 10)[:, None]} for k in range(3)]
    loss, optimizer = class_in_the_docs("TiledRankingLoss")(model), torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(columns).backward()
        optimizer.step()
    anchors, positives, negatives = F.normalize(model.weight, dim=1).split(10)
    assert (anchors * positives).sum(1).mean() > 0.6 and (anchors * negatives).sum(1).mean() < 0.2


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CLIP = {"text_config": SMALL | TEXT, "vision_config": SMALL | {"image_size": 8, "patch_size": 4}, "projection_dim": 8}


class InOrder:
    """Takes the samples in their order, so that the batches of two ranks are those of one process."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_clip(folder, ranks, accumulate, own_loss=False, kind="CLIP"):
    """Train a small CLIPModel or SiglipModel for four steps of 16 pairs, or of `accumulate` times 16; return the log."""
    torch.manual_seed(0)
    texts = F.pad(F.pad(torch.randint(3, 50, (128, 6)), (1, 0), value=1), (0, 1), value=2)
    samples = [
        {"input_ids": text, "attention_mask": torch.ones(8, dtype=torch.long), "pixel_values": pixels}
        for text, pixels in zip(texts, torch.randn(128, 3, 8, 8), strict=True)
    ]

    def collate(batch):
        values = {name: torch.stack([sample[name] for sample in batch]) for name in samples[0]}
        return values | ({"return_loss": True} if own_loss else {})

    base = transformers.Trainer if own_loss else class_in_the_docs("ContrastiveTrainer")
    trainer = type("OrderedTrainer", (InOrder, base), {})(
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**CLIP)),
        transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=4,
            per_device_train_batch_size=16 // ranks, per_device_eval_batch_size=16 // ranks,
            gradient_accumulation_steps=accumulate, eval_strategy="steps", eval_steps=4,
        ),
        train_dataset=samples, eval_dataset=samples[:32], data_collator=collate,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history
    return [{name: value for name, value in entry.items() if "loss" in name or name == "grad_norm"} for entry in log]


def train_clip_on_two(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    log = train_clip(Path(folder, str(rank)), 2, 2)
    Path(folder, f"{rank}.json").write_text(json.dumps(log))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_it_trains_in_transformers_trainer_as_the_models_own_loss(tmp_path, kind):
    ours, theirs = (train_clip(tmp_path, 1, 1, own_loss, kind) for own_loss in (False, True))
    assert [list(entry) for entry in ours] == [["loss", "grad_norm"]] * 4 + [["eval_loss"], ["train_loss"]]
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(yours, rel=1e-4)


@pytest.mark.slow
def test_two_ranks_of_transformers_trainer_share_their_negatives(tmp_path):
    """And losses of accumulated batches are averaged."""
    call_on_ranks("tests.objectives.test_other_trainers:train_clip_on_two", 2, str(tmp_path), str(free_port()))
    log = json.loads((tmp_path / "0.json").read_text())
    for entry, want in zip(log, train_clip(tmp_path, 1, 2), strict=True):
        assert entry == pytest.approx(want, rel=1e-4)
