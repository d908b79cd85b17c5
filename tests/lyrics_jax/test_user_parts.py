"""A user's own source, task, connector, objective and evaluation, from files outside the packages, in one run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from refiner_export.records.reader import RecordDirectory

ROOT = pathlib.Path(__file__).parents[2]
FILES = pathlib.Path(__file__).parent / "user_files"
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def command(module: str, *arguments: str) -> str:
  """Runs a command of the packages; returns what it said."""
  result = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=ENVIRONMENT)
  assert result.returncode == 0, result.stderr
  return result.stdout + result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
  """Records of the user's source, made by two workers, tokenizers, and two steps of training."""
  folder = tmp_path_factory.mktemp("user")
  records, tokenizers, run = folder / "records", folder / "tokenizers", folder / "run"
  command("refiner_export", "--config", str(FILES / "user_export.py"), f"--config.output={records}")
  command("lyrics_jax.data.train_tokenizers", f"--records={records}", f"--output={tokenizers}")
  command("lyrics_jax.train", "--config", str(FILES / "user_train.py"), f"--config.output={run}",
          f"--config.data.records={records}", f"--config.data.llm_tokenizer={tokenizers}/llm")
  return run


def test_every_part_takes_part(trained):
  lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2]
  for line in lines:
    assert line["loss"] == pytest.approx(line["lm"] + 1e-3 * line["z"], rel=1e-5) and line["z"] > 0
    assert line["weights/largest"] > 0
  records = RecordDirectory(trained.parent / "records")
  assert len(records) == 12 and records.manifest.source == "colour squares" and len(records.manifest.shards) == 4


def test_the_run_is_read_back_with_the_users_module(trained):
  """Whoever opens the run names the user's file; without it, the error says how."""
  ask = ("--checkpoint", str(trained), "--record", f"{trained.parent / 'records'}#0", "--prompt", "Which colour?")
  assert "Which colour?" in command("lyrics_jax.generate", *ask, f"--with={FILES / 'user_parts.py'}")
  refused = subprocess.run([sys.executable, "-m", "lyrics_jax.generate", *ask], cwd=ROOT, env=ENVIRONMENT,
                           capture_output=True, text=True)
  assert refused.returncode == 2 and "--with=" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
