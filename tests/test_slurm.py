"""Scripts that would be submitted to Slurm, and what is refused before. With a real Slurm: tests/slurm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mmcontrast import slurm
from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.run_folder import prepare_folder
from mmcontrast.runs import completed, model_of
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.models.open_clip_models import save

ROOT = Path(__file__).parent.parent


def command(*arguments, **options):
    return CliRunner().invoke(app, [*map(str, arguments)], **options)


def submit(config_file, *arguments):
    return command("submit", config_file, "--time", "04:00:00", "--nodes", 2, *arguments)


def check_shell(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "") and "@@" not in script


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_a_dry_run_prints_the_script_and_writes_nothing(config_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    further = ["--partition", "a100", "--sbatch", "constraint=big mem", "--sbatch", "exclusive", "--warn", 300]
    done = submit(config_file, "--gpus-per-node", 4, *further, "data.num_workers=3", "--dry-run")
    assert done.exit_code == 0 and sorted(tmp_path.rglob("*")) == before
    check_shell(done.stdout)
    wanted = {"job-name=small", "time=04:00:00", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=16"}
    wanted |= {"partition=a100", "constraint='big mem'", "exclusive", "signal=B:USR1@300", "requeue", "open-mode=append"}
    assert wanted <= set(directives(done.stdout)) and "processes=4 " in done.stdout


def test_two_scripts_where_the_run_is_evaluated_after(config_file, tmp_path):
    done = submit(config_file, "--gpus-per-node", 0, "--procs-per-node", 2, "--evaluate-after", "--dry-run")
    training, evaluation = done.stdout.split("#!/bin/bash\n")[1:]
    check_shell(training)
    check_shell(evaluation)
    assert "nodes=1" in directives(evaluation) and "processes=2 " in training and "gpus-per-node" not in done.stdout
    assert f"exec {sys.executable} -m mmcontrast evaluate {tmp_path}/runs/small --trust-code\n" in evaluation


def test_names_are_words_of_the_shell_and_nothing_else(config_file, tmp_path):
    name = "it's $(touch /tmp/owned) 100%"
    done = submit(config_file, f"run.name={json.dumps(name)}", "--dry-run")
    check_shell(done.stdout)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("run=")]
    said = subprocess.run(["bash", "-c", f'{line}; printf %s "$run"'], capture_output=True, text=True).stdout
    assert said == f"{tmp_path}/runs/{name}"
    assert any(line.startswith("output=") and "100%%.slurm/" in line for line in directives(done.stdout))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "4h"], "--time '4h' is not of the form HH:MM:SS"),
        (["--warn", "20000"], "--warn 20000: the warning would come before the job starts"),
        (["--procs-per-node", "2"], "a process for each GPU"),
        (["--nodes", "3"], "3 nodes of 1 processes are 3 ranks: train.batch_size, which is 16"),
        (["data.lanes=1"], "are 2 ranks"),
        (["--sbatch", "nodes=4"], "the command sets nodes itself"),
        (["--sbatch", "Constraint a100"], "not of the form KEY=VALUE"),
        (["--sbatch", "comment=a\n#SBATCH --uid=0"], "has more than one line"),
        (["train.stps=5"], "did you mean 'steps'"),
        (["objective=infonse"], "did you mean 'infonce'"),
        (["--evaluate-after", "evaluation.splits={}"], "--evaluate-after: the config has no evaluation.splits"),
        ([], "sbatch is not found: submit where Slurm is installed, or look at the script with --dry-run"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(config_file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    done = submit(config_file, *arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_continued_with_its_own_config_or_on_demand(config_file, tmp_path):
    config = load_config(config_file)
    prepare_folder(config, overwrite=False)
    (config.folder / "metrics.jsonl").write_text('{"step": 1}\n')  # it has begun
    assert submit(config_file, "--dry-run").exit_code == 0
    other = submit(config_file, "train.lr=0.5", "--dry-run")
    assert other.exit_code == 2 and "(train.lr=0.001 there and 0.5 here): continue it with this one by --resume" in " ".join(
        other.stderr.split()
    )
    assert submit(config_file, "train.lr=0.5", "--resume", "--dry-run").exit_code == 0
    checkpoint.save(config.folder / "checkpoints", 6, Contents({}, {}, {}, ""))
    complete = submit(config_file, "--dry-run")
    assert complete.exit_code == 2 and "already has its 6 steps" in " ".join(complete.stderr.split())
    assert submit(config_file, "train.steps=8", "--resume", "--dry-run").exit_code == 0
    (config.folder / "config.yaml").unlink()
    assert "is not a run's folder" in " ".join(submit(config_file, "--dry-run").stderr.split())


def test_a_run_that_starts_from_a_model_is_continued(tmp_path):
    """Its own config has the model's fields, dimension and logit bias, which the submitted one leaves to the start."""
    config_file, start = tmp_path / "config.yaml", save(tmp_path / "start", "siglip")
    tree = {"run": {"name": "x", "dir": str(tmp_path / "runs")}, "model": {"start": str(start)}, "objective": "siglip"}
    tree |= {"data": {"train": "all.tar"}, "train": {"steps": 6, "batch_size": 8}}
    config_file.write_text(yaml.safe_dump(tree))
    assert submit(config_file, "--dry-run", "pairing={type: anchor, field: text}").exit_code == 0
    config = load_config(config_file)
    with_fields = completed(config, model_of(config))
    prepare_folder(config, overwrite=False, text=with_fields.to_yaml())
    (config.folder / "metrics.jsonl").write_text('{"step": 1}\n')  # it has begun
    assert with_fields.fields and submit(config_file, "--dry-run").exit_code == 0
    for other in ("train.lr=0.5", "fields.image.keys=[webp]", "model.start=ViT-B-32"):
        refused = submit(config_file, other, "--dry-run")
        assert refused.exit_code == 2 and "continue it with this one by --resume" in " ".join(refused.stderr.split())


