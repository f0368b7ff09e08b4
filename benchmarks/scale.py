"""Counts calls and bytes that do not depend on ranks and samples, and extrapolates them: tables for docs/scale.md.

    python benchmarks/scale.py                     # all parts, some minutes on 2 cores
    python benchmarks/scale.py --only calls        # --list: what there is

Each module of MODULES has PARTS, {name: function that yields lines of Markdown}; the first line of a function's docstring says
what it counts.
"""

import argparse
import importlib

MODULES = ("scale_communication",)


def parts() -> dict:
    return {name: run for module in MODULES for name, run in importlib.import_module(module).PARTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the parts")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    all_parts = parts()
    unknown = [name for name in options.only or () if name not in all_parts]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there is {', '.join(all_parts)}")
    for name in options.only or all_parts:
        description = (all_parts[name].__doc__ or "").strip().splitlines()[0]
        print(f"{name}: {description}" if options.list else f"## {name}: {description}\n", flush=True)
        for line in () if options.list else all_parts[name]():
            print(line, flush=True)
        print(end="" if options.list else "\n")


if __name__ == "__main__":
    main()
