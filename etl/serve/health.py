"""What is wrong with this machine as far as it can be known without starting anything: packages and ports."""

import tomllib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from etl.serve import services
from etl.storage import PROJECT


def packages() -> list[tuple[str, str | None]]:
    """Each package that pyproject.toml asks for a version of: (what is asked, what is there instead or None)."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    problems: list[tuple[str, str | None]] = []
    for line in project["dependencies"]:
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
