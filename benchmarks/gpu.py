"""Everything that a GPU is wanted for, in one call of at most 9 minutes that needs no network.

    python benchmarks/gpu.py OUT                          # all parts, in the order of their value
    python benchmarks/gpu.py OUT --wheels WHEELS          # with what this machine lacks, unpacked from WHEELS/*.whl
    python benchmarks/gpu.py OUT --list                   # the parts, and what OUT holds of them
    python benchmarks/gpu.py OUT --only loss launches     # these parts alone

A second call with the same OUT goes on where the first ended: what is measured is not measured again, and what crashed or
took too long is not tried again unless `--retry` asks for it. OUT gets `results.jsonl` (a line a measurement, as soon as it
is known), `summary.md` (the tables, after every part), `launches.patch` (`git apply` it) and `log.txt`.

The machine needs torch, Triton, timm and transformers. What else it lacks is carried as wheels in one folder, made where
there is a network, with the machine's own version of Python:

    pip download --no-deps --only-binary=:all: --dest WHEELS --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 NAME NAME …

    loss, launches           (nothing); their peers: open_clip_torch ftfy wcwidth memeff==0.3.1 inf_cl
    tests                    pytest iniconfig pluggy pygments (pytest-xdist execnet: side by side), and those of the rest
    the rest                 open_clip_torch ftfy wcwidth accelerate psutil pydantic pydantic_core annotated-types
                             typing-inspection simplejpeg soundfile cffi pycparser soxr webdataset braceexpand pyarrow
                             rich markdown-it-py mdurl
    search                   these, and faiss-gpu (135 MB; it needs CUDA 12's runtime, cuBLAS and cuRAND)

What a part lacks is told in its table and ends nothing. Every part is a process of its own with a time box: a crash, an
endless loop or a lack of memory ends one measurement, and the part goes on with the next. Times are medians of synchronised
runs after a warm-up, ours and a peer's in turn. Without a GPU the same code runs its smallest sizes in Triton's interpreter:
that shows that it works, and no figure of it means anything.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before the parts fork

from gpu_parts import PARTS, RESERVE  # noqa: E402
from gpu_parts.results import Results  # noqa: E402
from gpu_parts.runner import Runner  # noqa: E402
from gpu_parts.summary import progress, write_summary  # noqa: E402


def main(arguments: list[str] | None = None, began: float | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the results; one that exists is gone on with")
    parser.add_argument("--seconds", type=float, default=540, help="of the whole call (540)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to import from")
    parser.add_argument("--checkouts", nargs="*", default=[], help="more folders that peers are imported from")
    parser.add_argument("--retry", action="store_true", help="try again what failed, crashed or took too long")
    parser.add_argument("--list", action="store_true", help="the parts, and what is there of them; measures nothing")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    end = (time.monotonic() if began is None else began) + options.seconds
    results = Results(options.out / "results.jsonl")
    if options.list:
        print(progress(results))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    parts = options.only or list(PARTS)
    folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
    try:
        use_wheels(options.wheels, folder / "site", options.checkouts)
        runner = Runner(options.out, results, folder)
        problem = runner.find_machine()
        if problem:
            print(problem, file=sys.stderr)
            return 2
        results.forgive(parts, everything=options.retry)
        last = end - RESERVE
        for part in parts:  # each in its own box, then those that have more to do in what is left
            runner.run(part, min(time.monotonic() + PARTS[part].seconds, last))
        for part in parts:
            runner.run(part, last)
        print((options.out / "summary.md").read_text())
        return 0
    finally:
        write_summary(options.out, results)
        shutil.rmtree(folder, ignore_errors=True)


def use_wheels(wheels: Path | None, site: Path, checkouts: list[str]) -> None:
    """Unpack wheels and put them and the checkouts first in the import path, here and in child processes."""
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    folders = [*map(os.path.abspath, checkouts), *([str(site)] if wheels else [])]
    sys.path[:0] = folders
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*folders, str(ROOT), str(ROOT / "benchmarks"), *inherited]))


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
