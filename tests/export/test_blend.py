"""Blends: weights as made by hand, ends that are the ends, soups that are not below their best member."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmcontrast
from mmcontrast.blend.curve import evaluator, greedy_soup, uniform_soup
from mmcontrast.blend.run import blend_models
from mmcontrast.blend.weights import blended, state_of, wise_ft
from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from tests.export.blends import runs
from tests.export.models import TIMM, changed, run
from tests.models.open_clip_models import save
from tests.models.samples import TEXTS

METRIC = "new/retrieval/image_to_text/recall_at_1"


def weights(folder):
    return load_file(folder / "checkpoints" / "step-00000001" / "model.safetensors")


def same(first, second):
    assert first.keys() == second.keys()
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in ((first[name], second[name]) for name in first))


def test_weights_are_those_made_by_hand(config_file, corpus, tmp_path):
    folders = runs(config_file, corpus, 3)
    states = [weights(folder) for folder in folders]
    for alpha in (0.0, 0.3, 0.5, 1.0):
        out = tmp_path / f"alpha{alpha}"
        blend_models(folders[:2], out, alpha=alpha)
        made = load_file(out / "model.safetensors")
        for name, value in made.items():
            first, last = states[0][name], states[1][name]
            if value.is_floating_point():
                torch.testing.assert_close(
                    value, ((1 - alpha) * first.double() + alpha * last.double()).float(), atol=0, rtol=1e-7
                )
            else:
                assert torch.equal(value, last if alpha >= 0.5 else first)  # batches that were counted
            assert alpha not in (0.0, 1.0) or torch.equal(value, (first, last)[int(alpha)])
    assert any("num_batches" in name for name in made) and any("running_var" in name for name in made)
    half = mmcontrast.load(tmp_path / "alpha0.5").model
    scales = [math.exp(state["log_logit_scale"].item()) for state in states]
    assert half.log_logit_scale.exp().item() == pytest.approx(math.sqrt(scales[0] * scales[1]))
    assert half.logit_bias.item() == pytest.approx((states[0]["logit_bias"] + states[1]["logit_bias"]).item() / 2)
    blend_models(folders, tmp_path / "soup", soup="uniform")
    soup = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in soup.items():
        if value.is_floating_point():
            expected = sum(state[name].double() for state in states) / 3
            torch.testing.assert_close(value, expected.float(), atol=1e-8, rtol=1e-6)
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "a soup (uniform) of member0, member1, member2" in card and "2203.05482" in card


def test_the_ends_of_the_curve_are_the_models(config_file, corpus, tmp_path):
    folders = runs(config_file, corpus, 2)
    command = ["blend", *map(str, folders), "--curve", "--out", str(tmp_path / "curve"), "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert curve["alphas"] == [number / 10 for number in range(11)] and len(curve["results"][METRIC]) == 11
    options = load_config(folders[0] / "config.yaml").evaluation
    for place, folder in ((0, folders[0]), (-1, folders[1])):
        embedder = mmcontrast.load(folder, device="cpu")
        found = evaluator(embedder, options, cached=False)(state_of(embedder.model))
        ends = {name: row[place] for name, row in curve["results"].items()}
        assert same({n: v["value"] if v["value"] is not None else math.nan for n, v in ends.items()}, found.values)
        low, high = found.intervals[METRIC]
        assert (ends[METRIC]["low"], ends[METRIC]["high"]) == (low, high)
    middle = [row[5]["value"] for row in curve["results"].values()]
    assert middle != [row[0]["value"] for row in curve["results"].values()]
    assert (tmp_path / "curve" / "curve.svg").stat().st_size > 5000 and (tmp_path / "curve" / "curve.png").exists()
    with pytest.raises(UserError, match="did you mean"):
        blend_models(
            list(map(str, folders)), tmp_path / "curve", metrics=["new/retrieval/image_to_text/recall_at_11"], device="cpu"
        )


def test_a_greedy_soup_is_what_it_says(config_file, corpus, tmp_path):
    folders = runs(config_file, corpus, 3, seed=5)
    about = blend_models(folders, tmp_path / "soup", soup="greedy", metrics=[METRIC], device="cpu")
    assert about["value"] >= max(about["alone"]) and set(about["members"]) <= {0, 1, 2}
    embedder = mmcontrast.load(tmp_path / "soup", device="cpu")
    options = load_config(folders[0] / "config.yaml").evaluation
    found = evaluator(embedder, options, cached=False)(state_of(embedder.model))
    assert found.values[METRIC] == about["value"]
    members = [weights(folders[number]) for number in about["members"]]
    made = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in blended(members, [1 / len(members)] * len(members)).items():
        assert torch.equal(made[name], value)


def test_greedy_soups_of_points_on_a_line():
    """The nearer to 0 the better; a lower loss is better too."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        states = [{"w": torch.randn(1, generator=generator)} for _ in range(6)]
        for metric, sign in (("val/accuracy", -1), ("val/loss", 1)):
            soup = greedy_soup(states, metric, lambda s, m=metric, k=sign: SimpleNamespace(values={m: k * s["w"].abs().item()}))
            best = min(state["w"].abs().item() for state in states)
            assert abs(soup.value) <= best and abs(soup.value) == soup.state["w"].abs().item()
            expected = torch.stack([states[number]["w"].double() for number in soup.members]).mean(0)
            torch.testing.assert_close(soup.state["w"].double(), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(UserError, match="did you mean 'val/loss'"):
        greedy_soup(states, "val/los", lambda _: SimpleNamespace(values={"val/loss": 1.0}))
    torch.testing.assert_close(uniform_soup(states).state["w"][0], torch.stack([state["w"] for state in states]).mean())
    assert torch.equal(wise_ft(states[0], states[1], 1.0)["w"], states[1]["w"])


def test_models_of_libraries_are_blended_and_open_again(tmp_path):
    first, last = save(tmp_path / "first", "coca"), save(tmp_path / "last", "coca")
    blend_models([str(first), str(last)], tmp_path / "out", alpha=0.25)
    made, again = mmcontrast.load(tmp_path / "out"), tmp_path / "out" / "library" / "open_clip_model.safetensors"
    ends = [load_file(folder / "open_clip_model.safetensors") for folder in (first, last)]
    for name, value in load_file(again).items():  # the decoder too, which no tower has
        torch.testing.assert_close(value, 0.75 * ends[0][name] + 0.25 * ends[1][name], atol=1e-6, rtol=1e-6)
    assert made.embed(texts=TEXTS).isfinite().all()


def test_what_is_no_pair_is_refused(config_file, corpus, tmp_path):
    base = run(tmp_path / "base", TIMM)
    quick = {"type": "open_clip", "model": "tiny-clip", "part": "image"}
    clip = changed(towers__image=quick, fields__image__modality__size=32)
    other = changed(towers__image=quick | {"force_quick_gelu": True}, fields__image__modality__size=32)
    cases = {
        "another architecture": (base, run(tmp_path / "depth", changed(towers__text__layers=1))),
        r"is \[20, 64\] in the former": (run(tmp_path / "wide", changed(model__embed_dim=24)), base),
        "QuickGELU": (run(tmp_path / "gelu", clip), run(tmp_path / "quick", other)),
        "field 'image' is prepared otherwise": (base, run(tmp_path / "mean", changed(fields__image__modality__mean=[0.1] * 3))),
        "field 'text' is prepared otherwise": (
            base,
            run(tmp_path / "short", changed(fields__text__modality__context_length=9)),
        ),
    }
    for reason, pair in cases.items():
        with pytest.raises(UserError, match=reason) as error:
            blend_models(pair, tmp_path / "out", alpha=0.5)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    said = {
        "one of --alpha, --curve and --soup": [str(base), str(base)],
        "uniform or greedy": [str(base), str(base), "out", "--soup", "best"],
        "needs --metric": [str(base), str(base), "out", "--soup", "greedy"],
        "--out is of --curve": [str(base), "a", "b", "--soup", "uniform", "--out", "c"],
        "OUT comes last": [str(base), "out", "--alpha", "0.5"],
        "blends two models: 3 named": [str(base)] * 3 + ["--curve"],
    }
    for reason, arguments in said.items():
        done = CliRunner().invoke(app, ["blend", *arguments])
        assert done.exit_code == 2 and reason in " ".join(done.output.split()), (reason, done.output)
