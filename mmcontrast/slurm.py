"""Launches jobs of Slurm: a script made from a template in slurm/, a folder with all that the job needs, and sbatch."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import mmcontrast
from mmcontrast.config import RunConfig, load_config
from mmcontrast.data import ShardOptions, expand_shards
from mmcontrast.embedding_job import about_table
from mmcontrast.errors import UserError
from mmcontrast.evaluation import TableSlice
from mmcontrast.evaluation.report import RESULTS
from mmcontrast.run_checks import check_components_ahead
from mmcontrast.run_folder import CONFIG, never_began
from mmcontrast.runs import completed_as
from mmcontrast.training import checkpoint

PACKAGE = Path(mmcontrast.__file__).parent
OURS = (  # options of sbatch that a script relies on, or that the command has itself
    *("job-name", "chdir", "output", "open-mode", "array", "requeue", "signal", "dependency", "ntasks-per-node"),
    *("ntasks", "gpus", "gres", "gpus-per-task", "ntasks-per-gpu", "tasks-per-node", "no-requeue"),
    *("time", "nodes", "cpus-per-task", "gpus-per-node", "partition", "account"),
)


class Script(Template):
    """A template with @@names, as the shell has its own use for $ and @."""

    delimiter = "@@"


@dataclass(frozen=True)
class Resources:
    """The resources of a job.

    Attributes:
        time: its limit, HH:MM:SS or D-HH:MM:SS.
        gpus_per_node: 0: none.
        further: other options of sbatch, KEY=VALUE, or KEY alone.
    """

    time: str
    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_task: int = 1
    partition: str | None = None
    account: str | None = None
    further: Sequence[str] = ()

    def directives(self) -> Iterator[tuple[str, Any]]:
        """Yield the options of sbatch, (name, value).

        Raises:
            UserError: for an invalid time, or options that are not sbatch's or that the command sets.
        """
        limit_seconds(self.time)
        yield "time", self.time
        yield "nodes", self.nodes
        yield "ntasks-per-node", 1
        yield "cpus-per-task", self.cpus_per_task
        if self.gpus_per_node:
            yield "gpus-per-node", self.gpus_per_node
        for key, value in (("partition", self.partition), ("account", self.account)):
            if value:
                yield key, value
        for option in self.further:
            key, equals, value = option.partition("=")
            if not re.fullmatch(r"[a-z][a-z-]+", key):
                raise UserError(f"--sbatch {option!r} is not of the form KEY=VALUE or KEY, like constraint=a100 or exclusive")
            if key in OURS:
                raise UserError(f"--sbatch {option!r}: the command sets {key} itself; see --help")
            yield key, value if equals else None


def limit_seconds(limit: str) -> int:
    """Return a time limit in seconds.

    Raises:
        UserError: if it is not of the form HH:MM:SS or D-HH:MM:SS.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", limit)
    if not match:
        raise UserError(f"--time {limit!r} is not of the form HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass
class Launch:
    """A new folder beside a run's (or a table's), with the job's script and all that the job was launched with.

    Attributes:
        files: their content by name.
    """

    target: Path
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parent = self.target.absolute().with_name(f"{self.target.name}.slurm")
        self.folder = parent / time.strftime("%Y%m%d-%H%M%S")
        while self.folder.exists():
            self.folder = self.folder.with_name(f"{self.folder.name}-")

    def add_script(self, name: str, directives: Mapping[str, Any], values: Mapping[str, Any], log: str = "%j") -> None:
        """Add the script of a template, in which every value is one word of the shell, and a list so many words."""
        common = {
            "job-name": self.target.name,
            "chdir": Path.cwd(),
            "output": f"{str(self.folder).replace('%', '%%')}/{name}-{log}.log",
            "open-mode": "append",
        }
        lines = []
        for key, value in (common | dict(directives)).items():
            if "\n" in str(value):
                raise UserError(f"#SBATCH --{key}: {str(value)!r} has more than one line")
            lines.append(f"#SBATCH --{key}" + ("" if value is None else f"={shlex.quote(str(value))}"))
        quoted = {
            key: shlex.join(value) if isinstance(value, list) else shlex.quote(str(value)) for key, value in values.items()
        }
        text = Script(template(name).read_text(encoding="utf-8"))
        python = shlex.quote(sys.executable)
        self.files[f"{name}.sbatch"] = text.substitute(quoted, directives="\n".join(lines), python=python)

    def submit(self, *names: str) -> list[str]:
        """Write the folder and give its scripts to sbatch, each to wait for the success of the one before; return the jobs.

        Raises:
            UserError: if sbatch is not installed, or refuses a script; if it is the first, no folder is left.
        """
        if not shutil.which("sbatch"):
            raise UserError("sbatch is not found: submit where Slurm is installed, or look at the script with --dry-run")
        self.folder.mkdir(parents=True)
        for name, text in (self.files | code_version()).items():
            (self.folder / name).write_text(text, encoding="utf-8")
        jobs: list[str] = []
        for name in names:
            after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
            command = ["sbatch", "--parsable", *after, str(self.folder / f"{name}.sbatch")]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                if not jobs:
                    shutil.rmtree(self.folder)
                    with suppress(OSError):  # others' launches
                        self.folder.parent.rmdir()
                reason = " ".join(result.stderr.replace("sbatch: error: ", "").split()) or f"exit code {result.returncode}"
                waiting = f"; job {', '.join(jobs)} is submitted: cancel it with scancel, or leave it" if jobs else ""
                raise UserError(f"sbatch refused {name}.sbatch: {reason}{waiting}")
            jobs.append(result.stdout.strip().partition(";")[0])
        (self.folder / "jobs").write_text("\n".join(jobs) + "\n")
        return jobs


def template(name: str) -> Path:
    """Return the path of slurm/NAME.sbatch: of the checkout that the package is imported from, else where pip has put it."""
    folders = PACKAGE.parent / "slurm", Path(sysconfig.get_path("data")) / "share" / "mmcontrast" / "slurm"
    for folder in folders:
        if (folder / f"{name}.sbatch").is_file():
            return folder / f"{name}.sbatch"
    raise UserError(f"no template {name}.sbatch in {' or '.join(map(str, folders))}: install mmcontrast again")


def code_version() -> dict[str, str]:
    """Return code.json; and, if the package lies in a git checkout of its own, code.diff, its changes since the commit."""

    def git(*arguments: str) -> str:
        try:
            command = ["git", "-C", str(PACKAGE.parent), *arguments]
            return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""

    version: dict[str, Any] = {"mmcontrast": mmcontrast.__version__, "python": sys.version.split()[0]}
    if not git("ls-files", "--", f"{PACKAGE.name}/__init__.py"):  # no checkout, or one of something else around it
        return {"code.json": json.dumps(version, indent=1)}
    version["commit"] = git("rev-parse", "HEAD").strip()
    version["untracked"] = git("ls-files", "-o", "--exclude-standard").splitlines()
    return {"code.json": json.dumps(version, indent=1), "code.diff": git("diff", "HEAD")}


def training_launch(
    config_path: Path,
    overrides: Sequence[str],
    resources: Resources,
    processes: int,
    warn: int,
    evaluate_after: bool = False,
    resume: bool = False,
) -> Launch:
    """Return the launch of a training run, after the checks that need no data and no model.

    Args:
        processes: on each node.
        warn: seconds before the time limit in which the run is saved.
        evaluate_after: add a second script, to be run after the first.
        resume: continue a run that has another config.

    Raises:
        UserError: for a config or resources that do not fit.
    """
    config = load_config(config_path, overrides)
    check_components_ahead(config)
    check_run(config, resume)
    world_size = resources.nodes * processes
    if config.train.batch_size % world_size or (config.data.lanes or world_size) % world_size:
        raise UserError(
            f"{resources.nodes} nodes of {processes} processes are {world_size} ranks: train.batch_size, which is"
            f" {config.train.batch_size}, and data.lanes, if it is set, must be multiples of them"
        )
    if warn >= limit_seconds(resources.time):
        raise UserError(f"--warn {warn}: the warning would come before the job starts; --time is {resources.time}")
    if evaluate_after and not config.evaluation.splits:
        raise UserError("--evaluate-after: the config has no evaluation.splits")
    launch = Launch(config.folder, {CONFIG: config.to_yaml()})
    values = {"launch": launch.folder, "run": config.folder.absolute(), "processes": processes}
    launch.add_script("train", {"requeue": None, "signal": f"B:USR1@{warn}"} | dict(resources.directives()), values)
    if evaluate_after:
        directives = dict(resources.directives()) | {"nodes": 1}
        directives |= {"gpus-per-node": 1} if resources.gpus_per_node else {}
        launch.add_script("evaluate", directives, {"run": config.folder.absolute()})
    return launch


def check_run(config: RunConfig, resume: bool) -> None:
    """Check that a job can start or continue a run.

    Raises:
        UserError: if it cannot.
    """
    folder = config.folder
    if not folder.exists():
        return
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} exists, but is not a run's folder (no {CONFIG}): set run.name")
    if never_began(folder):
        return
    started = load_config(folder / CONFIG)
    existing, new = (tree.model_dump(mode="json") for tree in (started, completed_as(config, started)))
    if existing != new and not resume:
        raise UserError(
            f"{folder} exists with another config ({' and '.join(difference(existing, new))}):"
            " continue it with this one by --resume, or set run.name"
        )
    saved = [int(path.name.removeprefix("step-")) for path in checkpoint.complete(folder / "checkpoints")]
    if saved and config.train.steps and max(saved) >= config.train.steps:
        raise UserError(f"{folder} already has its {max(saved)} steps: raise train.steps, or `mmcontrast evaluate`")
    if saved and existing == new and max(saved) == completed_step(folder):  # the steps of train.epochs are not known here
        raise UserError(f"{folder} is complete, at step {max(saved)}: raise train.epochs, or `mmcontrast evaluate`")


