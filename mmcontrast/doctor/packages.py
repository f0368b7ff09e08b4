"""Python and the packages: there, new enough, and importable. The bounds are those of the installed package's own metadata."""

import importlib
import platform
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmcontrast.doctor.check import BAD, WARNING, Check, one_line

NAMED = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "accelerate")  # whose versions are told
UNTOLD = ("dev", "all")  # extras that no run needs, and their sum
EITHER = {"cpu", "gpu"}  # bring the same module


def package_checks() -> Iterator[Check]:
    try:
        about = distribution("mmcontrast")
    except PackageNotFoundError:
        found, remedy = "mmcontrast is not installed: its requirements are not known", "pip install -e . where its source is"
        yield Check("packages", found, WARNING, remedy)
        return
    found, allowed = platform.python_version(), about.metadata["Requires-Python"]
    if SpecifierSet(allowed).contains(found, prereleases=True):
        yield Check("python", found)
    else:
        yield Check("python", f"{found}; needed: {allowed}", BAD, f"make an environment with python {allowed}")
    requirements = [Requirement(line) for line in about.requires or ()]
    yield _required([r for r in requirements if _needed(r, "")])
    yield _extras(requirements, [e for e in about.metadata.get_all("Provides-Extra") or () if e not in UNTOLD])


def _needed(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _required(requirements: list[Requirement]) -> Check:
    faults = {requirement: fault for requirement in requirements if (fault := _fault(requirement))}
    if faults:
        remedy = "pip install " + " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement in faults)
        return Check("packages", "; ".join(faults.values()), BAD, remedy)
    named = ", ".join(f"{r.name} {distribution(r.name).version}" for r in requirements if r.name in NAMED)
    return Check("packages", f"all {len(requirements)}: {named}")


def _extras(requirements: list[Requirement], extras: list[str]) -> Check:
    """Those that are not there are named, and are no fault."""
    missing = {}
    for extra in extras:
        names = [r.name for r in requirements if not _needed(r, "") and _needed(r, extra) and not _installed(r.name)]
        if names:
            missing[extra] = f"{extra} ({', '.join(names)})"
    other = EITHER & missing.keys() if EITHER - missing.keys() else set()
    missing = {extra: names for extra, names in missing.items() if extra not in other}
    there = ", ".join(extra for extra in extras if extra not in missing and extra not in other) or "none"
    if not missing:
        return Check("extras", there)
    example = f"pip install 'mmcontrast[{next(iter(missing))}]'"
    return Check("extras", f"{there}; not there: {', '.join(missing.values())}; {example}")


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _fault(requirement: Requirement) -> str:
    """What is wrong with a package; nothing, if it is as required."""
    about = _installed(requirement.name)
    if about is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(about.version, prereleases=True):
        return f"{requirement.name} is {about.version}, not {requirement.specifier}"
    for module in _modules(about, requirement.name):
        try:
            importlib.import_module(module)
        except Exception as error:  # a library for another torch, CUDA or numpy fails in any way
            return f"{requirement.name} {about.version} cannot be imported: {type(error).__name__}: {one_line(error)}"
    return ""


def _modules(about: Distribution, name: str) -> list[str]:
    """The one of the package's own name, or those that it brings at the top."""
    files = [file for file in about.files or () if file.suffix == ".py"]
    modules = {f.parts[0] for f in files if f.name == "__init__.py" and len(f.parts) == 2}
    modules |= {f.stem for f in files if len(f.parts) == 1}
    own = name.lower().replace("-", "_")
    return [own] if own in modules else sorted(module for module in modules if module.isidentifier() and module[0] != "_")
