"""Claims of papers about their objectives, on real letters with small encoders: three seeds each, a few seconds.

Pictures of letters in several typefaces against their Unicode names, as sums of letter triples. Recall is of pictures in a
typeface that was not trained on.
"""

import statistics
import zlib
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines.glyphs.characters import TRAIN_FONTS, splits
from data_pipelines.glyphs.glyphs import PLAIN_LETTERS, draw
from mmcontrast import contrastive_loss
from mmcontrast.objectives.hyperbolic import Hyperbolic

pytestmark = pytest.mark.slow
SIDE, WORDS, SEEDS = 20, 512, (0, 1, 2)
FONTS = [*TRAIN_FONTS[:3], TRAIN_FONTS[8]]  # the last is held out


@cache
def letters():
    """(pictures [L, fonts, pixels], names [L, words], kinds [L, words], group of each letter's kind [L])."""
    seen = {c.code: c for c, _ in splits()["train"] if c.kind in PLAIN_LETTERS and " with " not in c.name}
    chosen = [seen[code] for code in sorted(seen)]
    drawn = [[np.asarray(draw(chr(c.code), font, 14, SIDE)) for font in FONTS] for c in chosen]
    pictures = 1.0 - torch.tensor(np.array(drawn), dtype=torch.float32).flatten(2) / 255.0
    names, kinds = (torch.stack([triples(getattr(c, what)) for c in chosen]) for what in ("name", "kind"))
    order = sorted({c.kind for c in chosen})
    return pictures, names, kinds, torch.tensor([order.index(c.kind) for c in chosen])


def triples(text):
    row = torch.zeros(WORDS)
    for start in range(len(text) - 2):
        row[zlib.crc32(text[start : start + 3].encode()) % WORDS] += 1.0
    return F.normalize(row, dim=0)


class Pair(torch.nn.Module):
    """Two small encoders of one width, and a logit scale."""

    def __init__(self, width, hidden=256, dropout=0.0):
        super().__init__()
        self.image, self.text = (
            torch.nn.Sequential(
                torch.nn.Linear(size, hidden), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(hidden, width)
            )
            for size in (SIDE * SIDE, WORDS)
        )
        self.log_scale = torch.nn.Parameter(torch.tensor(20.0).log())

    def forward(self, pictures, texts):
        return {"image": F.normalize(self.image(pictures), dim=1), "text": F.normalize(self.text(texts), dim=1)}


