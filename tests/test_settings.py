"""Settings: any subclass in a field, tuples of settings, saved and read back. A mistake is one line with its field."""

import dataclasses
import json
import subprocess
import sys
from typing import ClassVar, Literal

import pytest

from refiner_export.common.settings import Settings, UserError, from_dict, require


@dataclasses.dataclass(unsafe_hash=True)
class Part(Settings):
  """A base class with a class variable, which is not a field."""
  reads: ClassVar[tuple[str, ...]] = ("image",)


@dataclasses.dataclass(unsafe_hash=True)
class Plain(Part):
  width: int = 4

  def check(self, path):
    require(self.width > 0, f"{path}.width={self.width} must be positive")


@dataclasses.dataclass(unsafe_hash=True)
class Nested(Part):
  inner: Part = dataclasses.field(default_factory=Plain)
  share: float = 0.5


@dataclasses.dataclass(unsafe_hash=True)
class Other(Settings):
  mode: Literal["a", "b"] = "a"


@dataclasses.dataclass(unsafe_hash=True)
class Root(Settings):
  name: str
  part: Part = dataclasses.field(default_factory=Plain)
  exact: Plain = dataclasses.field(default_factory=Plain)
  optional: Plain | None = None
  either: Plain | Other = dataclasses.field(default_factory=Other)
  parts: tuple[Part, ...] = ()
  scale: tuple[float, float] = (0.5, 1.0)
  limit: int | None = None

  def check(self, path):
    require(self.name != "wrong", f"{path}.name and {path}.parts cannot go together")


def read_back(root: Root) -> Root:
  root.finalize()
  return from_dict(Root, json.loads(root.to_json()))


@pytest.mark.parametrize("root", [
    Root("plain"),
    Root("subclass", part=Nested(inner=Nested(share=0.25))),
    Root("tuple", parts=(Plain(2), Nested(), Plain(3))),
    Root("list", parts=[Nested(inner=Plain(7))], scale=[0.1, 0.2]),
    Root("optional", optional=Plain(9), limit=3),
    Root("either", either=Plain(5)),
])
def test_saved_and_read_back(root):
  again = read_back(root)
  assert again == root and hash(again) == hash(root)
  assert type(again.part) is type(root.part) and type(again.either) is type(root.either)
  with pytest.raises(dataclasses.FrozenInstanceError, match="already checked"):
    again.name = "other"
  for part in again.parts:
    with pytest.raises(dataclasses.FrozenInstanceError):
      part.width = 1


def test_the_class_is_written_only_where_it_is_needed():
  root = Root("x", part=Nested(), parts=(Plain(),), optional=Plain())
  root.finalize()
  values = json.loads(root.to_json())
  assert values["part"]["type"] == f"{__name__}:Nested" and values["parts"][0]["type"] == f"{__name__}:Plain"
  assert "type" not in values and "type" not in values["exact"] and "type" not in values["optional"]
  assert "reads" not in values["part"]


@pytest.mark.parametrize("root, message", [
    (Root(3), r"config.name: expected str, got 3 \(int\)"),
    (Root("x", part=Other()), r"config.part: expected Part, got Other"),
    (Root("x", exact=Nested()), r"config.exact: expected Plain, got Nested"),
    (Root("x", optional=Other()), r"config.optional: expected Plain \| NoneType, got Other"),
    (Root("x", parts=(Plain(), Other())), r"config.parts\[1\]: expected Part, got Other"),
    (Root("x", parts=Plain()), r"config.parts: expected tuple\[Part, ...\], got Plain"),
    (Root("x", parts=(Plain(), Nested(inner=Plain(0)))), r"config.parts\[1\].inner.width=0 must be positive"),
    (Root("x", parts=(Plain(), Nested(share="all"))), r"config.parts\[1\].share: expected float, got 'all' \(str\)"),
    (Root("x", scale=(0.5,)), r"config.scale: expected tuple\[float, float\], got \(0.5,\) \(tuple\)"),
    (Root("x", scale=(0.5, "b")), r"config.scale\[1\]: expected float, got 'b' \(str\)"),
    (Root("x", either=Other("c")), r"config.either.mode: expected Literal\['a', 'b'\], got 'c' \(str\)"),
    (Root("wrong"), r"config.name and config.parts cannot go together"),
])
def test_wrong_values_are_named(root, message):
  with pytest.raises(UserError, match=f"^{message}$") as caught:
    root.finalize()
  assert "\n" not in str(caught.value)


