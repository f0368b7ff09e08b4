"""A fine-tuned model goes back into its library: unchanged if it learnt nothing, with its low-rank updates if it did."""

import pytest
import torch
import yaml

import mmcontrast
from mmcontrast.export.folder import export_model
from mmcontrast.finetune import make_config
from mmcontrast.finetune_request import Request
from mmcontrast.runs import make_run_context
from tests.command import train
from tests.export.models import TIMM, run
from tests.models.starts import KINDS, embedded, start_of, write_pairs, write_run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_learns_nothing_is_its_start_and_goes_back_as_it(kind, tmp_path):
    """With a rate of 0: the same embeddings, logit scale and bias after two steps, from the run's own folder; and exported, in
    the library itself, where parity is measured, and opened again."""
    folder, files = start_of(kind, tmp_path / "start"), write_pairs(kind, tmp_path)
    done = train(write_run(tmp_path, str(folder), train={"lr": 0.0}))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tuned"
    parity = export_model(run, tmp_path / "out", "huggingface" if "hf" in kind else "open_clip")
    assert max(one["largest_difference"] for one in parity["fields"].values()) < 1e-5
    before = mmcontrast.load(folder)
    assert (before.model.logit_bias is None) == (kind in ("clip", "hf clip", "hf clap"))
    for after, tolerance in ((mmcontrast.load(run), 1e-6), (mmcontrast.load(tmp_path / "out"), 1e-5)):
        torch.testing.assert_close(embedded(after, files), embedded(before, files), rtol=0, atol=tolerance)
        torch.testing.assert_close(after.model.log_logit_scale, before.model.log_logit_scale, rtol=0, atol=1e-6)
        biases = [one.model.logit_bias for one in (before, after)]
        assert biases == [None, None] or torch.allclose(*biases, rtol=0, atol=1e-6)
    again = yaml.safe_load((run / "config.yaml").read_text())
    assert list(again["fields"]) == before.fields and again["model"]["embed_dim"] == before.model.embed_dim


@pytest.mark.parametrize("kind", [pytest.param("siglip", marks=pytest.mark.slow), "hf clip"])
def test_low_rank_updates_are_in_the_weights(kind, tmp_path):
    """Exported, opened, and fine-tuned again."""
    folder, files = start_of(kind, tmp_path / "start"), write_pairs(kind, tmp_path)
    done = train(write_run(tmp_path, str(folder), model={"lora": {"rank": 2}}, train={"lr": 0.02}))
    assert done.returncode == 0, done.stderr
    export_model(tmp_path / "runs" / "tuned", tmp_path / "out", "huggingface" if "hf" in kind else "open_clip")
    tuned, after = mmcontrast.load(tmp_path / "runs" / "tuned"), mmcontrast.load(tmp_path / "out")
    torch.testing.assert_close(embedded(after, files), embedded(tuned, files), rtol=0, atol=1e-5)
    assert not torch.allclose(embedded(after, files), embedded(mmcontrast.load(folder), files), atol=1e-3)
    again = train(write_run(tmp_path, str(tmp_path / "out"), run={"name": "again", "dir": str(tmp_path / "runs")}))
    assert again.returncode == 0, again.stderr


def test_a_folder_of_our_own_is_fine_tuned_again(tmp_path):
    """A library's model, and one that a config composed: `finetune` plans them without their weights, and begins with them."""
    folder, composed = start_of("clip", tmp_path / "start"), run(tmp_path / "composed", TIMM)
    write_pairs("clip", tmp_path)
    for source in (folder, composed):
        out = tmp_path / f"out-{source.name}"
        export_model(source, out, "safetensors")
        config, _ = make_config(Request(str(out), str(tmp_path / "pairs.csv"), val=str(tmp_path / "pairs.csv")))
        weights, model = mmcontrast.load(source).model.state_dict(), make_run_context(config).model
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
