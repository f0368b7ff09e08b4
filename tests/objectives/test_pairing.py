"""Candidates of an anchor's own field, its own candidates, false negatives: sentence-transformers' losses and dense forms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss
from tests.objectives.textbook import assert_all_close, unit, value_and_grads

N = 8
ROWS = {"objective": {"type": "infonce", "both_directions": False}}


class Columns(torch.nn.Module):
    """A model of sentence-transformers' kind, whose features are the embeddings."""

    def get_embedding_dimension(self):
        return 16

    def forward(self, features, **_):
        return {**features, "sentence_embedding": features["rows"]}


def theirs(loss_class, *columns, **options):
    losses = pytest.importorskip("sentence_transformers.losses")
    loss = getattr(losses, loss_class)(Columns(), **options)
    return loss([{"rows": rows} for rows in columns], None)


@pytest.mark.parametrize(
    ("pairing", "directions"),
    [({}, ("query_to_doc", "query_to_query", "doc_to_doc")), ({"joint": "anchor"}, ("query_to_doc", "query_to_query"))],
)
def test_one_denominator_is_sentence_transformers(pairing, directions):
    pairing = {"type": "all_pairs", "same_field": True, "joint": True} | pairing
    leaves = unit(N, 6, seed=0), unit(N, 6, seed=1)
    got = value_and_grads(lambda q, d: contrastive_loss({"q": q, "d": d}, pairing=pairing, logit_scale=20.0, **ROWS), *leaves)
    want = value_and_grads(
        lambda q, d: theirs("MultipleNegativesRankingLoss", q, d, directions=directions, partition_mode="joint"), *leaves
    )
    assert_alike(got, want, leaves)


def assert_alike(got, want, leaves):
    """Theirs makes the rows unit rows once more, so that its gradients are tangent."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-8)
    for a, b, rows in zip(got[1:], want[1:], leaves, strict=True):
        torch.testing.assert_close(a - (a * rows).sum(1, keepdim=True) * rows, b, rtol=1e-6, atol=1e-7)


class Guide(Columns):
    """Another model's embeddings of the same features."""

    def forward(self, features, **_):
        return {**features, "sentence_embedding": features["guide"]}


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_a_guide_is_sentence_transformers_gist(margin, monkeypatch):
    """Theirs leaves out what is above the positive less a margin; a negative margin of ours."""
    losses = pytest.importorskip("sentence_transformers.losses")
    q, d, u, v = (unit(N, 6, seed=k) for k in range(4))
    gist = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    torch.nn.Module.__init__(gist)  # whose own asks for tokenizers
    gist.model, gist.guide, gist.temperature, gist.margin, gist.margin_strategy = Columns(), Guide(), 0.05, margin, "absolute"
    gist.contrast_anchors = gist.contrast_positives = True
    gist.gather_across_devices = gist.must_retokenize = False
    gist.similarity_fct, gist.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    want = value_and_grads(lambda q, d: gist([{"rows": q, "guide": u}, {"rows": d, "guide": v}], None), q, d)
    got = value_and_grads(
        lambda q, d: contrastive_loss(
            {"q": q, "d": d},
            objective={"type": "infonce", "false_negative_margin": -margin, "guide": True, "both_directions": False},
            pairing={"type": "all_pairs", "same_field": True, "joint": True},
            teacher={"q": u, "d": v},
            logit_scale=20.0,
        ),
        q,
        d,
    )
    assert_alike(got, want, (q, d))