def change(**changes) -> dict:
  root = Root("x", part=Nested(), parts=(Plain(), Nested()))
  root.finalize()
  return json.loads(root.to_json()) | changes


@pytest.mark.parametrize("values, message", [
    (change(nmae="x"), r"config.nmae: unknown field \(did you mean name\?\)"),
    (change(parts=[{"type": f"{__name__}:Plain", "widht": 3}]), r"config.parts\[0\].widht: unknown field .*width.*"),
    (change(part={"type": f"{__name__}:Other"}), rf"config.part: expected Part, got {__name__}:Other"),
    (change(part={"type": f"{__name__}:Lost"}), rf"config.part: there is no settings class {__name__}:Lost"),
    (change(part={"type": "json:JSONDecoder"}), r"config.part: there is no settings class json:JSONDecoder"),
    (change(part={"type": "somebody.parts:Wide"}), r"config.part: its class somebody.parts:Wide is not known here: "
                                                   r"add --with=somebody.parts .*"),
    (change(part={"type": "lyrics_jax.nothing:Wide"}), r"config.part: its class lyrics_jax.nothing:Wide cannot be .*"),
    (change(either={"mode": "a"}), r"config.either: no 'type' entry says which class it is: expected Plain or Other"),
    (change(limit={"type": f"{__name__}:Plain"}), rf"config.limit: expected no settings, got {__name__}:Plain"),
    ({"part": {"type": f"{__name__}:Plain"}}, r"config.name is missing: Root needs it"),
])
def test_what_cannot_be_read_back_is_named(values, message):
  with pytest.raises(UserError, match=f"^{message}$") as caught:
    from_dict(Root, values)
  assert "\n" not in str(caught.value)


def test_easy_mistakes_of_a_class_are_named():
  class Undecorated(Part):
    depth: int = 2

  @dataclasses.dataclass
  class Unhashable(Part):
    depth: int = 2

  @dataclasses.dataclass(unsafe_hash=True)
  class Inside(Part):
    pass

  with pytest.raises(UserError, match=r"config.part: Undecorated.depth is not a field: write @dataclasses"):
    Root("x", part=Undecorated()).finalize()
  with pytest.raises(UserError, match=r"config.part: Unhashable is not hashable: write @dataclasses"):
    Root("x", part=Unhashable()).finalize()
  root = Root("x", part=Inside())
  root.finalize()
  with pytest.raises(UserError, match="Inside is defined inside a function.*: define it at the top of a module"):
    root.to_json()


MODULE_WITH_STRINGS = """
from __future__ import annotations
import dataclasses, json, sys
from refiner_export.common.settings import Settings, UserError, from_dict

@dataclasses.dataclass(unsafe_hash=True)
class Inner(Settings):
  width: int = 3

@dataclasses.dataclass(unsafe_hash=True)
class Outer(Settings):
  inner: Inner | None = None
  parts: tuple[Inner, ...] = ()

outer = Outer(Inner(4), (Inner(5),))
outer.finalize()
assert from_dict(Outer, json.loads(outer.to_json())) == outer
try:
  Outer(parts=("no",)).finalize()
except UserError as error:
  print(error)
"""


def test_annotations_that_are_strings():
  result = subprocess.run([sys.executable, "-c", MODULE_WITH_STRINGS], capture_output=True, text=True, timeout=60)
  assert result.stdout == "config.parts[0]: expected Inner, got 'no' (str)\n", result.stderr
