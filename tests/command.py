"""The `mmcontrast` command as tests run it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def mmcontrast(
    *arguments: object,
    ranks: int = 1,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `mmcontrast ARGUMENTS`, on several ranks if asked, and return its exit code, stdout and stderr."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "mmcontrast", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
