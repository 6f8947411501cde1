"""Writes docs/licenses.md: the licenses of what this package is installed with, as each of them states it.

    python docs/licenses.py

A package that is not installed keeps the row that the page has.
"""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licenses.md"
HEAD = """# Licenses

gptq_ao is under the [BSD-3-Clause license](../LICENSE). These packages are installed with it, or with one of its
extras, and bring their own. The list is written by `docs/licenses.py`, from what each package says of itself.

| package | license | for |
|---|---|---|
"""


def declared() -> Iterator[tuple[str, str]]:
    """Name → what for, of every dependency in pyproject.toml, each once."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"all of it": project["dependencies"]}
    groups |= {f"`gptq_ao[{extra}]`": names for extra, names in project["optional-dependencies"].items()}
    groups["`gptq_ao[dev]`"] = groups.pop("`gptq_ao[dev]`")  # last: what users install is said first
    seen = set()
    for use, requirements in groups.items():
        for requirement in requirements:
            name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            if name not in seen:
                seen.add(name)
                where = requirement.partition(";")[2].strip()
                yield name, f"{use}, where `{where}`" if where else use


def license_of(package: Distribution) -> str:
    """As its metadata or, if that does not say it, its license file has it."""
    said = package.metadata.get("License-Expression")
    if said:
        return said
    said = package.metadata.get("License") or ""
    if said and len(said) < 80 and "\n" not in said:  # else it is the whole text
        return said
    classifiers = [c for c in package.metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    if classifiers:
        return ", ".join(c.rpartition(" :: ")[2] for c in classifiers)
    files = [f for f in package.files or [] if re.fullmatch(r"(?i)licen[cs]e(\.\w+)?", f.name)]
    text = " ".join(files[0].read_text(encoding="utf-8").split()) if files else ""
    if "Redistribution and use in source and binary forms" in text:
        return "BSD-3-Clause" if "Neither the name of" in text else "BSD-2-Clause"
    return "not stated"


def row(name: str, use: str, known: dict[str, str]) -> str:
    try:
        return f"| {name} | {license_of(distribution(name))} | {use} |"
    except PackageNotFoundError:
        return known.get(name, f"| {name} | not known here | {use} |")


def main() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    known = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    PAGE.write_text(HEAD + "".join(f"{row(name, use, known)}\n" for name, use in declared()), encoding="utf-8")


if __name__ == "__main__":
    main()
