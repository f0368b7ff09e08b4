"""Models of hyperbolic scores (MERU): trained from a config, kept, opened, evaluated; each against formulas written here."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmcontrast import contrastive_loss, load
from mmcontrast.blend.run import blend_models
from mmcontrast.config import load_config
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.probes import knn
from mmcontrast.export.folder import export_model
from mmcontrast.models import ScoreOptions
from mmcontrast.runs import make_run_context, open_run
from mmcontrast.score import Lorentz
from mmcontrast.search.index import build_index
from mmcontrast.search.searcher import Searcher
from mmcontrast.training.grad_cache import cached_backward
from mmcontrast.training.optim import make_optimizer
from tests.command import mmcontrast
from tests.results import results_of
from tests.training.samples import make_batch
from tests.training.samples import make_model as dropout_model
from tests.training.teaching import run, write_config, write_vectors

SCORE = {"type": "lorentz", "curvature": 0.5, "general": "b"}
LEARNT = ["hyperbolic.log_curvature", "hyperbolic.log_scales.a", "hyperbolic.log_scales.b"]


@pytest.fixture
def shards(tmp_path):
    return write_vectors(tmp_path / "a.tar")


def weights(job, step, name="model"):
    return load_file(job.folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def distances(x, y, c):
    """Return [N, M] of tangent vectors at the origin, in float64."""
    x, y = x.double(), y.double()

    def point(v):
        r = math.sqrt(c) * v.norm(dim=1, keepdim=True)
        return torch.cat([torch.cosh(r) / math.sqrt(c), torch.sinh(r) / r * v], 1)

    x, y = point(x), point(y)
    return torch.acosh((c * (x[:, :1] * y[:, :1].T - x[:, 1:] @ y[:, 1:].T)).clamp_min(1.0)) / math.sqrt(c)


def test_a_run_learns_its_curvature_and_goes_on_bitwise(tmp_path, shards):
    train = {"steps": 4, "schedule": "constant", "ema_decay": 0.5, "checkpoint_every": 1, "keep_checkpoints": 9}
    paths = [write_config(tmp_path, shards, name, train=train, score=SCORE) for name in ("whole", "parts")]
    whole = run(paths[0])
    run(paths[1], "train.steps=2")
    parts = run(paths[1], resume=True)
    ours, theirs = weights(whole, 4), weights(parts, 4)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    begun = [math.log(0.5), *[-0.5 * math.log(8)] * 2]
    assert all(abs(ours[name].item() - start) > 1e-3 for name, start in zip(LEARNT, begun, strict=True))
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["curvature"] for line in lines] == pytest.approx(
        [0.5, *(weights(whole, step)[LEARNT[0]].exp().item() for step in (1, 2, 3))]
    )
    opened = open_run(whole.folder, device="cpu").model.state_dict()
    assert all(torch.equal(opened[name], weights(whole, 4, "ema")[name]) for name in LEARNT)
    groups = {id(p): g["weight_decay"] for g in make_optimizer(whole.model, whole.options).param_groups for p in g["params"]}
    assert {groups[id(p)] for n, p in whole.model.named_parameters() if n in LEARNT} == {0.0}
    still = run(paths[1], "run.name=still", "score.learn_curvature=false", "train.steps=2")
    assert weights(still, 2)[LEARNT[0]].exp().item() == pytest.approx(0.5) and "general: b" in still.config
    with torch.no_grad():
        still.model.hyperbolic.log_curvature.fill_(-9.0)
        still.model.hyperbolic.log_scales["a"].fill_(0.1)
    still.model.clamp_logit_scale()
    assert still.model.hyperbolic.curvature.item() == pytest.approx(0.05) and still.model.hyperbolic.log_scales["a"].item() == 0


def test_caching_gives_the_gradients_of_the_whole():
    batch = make_batch(12)
    models = [dropout_model(score=ScoreOptions(type="lorentz", curvature=0.5)).eval() for _ in range(2)]

    def loss_of(embeddings):
        score = {"type": "lorentz", "curvature": embeddings.curvature, "general": "b"}
        scales = {"logit_scale": embeddings.logit_scale, "logit_bias": embeddings.logit_bias}
        return contrastive_loss(embeddings.fields, objective="siglip", score=score, ids=batch.ids, **scales)

    loss_of(models[0](batch)).backward()
    cached_backward(models[1], batch, 5, loss_of)
    kept, cached = ({n: p.grad for n, p in model.named_parameters()} for model in models)
    torch.testing.assert_close(cached, kept, rtol=1e-12, atol=1e-14)
    assert all(kept[f"hyperbolic.{name}"].item() for name in ("log_curvature", "log_scales.own", "log_scales.shared"))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_train_and_evaluate_as_one(tmp_path, shards, parallel):
    """The one directly, the two by gradient caching and with the loss's mean over the ranks."""
    path = write_config(tmp_path, shards, score=SCORE, train={"steps": 3}, evaluation={"splits": {"val": str(shards)}})
    one = run(path, "run.name=one")
    options = ["run.name=two", f"train.parallel={parallel}", "train.micro_batch_size=3"]
    done = mmcontrast("train", path, *options, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    two = load_file(tmp_path / "runs" / "two" / "checkpoints" / "step-00000003" / "model.safetensors")
    for name, tensor in weights(one, 3).items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    theirs = results_of(tmp_path / "runs" / "two")
    assert theirs == pytest.approx(results_of(one.folder), abs=1e-4) and "val/geometry/b/radius" in theirs


def test_what_is_evaluated_is_what_distances_say(config_file, tmp_path):
    """Retrieval, classes by prompts, neighbours and logits of a run, from its embeddings by the formulas above."""
    zero_shot = {"label": "script", "templates": ["a {}", "the {} here"], "classes": {"Latin": ["Latin"], "Greek": ["Greek"]}}
    options = ["train.steps=2", "score={type: lorentz, general: text}", "evaluation.resamples=0"]
    job = run(config_file, *options, f"evaluation.zero_shot={json.dumps({'script': zero_shot})}")
    results, shards = results_of(job.folder), job.config and load_config(config_file).evaluation.splits["val"]
    embedder = load(job.folder, device="cpu")
    c = embedder.model.hyperbolic.curvature.item()
    assert embed_shards(str(job.folder), shards, tmp_path / "table", device="cpu")
    table = EmbeddingTable.read(tmp_path / "table")
    assert table.curvature == c and c != 1
    image, text = table.fields["image"], table.fields["text"]
    apart = distances(image, text, c)
    mrr = (1 / (1 + (apart.diag()[:, None] > apart.T).sum(1))).mean().item()
    assert results["val/retrieval/text_to_image/mrr"] == pytest.approx(mrr, abs=1e-6)
    assert not torch.equal(apart.argsort(1), (image.double() @ text.double().T).argsort(1, descending=True))  # by products
    assert results["val/geometry/text/radius"] == pytest.approx(text.double().norm(dim=1).mean().item())
    torch.testing.assert_close(embedder.similarity(image, text), -apart.float(), rtol=1e-4, atol=1e-4)
    scale = embedder.model.log_logit_scale.exp()
    torch.testing.assert_close(embedder.logits(image, text), -scale * apart.float(), rtol=1e-4, atol=1e-3)
    prompts = [embedder.embed(texts=[f"a {name}", f"the {name} here"]).mean(0) for name in ("Latin", "Greek")]
    labels = [entry["script"] for entry in table.metadata]
    known = torch.tensor([label in ("Latin", "Greek") for label in labels])
    predicted = distances(image[known], torch.stack(prompts), c).argmin(1)
    right = [("Latin", "Greek")[k] for k in predicted.tolist()]
    truth = [label for label, kept in zip(labels, known.tolist(), strict=True) if kept]
    assert results["val/zero_shot/script/top1"] == pytest.approx(sum(map(str.__eq__, right, truth)) / len(truth))
    build_index(tmp_path / "table", progress=False)
    searcher = Searcher.open(tmp_path / "table" / "index", device="cpu")
    hits = searcher.search("image", k=24, text="Latin")
    rows, wanted = [hit.row for hit in hits], distances(embedder.embed(texts=["Latin"]), image, c)[0]
    assert sorted(rows) == list(range(len(image)))
    assert [hit.score for hit in hits] == pytest.approx((-wanted[rows]).tolist(), abs=1e-6)
    assert wanted[rows].tolist() == pytest.approx(wanted.sort().values.tolist(), abs=1e-6)
    (hit,), away = searcher.index.neighbours(3, "image", 1), distances(image[3:4], image, c)[0]
    assert away[hit.row].item() == pytest.approx(away.sort().values[1].item(), abs=1e-6)
    entry = json.loads((tmp_path / "table" / "index" / "index.json").read_text())["fields"]["image"]
    assert (entry["kind"], entry["recall"]["value"], entry["recall"]["queries"]) == ("flat", 1.0, "audio")
    with pytest.raises(UserError, match="--kind hnsw: the table's scores are hyperbolic"):
        build_index(tmp_path / "table", tmp_path / "graph", kind="hnsw", progress=False)


def test_neighbours_vote_by_distance():
    random = torch.Generator().manual_seed(0)
    rows, test = (torch.randn(n, 4, generator=random) for n in (40, 30))
    labels = torch.randint(3, (40,), generator=random)
    nearest, found = distances(test, rows, 0.7).topk(5, largest=False)
    votes = torch.nn.functional.one_hot(labels[found]) * (-nearest / 0.5).exp()[..., None]
    link = Lorentz(0.7)
    compared = link.rows(rows.double(), columns=True), labels, link.rows(test.double(), columns=False)
    got = knn(*compared, 5, temperature=0.5, distances=link)
    assert torch.equal(got, votes.sum(1).argmax(1)) and not torch.equal(got, knn(rows, labels, test, 5, temperature=0.5))


def test_what_is_made_of_it_is_hyperbolic_too(tmp_path, shards):
    """An export of our own, a soup, and what begins with it; other libraries and teachers know cosines alone."""
    job = run(write_config(tmp_path, shards, score=SCORE))
    export_model(job.folder, tmp_path / "own", "safetensors")
    both = [load(name, device="cpu") for name in (job.folder, tmp_path / "own")]
    rows = [one.embed(vectors=[np.ones(6, np.float32)]) for one in both]
    assert torch.equal(*rows) and rows[0].norm() != pytest.approx(1)
    assert torch.equal(both[1].similarity(rows[1], -rows[1]), both[0].similarity(rows[0], -rows[0]))
    for kind in ("open_clip", "onnx", "sentence-transformers"):
        with pytest.raises(UserError, match=f"--format {kind} holds models of cosines"):
            export_model(job.folder, tmp_path / kind, kind)
    with pytest.raises(UserError, match="width=4: the model's scores are hyperbolic"):
        load(job.folder, device="cpu", width=4)
    blend_models([str(job.folder)] * 2, tmp_path / "soup", soup="uniform", device="cpu")
    assert torch.equal(load(tmp_path / "soup", device="cpu").embed(vectors=[np.ones(6, np.float32)]), rows[0])
    plain = write_config(tmp_path, shards, "plain")
    options = [f"train.teacher={job.folder}", "objective=distillation"]
    with pytest.raises(UserError, match=r"train.teacher: the scores of .* are hyperbolic"):
        make_run_context(load_config(plain, options))
    fields = "fields={a: {keys: [a.npy]}, b: {keys: [b.npy]}}"
    began_with = [f"model.start={job.folder}", fields, "towers={}", "model.embed_dim=null"]
    further = make_run_context(load_config(plain, began_with))
    assert further.score.general == "b" and "general: b" in further.config
    assert all(torch.equal(further.model.state_dict()[name], tensor) for name, tensor in weights(job, 2).items())
    flat = run(plain)
    bent = run(plain, f"model.start={flat.folder}", *began_with[1:], "run.name=bent", "score=lorentz", "train.lr=0")
    state = bent.model.state_dict()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in weights(flat, 2).items()) and set(state) == set(LEARNT)
    export_model(bent.folder, tmp_path / "bent", "safetensors")
    assert load(tmp_path / "bent", device="cpu").model.score == ScoreOptions(type="lorentz")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score={type: lorentz, general: c}", "score: general is 'c', which is none of the fields a, b"),
        ("score={type: lorenz}", "score.type: input should be 'lorentz'"),
        ("score={type: lorentz, curvatur: 1}", "unknown key 'score.curvatur'; did you mean 'curvature'"),
        ("score={type: lorentz, curvature: 0}", "score.curvature"),
        ("objective=debiased", "Debiased is a formula of cosines"),
        (
            "pairing=multilinear; fields.c={modality: {type: vector, width: 6}, tower: a}",
            "score concerns scores of two fields: pairing multilinear takes none",
        ),
        ("train.matryoshka=[4, 8]", "train.matryoshka: prefixes are of cosines"),
        ("evaluation.whiten=true", "evaluation.whiten: it is of cosines"),
        ("evaluation.scoring=csls", "evaluation.scoring: it is of cosines"),
        ("evaluation.widths=[4]", "evaluation.widths: it is of cosines"),
    ],
)
def test_what_needs_cosines_is_refused(tmp_path, shards, override, message):
    path = write_config(tmp_path, shards, score=SCORE, evaluation={"splits": {"val": str(shards)}})
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(path, override.split("; ")))
