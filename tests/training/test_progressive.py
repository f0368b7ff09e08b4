"""Resolution and patch dropout by steps; traces; trackers; what the console says."""

import gzip
import json

import pytest
import torch
import yaml

from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.runs import make_run_context
from mmcontrast.training.loop import make_accelerator
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.progressive import apply_schedules, check_schedules, value_at
from tests.command import train

VIT = {"type": "timm", "model": "test_vit", "img_size": 48, "dynamic_img_size": True, "patch_drop_rate": 0.5}


@pytest.fixture
def with_vit(config_file):
    config = yaml.safe_load(config_file.read_text())
    config["fields"]["image"]["modality"] = {"type": "image", "size": 48}
    config["towers"]["image"] = VIT
    config["train"]["resolution"] = {"image": {0: 32, 3: 48}}
    config["train"]["patch_dropout"] = {"image": {0: 0.5, 4: 0.25, 5: 0.0}}
    config_file.write_text(yaml.safe_dump(config))
    return config_file


def test_value_at():
    assert [value_at({0: "a", 2: "b", 3: "c"}, step) for step in (0, 1, 2, 3, 9)] == ["a", "a", "b", "c", "c"]


def test_a_tower_sees_smaller_pictures_and_fewer_patches_at_first(with_vit):
    job = make_run_context(load_config(with_vit))
    check_schedules(job.model, job.options)
    seen = []
    job.model.towers["image"].network.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    pictures = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    for step in range(6):
        apply_schedules(job.model, job.options, step)
        job.model.train().encode("image", pictures)
    patch = job.model.towers["image"].network.patch_embed.patch_size[0]
    small, large = (32 // patch) ** 2, (48 // patch) ** 2
    assert seen == [1 + n for n in (small // 2, small // 2, small // 2, large // 2, int(large * 0.75), large)]
    apply_schedules(job.model, job.options, 0)
    whole = job.model.eval().encode("image", pictures)
    assert seen[-1] == 1 + large  # evaluation sees all of it
    apply_schedules(job.model, job.options, 5)
    torch.testing.assert_close(job.model.encode("image", pictures), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"resolution": {"image": {0: 32}}, "towers": {"dynamic_img_size": False}},
            "refuses pictures of 32.*dynamic_img_size",
        ),
        ({"resolution": {"text": {0: 32}}}, "field 'text' is no image"),
        ({"resolution": {"imag": {0: 32}}}, "did you mean 'image'"),
        ({"patch_dropout": {"image": {0: 0.5}}, "towers": {"patch_drop_rate": 0.0}}, "give a timm model patch_drop_rate"),
        ({"patch_dropout": {"txt": {0: 0.5}}}, "did you mean 'text'"),
    ],
)
def test_what_a_tower_cannot_do_is_said_before_training(with_vit, change, message):
    config = yaml.safe_load(with_vit.read_text())
    config["towers"]["image"] |= change.pop("towers", {})
    config["train"] |= {"resolution": {}, "patch_dropout": {}} | change
    with_vit.write_text(yaml.safe_dump(config))
    job = make_run_context(load_config(with_vit))
    with pytest.raises(UserError, match=message):
        check_schedules(job.model, job.options)


def test_the_first_stage_begins_at_0(with_vit):
    with pytest.raises(UserError, match=r"train\.resolution\.image: the first step of a stage must be 0"):
        load_config(with_vit, ["train.resolution.image={2: 32}"])


def test_a_run_in_stages_with_a_trace(with_vit, tmp_path):
    done = train(with_vit, "train.profile_steps=[2, 3]", "train.log_every=3")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    with gzip.open(run / "profile" / "steps-2-3-rank-00000.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::addmm" in names and any("backward" in str(name).lower() for name in names)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert 0 <= line["data_share"] <= 1 and line["samples_per_second_per_device"] == line["samples_per_second"]
    shown = [line for line in done.stderr.splitlines() if line.startswith("step 3/6")]
    assert len(shown) == 1 and "GiB" in shown[0] and "grad_norm" in shown[0] and "eta 0:" in shown[0]
    assert list((run / "tensorboard").iterdir())


@pytest.mark.parametrize(("name", "message"), [("wandbb", "did you mean 'wandb'"), ("clearml", "pip install clearml")])
def test_a_tracker_that_is_not_there(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        make_accelerator(TrainOptions(steps=1, batch_size=2, trackers={name: {}}), "x", tmp_path, {})
