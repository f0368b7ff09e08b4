"""Imports point downward only, and `import mmcontrast` needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import yaml

PACKAGE = Path(__file__).parent.parent / "mmcontrast"
MAY_IMPORT = {  # unit: what stands directly below it; what those may import, it may too
    "errors": [],
    "strict_json": [],
    "text_files": ["errors"],
    "whole_files": ["strict_json"],
    "file_lock": [],
    "trust": ["errors"],
    "components": ["trust"],
    "yaml_files": ["errors"],
    "options": [],
    "types": [],
    "share": [],
    "arguments": [],
    "permissions": [],
    "score": ["types"],
    "objectives": ["score", "components", "types"],
    "libraries": ["trust"],
    "modalities": ["libraries", "components", "types", "text_files"],
    "models": ["modalities", "options"],
    "data": ["modalities", "options", "yaml_files", "whole_files", "file_lock"],
    "data_commands": ["runs", "arguments"],
    "evaluation": ["models", "data", "score", "text_files", "permissions"],
    "training": ["objectives", "evaluation", "share"],
    "config": ["training"],
    "run_folder": ["config"],
    "run_checks": ["config"],
    "runs": ["run_folder", "run_checks"],
    "embedder": ["runs"],
    "embedding_job": ["embedder"],
    "vector_tables": ["embedder"],
    "suites": ["embedder"],
    "search": ["embedder", "arguments"],
    "curation": ["search", "embedding_job", "vector_tables", "data_commands"],
    "export": ["embedder", "arguments"],
    "blend": ["suites", "export"],
    "slurm": ["embedding_job"],
    "slurm_commands": ["slurm", "arguments"],
    "doctor": ["runs"],
    "scaling": ["training"],
    "plan": ["runs", "scaling"],
    "finetune_request": ["run_folder"],
    "finetune": ["plan", "finetune_request"],
    "train_commands": ["finetune", "curation"],
    "cli": ["slurm_commands", "data_commands", "curation", "blend", "doctor", "train_commands"],
}


def below(unit: str) -> set[str]:
    return set(MAY_IMPORT[unit]) | {u for direct in MAY_IMPORT[unit] for u in below(direct)}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("mmcontrast.")}
    return found


def test_imports_point_downward():
    for file in PACKAGE.rglob("*.py"):
        unit = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if unit not in ("__init__", "__main__"):
            upward = imports(file) - below(unit) - {unit}
            assert not upward, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(upward))}, which stand above it"


def test_importing_needs_torch_alone():
    names = "contrastive_loss, score_statistics, Objective, Pairing, Direction"
    script = f"import sys; from mmcontrast import {names}; print(*{{m.split('.')[0] for m in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torchvision", "timm", "transformers", "open_clip", "accelerate", "webdataset", "pydantic", "yaml", "typer"}
    heavy |= {"rich", "PIL", "soundfile", "pyarrow", "matplotlib", "safetensors", "faiss"}
    assert not heavy & set(loaded)


def test_training_imports_the_libraries_of_the_towers_that_it_has(config_file):
    """None of them for the loop itself; transformers for none of timm's and open_clip's."""
    script = """
import sys
import mmcontrast.training.loop
libraries = {"timm", "torchvision", "open_clip", "transformers", "faiss", "sympy", "torch.distributed.tensor"}
assert not libraries & sys.modules.keys(), libraries & sys.modules.keys()
from mmcontrast.cli import app
app(sys.argv[1:], standalone_mode=False)
assert "timm" in sys.modules and "transformers" not in sys.modules and "open_clip" not in sys.modules"""
    config = yaml.safe_load(config_file.read_text())
    del config["fields"]["audio"], config["towers"]["audio"]
    config["towers"]["text"] = {"type": "open_clip_text", "width": 16, "layers": 1, "heads": 2, "context_length": 24}
    config["evaluation"] = {}
    config_file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", script, "train", str(config_file), "train.steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_command_sets_what_openmp_reads_before_torch_is_loaded():
    script = "import os, sys, mmcontrast.cli; assert 'torch' not in sys.modules, 'too late for OMP_WAIT_POLICY'"
    subprocess.run([sys.executable, "-c", script], check=True)
