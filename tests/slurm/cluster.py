"""A real Slurm on this machine: two nodes, with two devices each that pass for GPUs; keys, ports and folders of its own.

It needs root, and no systemd.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.command import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """Why there can be no cluster here; empty if there can."""
    paths = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [program for program in PROGRAMS if not shutil.which(program, path=paths)]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "only root can start Slurm's daemons"


class Cluster:
    """Started with its construction; `stop` ends all that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().partition(".")[0]
        (folder / "state").mkdir()
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
        (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=[free_port() for _ in range(3)]))
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        leave = ("SLURM_", "SBATCH_", "SRUN_", "MMCONTRAST_EXIT")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(leave)}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{self.env['PATH']}:/usr/sbin"}
        try:
            files = [f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "key-file", "pid-file", "log-file")]
            self.call("munged", "--force", *files, f"--seed-file={folder}/munge.seed")
            self.call("slurmctld", "-i", "-c")
            for node in ("n1", "n2"):
                self.call("slurmd", "-c", "-N", node)
            self.wait(lambda: self.call("sinfo", "-h", "-o", "%t").split() == ["idle"], 120, "idle nodes")
        except BaseException:
            self.stop()
            raise

    def call(self, *command: str, **options) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=300, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, true, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"no {what} in {seconds} s; {self.call('squeue', '-a')}"
            time.sleep(0.1)

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job: JobState, Restarts, ExitCode, …"""
        words = self.call("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def end_of(self, number: str, seconds: float = 400) -> dict[str, str]:
        over = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in over, seconds, f"end of job {number}")
        return self.job(number)

    def processes_of(self, number: str) -> dict[int, str]:
        """The command lines of a job's processes by their ids, the script's included."""
        found, ours = {}, {f"SLURM_JOB_ID={number}".encode(), f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if ours <= set((folder / "environ").read_bytes().split(b"\0")):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        return found

    def stop(self) -> None:
        with suppress(AssertionError):
            self.call("scancel", "--user", "root")
            self.wait(lambda: not self.call("squeue", "-h"), 30, "end of all jobs")
        processes = []
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            with suppress(OSError, ValueError):
                processes.append(int((self.folder / f"{name}.pid").read_text()))
                os.kill(processes[-1], signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