def train(model, loss_of, steps=150, batch=96, seed=0, lr=3e-3):
    """loss_of(letters [N], pictures [N, pixels]) → loss; each step draws letters, and a typeface for each."""
    pictures, generator = letters()[0], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=True)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        fonts = torch.randint(len(FONTS) - 1, (batch,), generator=generator)
        optimizer.zero_grad()
        loss_of(chosen, pictures[chosen, fonts]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def recall(model, width=None):
    """At 1, of the names for pictures in the held-out typeface, by a prefix of the embeddings."""
    pictures, names, *_ = letters()
    rows = {field: F.normalize(v[:, :width], dim=1) for field, v in model(pictures[:, -1], names).items()}
    found = (rows["image"] @ rows["text"].T).argmax(1)
    return (found == torch.arange(len(found))).double().mean().item()


def plain(model, **given):
    names = letters()[1]
    return lambda chosen, pictures: contrastive_loss(
        model(pictures, names[chosen]), logit_scale=model.log_scale.exp(), ids=chosen, **given
    )


def made(seed, width=64, **options):
    torch.manual_seed(seed)
    return Pair(width, **options)


def means(arms):
    return [statistics.mean(values) for values in zip(*arms, strict=True)]


@cache
def teacher(seed):
    model = made(seed, 128, hidden=512)
    return train(model, plain(model), steps=300, seed=seed)


def test_a_student_by_distillation_beats_the_same_student_alone():
    """At equal steps, of pairs of which four in ten are wrong (as DataCompDR's, arXiv:2311.17049, of the web)."""
    names, arms = letters()[1], []
    for seed in SEEDS:

        def loss_of(model, wise, seed=seed):
            generator = torch.Generator().manual_seed(seed)

            def loss(chosen, pictures):
                wrong = torch.rand(len(chosen), generator=generator) < 0.4
                texts = names[torch.where(wrong, chosen[torch.randperm(len(chosen), generator=generator)], chosen)]
                given = {}
                if wise is not None:
                    with torch.no_grad():
                        given = {"teacher": wise(pictures, texts), "teacher_scale": wise.log_scale.exp().item()}
                    given["objective"] = {"type": "distillation", "alpha": 0.8}
                return contrastive_loss(model(pictures, texts), logit_scale=model.log_scale.exp(), **given)

            return loss

        students = [(made(seed, 16, hidden=48), wise) for wise in (None, teacher(seed))]
        arms.append([recall(train(model, loss_of(model, wise), seed=seed)) for model, wise in students])
    alone, taught = means(arms)
    assert taught > alone + 0.03, arms


def test_prefixes_that_were_trained_beat_truncated_ones():
    """Matryoshka (arXiv:2205.13147): the first 8 of 64 dimensions."""
    arms = []
    for seed in SEEDS:
        whole, nested = made(seed), made(seed)
        train(whole, plain(whole), seed=seed)
        train(nested, plain(nested, matryoshka=(8, 16, 64)), seed=seed)
        arms.append((recall(whole, 8), recall(nested, 8), recall(whole), recall(nested)))
    truncated, trained, whole, nested = means(arms)
    assert trained > truncated + 0.05 and nested > whole - 0.05, arms


def test_general_captions_lie_nearer_the_root():
    """MERU (arXiv:2304.09172): "Latin small letter" nearer than the letter's name, and that nearer than pictures."""
    _, names, kinds, _ = letters()
    for seed in SEEDS:
        model = made(seed, 16)
        raw = torch.nn.ParameterDict({f: torch.nn.Parameter(torch.tensor(16.0**-0.5)) for f in ("image", "text")})
        model.scales, general = raw, torch.Generator().manual_seed(seed)

        def rows(pictures, texts, model=model):
            return {"image": model.image(pictures) * model.scales["image"], "text": model.text(texts) * model.scales["text"]}

        def loss_of(chosen, pictures, model=model, rows=rows, general=general):
            kind = torch.rand(len(chosen), generator=general) < 0.3
            texts = torch.where(kind[:, None], kinds[chosen], names[chosen])
            ids = torch.where(kind, 10_000 + letters()[3][chosen], chosen)
            score = Hyperbolic(1.0, general="text", entailment=0.2)
            return contrastive_loss(rows(pictures, texts), score=score, logit_scale=model.log_scale.exp(), ids=ids)

        train(model, loss_of, steps=200, seed=seed)
        with torch.no_grad():
            particular, general_rows = (rows(letters()[0][:, -1], texts)["text"].norm(dim=1) for texts in (names, kinds))
            pictures = rows(letters()[0][:, -1], names)["image"].norm(dim=1)
        assert general_rows.mean() < particular.mean() < pictures.mean(), seed


def test_a_guided_mask_recovers_what_planted_duplicates_cost():
    """GISTEmbed's: every letter three times in a batch, and nobody says so; the oracle knows."""
    names, arms = letters()[1], []
    for seed in SEEDS:

        def loss_of(model, how, seed=seed):
            def loss(chosen, pictures):
                chosen, fonts = chosen[: len(chosen) // 3].repeat(3), torch.arange(len(chosen)) % 3
                rows = model(letters()[0][chosen, fonts], names[chosen])
                given = {"ids": chosen} if how == "oracle" else {}
                if how == "guide":
                    guide = teacher(seed)  # which trains, if no test before has asked for it
                    with torch.no_grad():
                        given["teacher"] = guide(letters()[0][chosen, fonts], names[chosen])
                    given["objective"] = {"type": "infonce", "false_negative_margin": -0.1, "guide": True}
                return contrastive_loss(rows, logit_scale=model.log_scale.exp(), **given)

            return loss

        models = {how: made(seed) for how in ("nobody", "guide", "oracle")}
        arms.append([recall(train(model, loss_of(model, how), seed=seed)) for how, model in models.items()])
    nobody, guide, oracle = means(arms)
    assert oracle > nobody + 0.02 and guide > nobody + 0.5 * (oracle - nobody), arms


def test_two_dropout_views_raise_uniformity():
    """SimCSE (arXiv:2104.08821): names against themselves, and each other, in one denominator."""
    names = letters()[1]

    def uniformity(model):
        with torch.no_grad():
            rows = F.normalize(model.text(names), dim=1)
        return torch.pdist(rows).square().mul(-2).exp().mean().log().item()

    for seed in SEEDS:
        model = made(seed, dropout=0.1)
        before = uniformity(model.eval())

        def two_views(chosen, _, model=model):
            views = {f"view{k}": F.normalize(model.text(names[chosen]), dim=1) for k in (1, 2)}
            pairing = {"type": "all_pairs", "same_field": True, "joint": "anchor"}
            return contrastive_loss(views, pairing=pairing, logit_scale=20.0, ids=chosen)

        after = uniformity(train(model.train(), two_views, steps=60, seed=seed))
        assert after < before - 1.0, (seed, before, after)


def test_graded_weights_move_ndcg():
    """GCL (arXiv:2404.08535): a picture is of its letter (gain 1), and somewhat of another of its kind (0.1), as often."""
    pictures, names, _, kinds = letters()
    other = torch.stack([(kinds == kind).nonzero()[(k * 7) % int((kinds == kind).sum()), 0] for k, kind in enumerate(kinds)])

    @torch.no_grad()
    def ndcg(model):
        rows = model(pictures[:, -1], names)
        scores = rows["image"] @ rows["text"].T
        gains = torch.zeros_like(scores)
        gains[torch.arange(len(other)), other] = 0.1
        gains.fill_diagonal_(1.0)
        places = scores.argsort(1, descending=True)
        discounts = 1.0 / torch.arange(2, len(scores) + 2).log2()
        best = (gains.sort(1, descending=True).values * discounts).sum(1)
        return ((gains.gather(1, places) * discounts).sum(1) / best).mean().item()

    arms = []
    for seed in SEEDS:

        def loss_of(model, weighted):
            def loss(chosen, pixels):
                half = len(chosen) // 2
                texts = torch.cat([chosen[:half], other[chosen[half:]]])
                weights = torch.where(texts == chosen, 1.0, 0.1) if weighted else None
                rows = model(pixels, names[texts])
                return contrastive_loss(rows, logit_scale=model.log_scale.exp(), ids=texts, sample_weights=weights)

            return loss

        models = made(seed), made(seed)
        arms.append(
            [
                ndcg(train(model, loss_of(model, weighted), seed=seed))
                for model, weighted in zip(models, (False, True), strict=True)
            ]
        )
    alike, graded = means(arms)
    assert graded > alike + 0.02, arms