def completed_step(folder: Path) -> int | None:
    """Return the last step of a run that has written its results at its end; None if it has not."""
    try:
        step = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["training"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(step)


def difference(existing: Any, new: Any, path: str = "") -> tuple[str, str]:
    """Return the first difference between two trees, in words of the existing and of the new one."""
    if isinstance(existing, dict) and isinstance(new, dict):
        for key in [*new, *existing]:
            if existing.get(key) != new.get(key):
                return difference(existing.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    return f"{path}={str(existing)[:60]} there", f"{str(new)[:60]} here"


def embedding_launch(
    model: str | Path,
    data: ShardOptions,
    out: Path,
    tasks: int,
    which: str,
    resources: Resources,
    batch_size: int,
    num_workers: int,
    trust_code: bool = False,
    pretrained: str | None = None,
    precision: str = "fp32",
    width: int | None = None,
) -> Launch | None:
    """Return the launch of an embedding table: an array of the slices that are missing; None if none is.

    Args:
        which: the checkpoint.
        pretrained, precision, width, trust_code: as `load`.

    Raises:
        UserError: if there is no such checkpoint or data, or `out` holds another table.
    """
    expand_shards(data.shards)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    # tasks check that the samples are the same: it may take long
    table_info = about_table(model, data, which, pretrained, precision, width)
    slices = TableSlice.all(out, tasks)
    slices[0].check(table_info)
    missing = [part.number for part in slices if not part.record.exists()]
    if not missing:
        TableSlice(out, tasks, tasks).complete()
        return None
    launch = Launch(out)
    array = f"1-{tasks}" if len(missing) == tasks else ",".join(map(str, missing))
    values = {"model": table_info["model"], "data": data.shards, "out": out.absolute(), "tasks": tasks}
    values |= {"checkpoint": table_info["checkpoint"] or "last"}
    values |= {"batch_size": batch_size, "num_workers": num_workers}
    options = {"--pretrained": table_info["pretrained"], "--precision": precision, "--width": width}
    options |= {"--files": data.files, "--select": data.select}
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    words += [word for field, names in data.keys.items() for word in ("--keys", f"{field}={','.join(map(str, names))}")]
    values |= {"options": [*words, *(["--trust-code"] if trust_code else [])]}
    launch.add_script("embed", {"array": array, "requeue": None} | dict(resources.directives()), values, log="%A_%a")
    return launch
