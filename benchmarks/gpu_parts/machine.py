"""Describes this machine: the card, its driver, the versions, the cores."""

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "timm", "transformers", "open_clip_torch", "memeff", "inf_cl", "faiss-gpu", "faiss-cpu")


def describe(path: Path) -> None:
    """Write the description to a file. It starts CUDA, so it runs in a process of its own."""
    description: dict[str, Any] = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    if description["device"] == "cuda":
        properties = torch.cuda.get_device_properties(0)
        (torch.ones(8, device="cuda") + 1).sum().item()
        description |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    description["versions"] = {name: number for name in PACKAGES if (number := installed(name))}
    description |= {"python": platform.python_version(), "cpu": processor(), "cores": len(os.sched_getaffinity(0))}
    description["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(description))
    partial.rename(path)


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def identity(description: dict[str, Any]) -> str:
    """Return the card and versions that figures of one table must have in common."""
    versions = description["versions"]
    return f"{description.get('card', description['cpu'])}, torch {versions.get('torch')}, Triton {versions.get('triton')}"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
