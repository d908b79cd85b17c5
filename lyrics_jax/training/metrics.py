"""What a run reports: a progress line or bar, `metrics.jsonl`, and TensorBoard."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

_QUIET = ("gradient_norm", "learning_rate")  # written, but not shown in the progress line


class Metrics:
  """Writes the metrics of a run that begins, or goes on, at step `start`. Only the first host writes."""

  def __init__(self, output: str, start: int, steps: int):
    self.main = jax.process_index() == 0
    if not self.main:
      return
    directory = epath.Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    self.path = directory / "metrics.jsonl"
    # Steps beyond `start` are computed again. A line cut off by a kill would spoil the next one.
    kept = ""
    for entry in read(output):
      if entry["step"] <= start:
        kept += json.dumps(entry) + "\n"
    self.path.write_text(kept)
    self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start)
    self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
    self.steps, self.started, self.start = steps, time.monotonic(), start
    self.tokens = self.images = 0
    self.window = time.monotonic()

  def count(self, tokens: int, images: int) -> None:
    """Adds a step's numbers of tokens and pictures, over all hosts, to the throughput."""
    if self.main:
      self.tokens, self.images = self.tokens + tokens, self.images + images
      if self.bar:
        self.bar.update()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What happens inside does not count in the rates."""
    began = time.monotonic()
    yield
    if self.main:
      self.window += time.monotonic() - began

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes metrics of step `step`, with rates since the last call."""
    if not self.main:
      return
    elapsed = max(time.monotonic() - self.window, 1e-9)
    rates = {"tokens_per_second": self.tokens / elapsed, "images_per_second": self.images / elapsed}
    self.tokens, self.images, self.window = 0, 0, time.monotonic()
    with self.path.open("a") as file:
      file.write(json.dumps({"step": step, **values, **rates}) + "\n")
    for name, value in (values | rates).items():
      self.board.add_scalar(name, value, step)
    self._show(step, values, rates["tokens_per_second"])

  def _show(self, step: int, values: dict[str, float], tokens_per_second: float) -> None:
    """A line, or the bar's text, with the losses. Figures of evaluations, which have a slash, are left out."""
    losses = []
    for name, value in values.items():
      if name not in _QUIET and "/" not in name:
        losses.append(f"{name} {value:.3f}")
    shown = "  ".join(losses)
    if self.bar:
      self.bar.set_postfix_str(shown)
      return
    rate = (step - self.start) / (time.monotonic() - self.started)
    left = (self.steps - step) / rate
    logging.info("step %d/%d  %s  %.2f steps/s  %.0f tokens/s  %d:%02d left", step, self.steps, shown, rate,
                 tokens_per_second, left // 60, left % 60)

  def close(self) -> None:
    if self.main:
      self.board.close()
      if self.bar:
        self.bar.close()


def read(output: str) -> list[dict[str, float]]:
  """The metrics of a run so far, one dictionary a line. A line that a kill cut off is left out."""
  path = epath.Path(output) / "metrics.jsonl"
  entries = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      entries.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return entries
