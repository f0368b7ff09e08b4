"""A run's folder: its name, its lock, whether it may be written, and whether a run began there."""

import fcntl
import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from mmcontrast.config import RunConfig, load_config
from mmcontrast.errors import UserError
from mmcontrast.evaluation.before import BEFORE, EVALUATIONS
from mmcontrast.evaluation.report import LOG
from mmcontrast.file_lock import lock_file
from mmcontrast.training import checkpoint
from mmcontrast.training.mining import FOLDER as MINED
from mmcontrast.training.sample_log import BAD_SAMPLES, SAMPLES, STOPPED

CONFIG, REQUEST = "config.yaml", "finetune.json"
FILES_OF_A_START = {CONFIG, REQUEST, LOG, SAMPLES, BAD_SAMPLES, "checkpoints", EVALUATIONS, BEFORE, STOPPED, "tensorboard"}
FILES_OF_A_START |= {"profile", "stalled", MINED}


def check_folder(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Check that a run's folder may be written.

    Raises:
        UserError: if the run exists and neither `resume` nor `overwrite` is set; if it does not and `resume` is.
    """
    folder = config.folder
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume and not (folder / CONFIG).exists():
        raise UserError(f"no run at {folder} to resume: start it without --resume")
    if folder.exists() and not resume and not (overwrite and (folder / CONFIG).exists()) and not never_began(folder):
        remedy = "" if not checkpoint.complete(folder / "checkpoints") else "continue it with --resume, "
        raise UserError(f"{folder} exists: {remedy}replace it with --overwrite, or set run.name")


def never_began(folder: Path) -> bool:
    """Return whether a folder is that of a run that failed at its start: it has a config, no checkpoint, no logged step."""
    try:
        names = {path.name for path in folder.iterdir()}
        is_run = CONFIG in names and load_config(folder / CONFIG).folder.resolve() == folder.resolve()
    except (OSError, UserError):
        return False
    logged = folder / LOG
    return (
        is_run
        and names <= FILES_OF_A_START
        and not checkpoint.complete(folder / "checkpoints")
        and not (logged.exists() and logged.stat().st_size)
    )


def remove_failed_start(folder: Path) -> None:
    """Remove the folder of a run that failed before its first step, unless it has reports of what was wrong."""
    if folder.exists() and not never_began(folder):
        return
    reports = [folder / name for name in (BAD_SAMPLES, STOPPED, "stalled", "profile")]
    if any(path.exists() and path.stat().st_size for path in reports):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        _lock_file(folder).unlink()
        folder.parent.rmdir()  # if it is empty


def _lock_file(folder: Path) -> Path:
    """Return the file that locks a run's folder."""
    return folder.parent / f".{folder.name}.lock"


def lock_folder(config: RunConfig) -> IO[str]:
    """Keep others from training the same run, as long as this process lives and the returned file is open.

    Raises:
        UserError: if another process trains it.
    """
    try:
        config.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_file(config.folder).open("a")
    except OSError as error:
        raise UserError(f"{config.folder} cannot be written ({error.strerror}): set run.dir or run.name") from error
    if not lock_file(lock, wait=False, how=fcntl.lockf):  # which no data worker inherits
        raise UserError(f"another process is training {config.folder}: wait for its end, or choose another run.name")
    return lock


def prepare_folder(config: RunConfig, overwrite: bool, text: str | None = None, request: str | None = None) -> None:
    """Make the run's folder with its config; replace it if `overwrite`, or if a start failed there.

    Args:
        text: the completed config as YAML.
        request: of `mmcontrast finetune`, as JSON.
    """
    if overwrite or never_began(config.folder):
        shutil.rmtree(config.folder, ignore_errors=True)
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / CONFIG).write_text(text or config.to_yaml(), encoding="utf-8")
    if request:
        (config.folder / REQUEST).write_text(request, encoding="utf-8")


def run_of(name: str | Path, checkpoint: str | None) -> tuple[Path | None, str]:
    """Return the folder of the run that a name means, or None, and the checkpoint.

    Raises:
        UserError: for a checkpoint of what is no run's folder.
    """
    folder = Path(name).absolute()
    one = folder.parent.name == "checkpoints" and (folder.parents[1] / CONFIG).is_file()
    if not one and (folder / CONFIG).is_file():
        return folder, checkpoint or "last"
    own = folder.name.removeprefix("step-") if one else "last"
    if checkpoint not in (None, "last", own, own.lstrip("0")):
        raise UserError(f"{name} is {'a checkpoint itself' if one else 'no run'}: leave out the checkpoint {checkpoint!r}")
    return folder.parents[1] if one else None, own


def about_checkpoint(folder: Path, which: str) -> dict[str, str]:
    """Return the step of a run's checkpoint "last" or "best", and a digest of its weights, by the checksums of its manifest.

    Raises:
        UserError: if there is no such checkpoint, or its manifest cannot be read.
    """
    saved = checkpoint.find(folder / "checkpoints", which)
    try:
        files = json.loads((saved / checkpoint.MANIFEST).read_text())["files"]
        sums = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")} or files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{saved}: its {checkpoint.MANIFEST} cannot be read ({error})") from error
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
    return {"checkpoint": str(int(saved.name.removeprefix("step-"))), "weights": digest}