def test_two_views_in_one_denominator_are_simclrs():
    """NT-Xent (arXiv:2002.05709, equation 1) over 2N views."""
    leaves = unit(N, 6, seed=0), unit(N, 6, seed=1), torch.tensor(5.0).double()

    def nt_xent(a, b, scale):
        views = torch.cat([a, b])
        scores = (scale * views @ views.T).fill_diagonal_(-torch.inf)
        return F.cross_entropy(scores, torch.arange(2 * N).roll(N))

    pairing = {"type": "all_pairs", "same_field": ["b-a"], "joint": "anchor"}
    got = value_and_grads(lambda a, b, s: contrastive_loss({"a": a, "b": b}, pairing=pairing, logit_scale=s), *leaves)
    assert_all_close(got, value_and_grads(nt_xent, *leaves), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize(
    ("joint", "margin", "scale"), itertools.product([False, "anchor", True, "pair"], [None, 0.1], [1.0, 100.0])
)
def test_own_fields_and_own_candidates_are_the_textbooks(joint, margin, scale, backend):
    """With shared ids, absent samples, candidates that not all have, and false negatives left out (Qwen3-Embedding's mask)."""
    ids = torch.tensor([0, 1, 1, 3, 4, -1, 6, 7])
    keep, there = ids >= 0, torch.rand(N, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    leaves = [unit(N, 6, seed=0), unit(N, 6, seed=1), unit(N, 3, 6, seed=2), torch.tensor(scale).double()]

    def textbook(a, b, own, s):
        a, b, own, group, has = a[keep], b[keep], own[keep], ids[keep], there[keep]
        other = group[:, None] != group
        p, losses = (a * b).sum(1), []
        for rows, columns, more in ((a, b, own), (b, a, None)):
            sets = [(rows @ columns.T, other)]
            if more is not None:
                sets.append((torch.einsum("nd,nkd->nk", rows, more), has))
            within = [(rows @ rows.T, other), (columns @ columns.T, other), (columns @ rows.T, other)]
            sets += within[: {False: 0, "anchor": 1, True: 2, "pair": 3}[joint]]
            for chosen in [sets] + ([within[:1]] if joint is False else []):
                scores, kept = (torch.cat(parts, 1) for parts in zip(*chosen, strict=True))
                if margin is not None:
                    kept = kept & ~(scores > p[:, None] + margin)
                z = torch.cat([s * p[:, None], (s * scores).masked_fill(~kept, -torch.inf)], 1)
                losses.append((z.logsumexp(1) - s * p).mean())
        return torch.stack(losses).mean()

    def ours(a, b, own, s):
        return contrastive_loss(
            {"a": a, "b": b},
            objective={"type": "infonce", "false_negative_margin": margin},
            pairing={"type": "all_pairs", "same_field": True, "joint": joint},
            own_negatives={"b": (own, there)},
            logit_scale=s,
            ids=ids,
            backend=backend,
            tile_size=3,
        )

    got, want = value_and_grads(ours, *leaves), value_and_grads(textbook, *leaves)
    assert_all_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairing": {"type": "all_pairs", "joint": True}}, "joint needs same_field"),
        ({"pairing": {"type": "all_pairs", "same_field": True, "joint": "none"}}, "joint is 'none'"),
        ({"pairing": {"type": "all_pairs", "same_field": ["a-c"]}}, "no term is named 'a-c'; there is a-b"),
        (
            {"own_negatives": {"b": torch.zeros(3, 2, 5)}},
            r"own_negatives of field 'b' are \(3, 2, 5\).*they must be \[3, K, 4\]",
        ),
        ({"own_negatives": {"x": torch.zeros(3, 2, 4)}}, "own_negatives names a field 'x'"),
        ({"objective": {"type": "infonce", "guide": True}}, "guide needs a false_negative_margin"),
        ({"objective": {"type": "infonce", "label_smoothing": 1.0}}, "label_smoothing is 1.0"),
        ({"matryoshka": (2, 5)}, "matryoshka: width 5 of embeddings of width 4"),
        ({"matryoshka": (2, 4), "score": "lorentz"}, "prefixes need an objective without memory, and cosines"),
        ({"score": {"type": "lorentz", "general": "c"}}, "score: general is 'c', which is none of the fields a, b"),
        ({"score": {"type": "lorentz", "entailment": -1.0}}, "entailment is -1.0, it must be ≥ 0"),
        ({"score": "lorentz", "objective": "debiased"}, "Debiased is a formula of cosines"),
    ],
)
def test_mistakes_are_named(change, message):
    rows = {f: unit(3, 4, seed=k) for k, f in enumerate("ab")}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(rows, **{"logit_scale": 1.0} | change)


@pytest.mark.parametrize("option", [{"score": "lorentz"}, {"objective": {"type": "infonce", "false_negative_margin": 0.1}}])
def test_products_of_all_fields_have_no_scores_of_two(option):
    rows = {f: unit(3, 4, seed=k) for k, f in enumerate("abc")}
    with pytest.raises(ValueError, match="concerns scores of two fields: pairing multilinear takes none"):
        contrastive_loss(rows, pairing="multilinear", logit_scale=1.0, **option)


def test_prefixes_are_losses_of_their_own():
    """As sentence-transformers' MatryoshkaLoss around its ranking loss."""
    losses = pytest.importorskip("sentence_transformers.losses")
    leaves = unit(N, 16, seed=0), unit(N, 16, seed=1)

    def wrapped(a, b):
        inner = losses.MultipleNegativesRankingLoss(Columns())
        loss = losses.MatryoshkaLoss(inner.model, inner, [16, 8, 4], [1.0, 0.5, 2.0])
        return loss([{"rows": a}, {"rows": b}], None)

    def ours(a, b):
        return contrastive_loss({"a": a, "b": b}, matryoshka={16: 1.0, 8: 0.5, 4: 2.0}, logit_scale=20.0, **ROWS)

    got, want = value_and_grads(ours, *leaves), value_and_grads(wrapped, *leaves)
    assert_alike(got, want, leaves)
    total = 0.0
    for width, weight in ((16, 1.0), (8, 0.5), (4, 2.0)):
        prefixes = {f: F.normalize(rows[:, :width], dim=1) for f, rows in zip("ab", leaves, strict=True)}
        total = total + weight * contrastive_loss(prefixes, logit_scale=20.0, **ROWS)
    torch.testing.assert_close(got[0], total)
