"""A Python environment of its own, in which what a user of an exported directory installs is all that there is.

That is `pip install torch transformers`, and what the two require. Pillow, which some parts use, is not among it.
Nothing is downloaded: the environment is made of links to what the running Python has installed.
"""

import importlib.metadata
import pathlib
import sysconfig
import venv
from collections import defaultdict
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INSTALLED = ("torch", "transformers")
File = tuple[str, pathlib.Path, tuple[str, ...]]  # its distribution, a place on its way, the rest of its path


def make_environment(directory: pathlib.Path, distributions: Iterable[str] = INSTALLED) -> pathlib.Path:
  """Makes the environment and returns its Python. A distribution that is not installed here is an error."""
  venv.create(directory, symlinks=True)  # without pip, and without what the system has installed
  wanted, here = required(distributions), {}
  for distribution in importlib.metadata.distributions():  # in the order of sys.path: the first of a name counts
    here.setdefault(canonicalize_name(distribution.metadata["Name"] or ""), distribution)
  # What lies outside, such as commands in ../../../bin, is for people.
  files = [(name, pathlib.Path(distribution.locate_file("")), file.parts) for name, distribution in here.items()
           for file in distribution.files or () if ".." not in file.parts and not file.is_absolute()]
  unknown = wanted - {owner for owner, *_ in files}
  assert not unknown, f"installed without a list of files: {', '.join(sorted(unknown))}"
  own = {"base": str(directory), "platbase": str(directory)}
  _link(pathlib.Path(sysconfig.get_path("purelib", "venv", own)), files, wanted)
  return pathlib.Path(sysconfig.get_path("scripts", "venv", own)) / "python"


def required(distributions: Iterable[str]) -> set[str]:
  """The names of these distributions and of all that they require on this machine."""
  waiting, seen = [(canonicalize_name(name), "") for name in distributions], set()
  while waiting:
    name, extra = waiting.pop()
    if (name, extra) in seen:
      continue
    seen.add((name, extra))
    for line in importlib.metadata.distribution(name).requires or ():
      requirement = Requirement(line)
      if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
        waiting += [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]
  return {name for name, _ in seen}


def _link(target: pathlib.Path, files: Iterable[File], wanted: set[str]) -> None:
  """Links what the wanted distributions own: whole directories, but for those in which others have files too."""
  target.mkdir(parents=True, exist_ok=True)
  entries = defaultdict(list)
  for owner, place, parts in files:
    entries[parts[0]].append((owner, place / parts[0], parts[1:]))
  for name, inside in entries.items():
    ours = [file for file in inside if file[0] in wanted]
    if ours and (not ours[0][2] or len(ours) == len(inside) and len({place for _, place, _ in ours}) == 1):
      (target / name).symlink_to(ours[0][1])
    elif ours:
      _link(target / name, [file for file in inside if file[2]], wanted)
