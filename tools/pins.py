"""Write requirements.txt and requirements-dev.txt: the exact versions of this environment that Brim needs, no more.

Run by `make pins`, after new versions were installed into .venv by hand and the tests passed with them.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Written by `make pins`; edit pyproject.toml, not this file.\n"


def closure(wanted: list[str]) -> dict[str, str]:
    """Name -> public version of every package that these requirements pull in here, themselves included."""
    found: dict[str, str] = {}
    waiting = [Requirement(line) for line in wanted]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        installed = distribution(name)
        # Without the local part: 2.13.0+cpu is this machine's build of what others install as 2.13.0.
        new = name not in found
        found[name] = Version(installed.version).public
        extras = requirement.extras
        if new or extras:
            waiting += [needed for line in installed.requires or [] if _applies(needed := Requirement(line), extras)]
    return found


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


def render(pins: dict[str, str], *, first: str = "") -> str:
    return HEADER + first + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    runtime = closure(project["dependencies"] + optional["int8"] + optional["plot"])
    dev = {name: version for name, version in closure(optional["dev"]).items() if name not in runtime}
    (ROOT / "requirements.txt").write_text(render(runtime))
    (ROOT / "requirements-dev.txt").write_text(render(dev, first="-r requirements.txt\n"))


if __name__ == "__main__":
    main()