def test_the_launch_folder_has_all_that_a_job_was_made_of(config_file, tmp_path, monkeypatch):
    """With an sbatch that admits the first script and refuses the second."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/bash\n[ $# = 2 ] && echo "12;cluster" || { echo "sbatch: error: too dear" >&2; exit 1; }\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=":")
    done = submit(config_file, "train.lr=0.5")
    assert done.exit_code == 0 and "job 12" in done.stderr
    (folder,) = (tmp_path / "runs" / "small.slurm").iterdir()
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["lr"] == 0.5
    assert load_config(folder / "config.yaml") == load_config(config_file, ["train.lr=0.5"])
    about, commit = json.loads((folder / "code.json").read_text()), ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    assert about["mmcontrast"] == "0.1.0"
    assert about.get("commit", "") == subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    assert (folder / "jobs").read_text() == "12\n" and not (tmp_path / "runs" / "small").exists()

    refused = submit(config_file, "--evaluate-after")
    assert refused.exit_code == 2
    assert "sbatch refused evaluate.sbatch: too dear; job 12 is submitted" in " ".join(refused.stderr.split())
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: no partition' >&2; exit 1\n")
    refused = submit(config_file, "run.name=other")
    assert refused.exit_code == 2 and "sbatch refused train.sbatch: no partition" in refused.stderr
    assert not (tmp_path / "runs" / "other.slurm").exists()


def test_an_array_has_the_slices_that_are_missing(config_file, tmp_path):
    config, out = load_config(config_file), tmp_path / "table"
    prepare_folder(config, overwrite=False)
    shards = str(tmp_path / "x-{0..3}.tar")
    arguments = ["submit-embed", config.folder, shards, out, "--time", "1:00:00", "--tasks", 4, "--dry-run"]
    nothing = command(*arguments)
    assert nothing.exit_code == 2 and "x-0.tar" in nothing.stderr
    for number in range(4):
        (tmp_path / f"x-{number}.tar").touch()
    none = command(*arguments)
    assert none.exit_code == 2 and "no checkpoint 'last'" in " ".join(none.stderr.split())
    checkpoint.save(config.folder / "checkpoints", 6, Contents({}, {}, {}, ""))
    done = command(*arguments)
    check_shell(done.stdout)
    assert "array=1-4" in directives(done.stdout) and f"'{shards}'" in done.stdout and "--checkpoint 6" in done.stdout
    about = {"run": str(config.folder), "checkpoint": "6", "shards": shards, "slices": 4}
    out.mkdir()
    (out / ".slice-00003-of-00004.json").write_text(json.dumps(about))
    assert "array=1,2,4" in directives(command(*arguments).stdout)
    checkpoint.save(config.folder / "checkpoints", 7, Contents({}, {}, {}, ""))
    other = command(*arguments)
    assert other.exit_code == 2 and "checkpoint: '6' there, '7' here" in " ".join(other.stderr.split())
    further = ["--precision", "bf16", "--keys", "text=my caption,txt", "--width", 8, "--trust-code", "--select", "a b"]
    script = command(*["submit-embed", config.folder, shards, tmp_path / "other", *arguments[4:]], *further).stdout
    check_shell(script)
    assert "--precision bf16 --width 8 --select 'a b' --keys 'text=my caption,txt' --trust-code" in script


def test_every_template_is_found_and_installed():
    names = {path.stem for path in (ROOT / "slurm").glob("*.sbatch")}
    assert names == {"train", "evaluate", "embed"} and all(slurm.template(name).is_file() for name in names)
    assert '"share/mmcontrast/slurm" = ["slurm/*.sbatch"]' in (ROOT / "pyproject.toml").read_text()
