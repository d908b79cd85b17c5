"""`python -m lyrics_jax.plan` as a person meets it, and the configurations of published size."""

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest
import tiny

from lyrics_jax import plan
from lyrics_jax.planning import search
from lyrics_jax.planning.compile import DoesNotFit
from lyrics_jax.planning.topology import Target
from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.training.parameters import ModelParameters

CONFIG = '''
import sys
sys.path.insert(0, "tests/lyrics_jax")
import tiny

def get_config():
  config = tiny.make_config("instruct", **{changes})
  del config.__dict__["_final"]
  return config
'''


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "lyrics_jax.plan", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_what_to_install():
  done = run("--config", "configs/align_vit_l.py", "--topology", "v5e:4x4")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == ("error: compiling for a TPU needs libtpu, which is not installed: "
                                          "pip install 'lyrics_jax[plan]'")


def test_without_a_topology():
  done = run("--config", "configs/align_vit_l.py", "--topology=")
  assert done.returncode == 2 and "--topology is required" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("helps, said", [
    ("full", "It fits with --config.compute.remat=full"),
    (None, "Neither remat, more fsdp, more accumulate_steps nor int8 makes it fit: use more chips")])
def test_a_step_that_does_not_fit(helps, said, program, target, monkeypatch, capsys, tmp_path):
  """A rule takes the compiler's place; what is said and the exit code are the command's."""
  def compile_by_rule(layout):
    if layout.config.compute.remat != helps:
      raise DoesNotFit(20 * 2**30, 16 * 2**30)
    return program

  monkeypatch.setattr(Target, "of", lambda *_: target)
  monkeypatch.setattr(plan, "compile_step", compile_by_rule)
  monkeypatch.setattr(search, "compile_step", compile_by_rule)
  with pytest.raises(SystemExit) as exit_:
    plan.plan(tiny.make_config("instruct", mesh=MeshSettings(8, 1, 1)), target.name, str(tmp_path))
  last = capsys.readouterr().err.splitlines()[-1]
  assert exit_.value.code == 1 and said in last
  assert "needs 20.0 GiB of HBM per chip, 4.0 GiB more than the 16.0 GiB" in last


@pytest.mark.parametrize("name, frozen, batch, steps", [
    ("align_vit_l", 303.2, 512, 800_000),
    ("instruct_vicuna7b", 303.2 + 6738.4, 64, 300_000),
    ("instruct_vicuna13b", 303.2 + 13015.9, 64, 300_000),
    ("llava15_pretrain", 290.9 + 6738.4, 256, 2_181),
    ("llava15_finetune", 290.9, 128, 5_198),
    ("llava15_finetune_lora", 290.9 + 6738.4, 128, 5_198)])
def test_published_sizes(name, frozen, batch, steps):
  """Frozen millions: ViT-L/14 without its last norm, LLaMA-7B and 13B (Touvron et al. 2023, table 2: 6.7B, 13.0B).

  LLaVA runs 23 of 24 blocks, of 12.6 millions each, at 336 pixels, which have 320 more positions.
  """
  config = importlib.import_module(f"configs.{name}").get_config()
  config.finalize()
  assert ModelParameters.of(config).count(False) / 1e6 == pytest.approx(frozen, abs=0.2)
  assert (config.batch_size, config.steps) == (batch, steps)


@pytest.mark.slow
def test_plan_of_a_small_model_for_a_tpu(tmp_path):
  pytest.importorskip("libtpu")
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(changes={"mesh__fsdp": 4}))
  done = run("--config", str(config), "--topology", "v5e:2x2", "--output", str(tmp_path / "plan"))
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "plan" / "plan.json").read_text())
  assert report["chips"] == 4 and report["seconds"]["fusions"] > 0
  assert {group["axis"] for group in report["collectives"]} == {"fsdp"}
  assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_axes_may_share_a_side_of_the_slice():
  """Neither 4 nor 8 nor 4 x 8 chips are 16."""
  pytest.importorskip("libtpu")
  mesh = make_mesh(MeshSettings(-1, 16, 1), Target.of("v5p:4x8x8").devices)
  assert mesh.shape == {"data": 16, "fsdp": 16, "tensor": 1}
