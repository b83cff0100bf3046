"""What is wrong with this machine as far as it can be known without starting anything: packages and ports."""

import tomllib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from etl.serve import services
from etl.storage import PROJECT


def packages() -> list[tuple[str, str | None]]:
    """Each package that pyproject.toml asks for a version of: (what is asked, what is there instead or None).

    In a project that has no such file those that the engine asked for when it was installed.
    """
    declared = PROJECT / "pyproject.toml"
    if declared.exists():
        asked = tomllib.loads(declared.read_text())["project"]["dependencies"]
    else:
        asked = [line for line in metadata.requires("etl-notebooks") or () if "extra ==" not in line]
    problems: list[tuple[str, str | None]] = []
    for line in asked:
        wanted = Requirement(line)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            problems.append((str(wanted), "it is not installed"))
            continue
        if wanted.specifier:
            problem = None if wanted.specifier.contains(version, prereleases=True) else f"{version} is installed"
            problems.append((str(wanted), problem))
    return problems


def ports(children: Iterable[services.Service]) -> list[tuple[str, str | None]]:
    """The port of each child of `up`: (whose it is, what is wrong or None). That it is at work there is fine."""
    problems: list[tuple[str, str | None]] = []
    for child in children:
        try:
            services.ensure_free(child.port, child.name)
            problem = None
        except services.PortTaken as error:
            problem = None if services.answers(child.health_url) else str(error)
        problems.append((f"port {child.port}", problem))
    return problems
