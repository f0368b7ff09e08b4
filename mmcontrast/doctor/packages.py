"""Checks Python and the packages: installed, new enough, and importable. The bounds are those of the package's own metadata."""

import importlib
import platform
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmcontrast.doctor.check import BAD, WARNING, Check, one_line

NAMED = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "accelerate")  # whose versions are shown
UNCHECKED = ("dev", "all")  # extras that no run needs, and their sum
EITHER = {"cpu", "gpu"}  # bring the same module


def package_checks() -> Iterator[Check]:
    """Yield the checks of Python, of required packages, and of extras."""
    try:
        package = distribution("mmcontrast")
    except PackageNotFoundError:
        found, remedy = "mmcontrast is not installed: its requirements are not known", "pip install -e . where its source is"
        yield Check("packages", found, WARNING, remedy)
        return
    found, allowed = platform.python_version(), package.metadata["Requires-Python"]
    if SpecifierSet(allowed).contains(found, prereleases=True):
        yield Check("python", found)
    else:
        yield Check("python", f"{found}; needed: {allowed}", BAD, f"make an environment with python {allowed}")
    requirements = [Requirement(line) for line in package.requires or ()]
    yield _required([r for r in requirements if _needed(r, "")])
    yield _extras(requirements, [e for e in package.metadata.get_all("Provides-Extra") or () if e not in UNCHECKED])


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
    """Check the extras; missing ones are named, and are no fault."""
    missing = {}
    for extra in extras:
        names = [r.name for r in requirements if not _needed(r, "") and _needed(r, extra) and not _installed(r.name)]
        if names:
            missing[extra] = f"{extra} ({', '.join(names)})"
    alternative = EITHER & missing.keys() if EITHER - missing.keys() else set()
    missing = {extra: names for extra, names in missing.items() if extra not in alternative}
    installed = ", ".join(extra for extra in extras if extra not in missing and extra not in alternative) or "none"
    if not missing:
        return Check("extras", installed)
    example = f"pip install 'mmcontrast[{next(iter(missing))}]'"
    return Check("extras", f"{installed}; not there: {', '.join(missing.values())}; {example}")


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _fault(requirement: Requirement) -> str:
    """Return what is wrong with a package, "" if it is as required."""
    package = _installed(requirement.name)
    if package is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(package.version, prereleases=True):
        return f"{requirement.name} is {package.version}, not {requirement.specifier}"
    for module in _modules(package, requirement.name):
        try:
            importlib.import_module(module)
        except Exception as error:  # a library for another torch, CUDA or numpy fails in any way
            return f"{requirement.name} {package.version} cannot be imported: {type(error).__name__}: {one_line(error)}"
    return ""


def _modules(package: Distribution, name: str) -> list[str]:
    """Return the module of the package's own name, or else all of its top-level modules."""
    files = [file for file in package.files or () if file.suffix == ".py"]
    modules = {f.parts[0] for f in files if f.name == "__init__.py" and len(f.parts) == 2}
    modules |= {f.stem for f in files if len(f.parts) == 1}
    own_name = name.lower().replace("-", "_")
    if own_name in modules:
        return [own_name]
    return sorted(module for module in modules if module.isidentifier() and module[0] != "_")
