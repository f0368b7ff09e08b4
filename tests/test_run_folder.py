"""Run folders: what a failed start leaves does not block the corrected command, and nothing else is taken for that."""

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.run_folder import check_folder, never_began, prepare_folder
from mmcontrast.slurm import check_run


def test_a_start_that_failed_does_not_block_the_corrected_command(config_file, tmp_path):
    folder, other = tmp_path / "runs" / "small", tmp_path / "other" / "model.safetensors"
    other.parent.mkdir()
    save_file({"weight": torch.ones(2)}, other)
    for wrong, message in (
        ("data.train=/none.tar", "none.tar"),
        ("train.init_from=/none.safetensors", "no weights at /none.safetensors"),
        (f"train.init_from={tmp_path}", "holds no model"),
        (f"train.init_from={config_file}", "is no .safetensors file, or damaged"),
        (f"train.init_from={other}", "model.safetensors: log_logit_scale is missing in it: another architecture"),
        ("train.freeze={towers.none.*: null}", "towers.none"),  # after the folder was made
        ("train.trackers={none: {}}", "train.trackers: no 'none'"),
    ):
        done = CliRunner().invoke(app, ["train", str(config_file), wrong])
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output
        assert not (tmp_path / "runs").exists()
        corrected = load_config(config_file, ["train.steps=3"])
        check_folder(corrected, resume=False, overwrite=False)
        check_run(corrected, resume=False)
    prepare_folder(corrected, overwrite=False)
    (folder / "stopped.json").write_text("{}")
    prepare_folder(corrected, overwrite=False)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_config(folder / "config.yaml") == corrected


@pytest.mark.parametrize("kept", ["checkpoints/step-00000002", "metrics.jsonl", "results.json", "notes.txt", "report.html"])
def test_what_a_run_or_its_user_has_there_is_kept(config_file, kept):
    config = load_config(config_file)
    prepare_folder(config, overwrite=False)
    file = config.folder / kept
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert not never_began(config.folder)
    with pytest.raises(UserError, match=rf"small exists: {'continue' if 'step' in kept else 'replace'} it with --"):
        check_folder(config, resume=False, overwrite=False)
    prepare_folder(config, overwrite=False)
    assert file.exists()


def test_a_folder_with_somebodys_own_config_is_no_run(config_file, tmp_path):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    for text in (config_file.read_text().replace("name: small", "name: another"), "a: 1", "[", ""):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="small exists: replace it with --overwrite, or set run.name"):
            check_folder(load_config(config_file), resume=False, overwrite=False)
