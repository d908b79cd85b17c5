"""The training loop of every stage.

The order of one step: take a batch; dispatch the step; report the step before; evaluate; save; stop when preempted.
Dispatching returns at once. The figures of the step before are read only after it, so that the device never waits for
the host.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lyrics_jax.config import Config
from lyrics_jax.data.batch import text_masks, text_tokens
from lyrics_jax.data.buckets import Lengths, cut_to, lengths_of, most_shapes
from lyrics_jax.data.loader import train_batches
from lyrics_jax.sharding import check_batch, global_batch, make_mesh
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.evaluations import Evaluation
from lyrics_jax.training.initialise import Origin, initial_parameters
from lyrics_jax.training.metrics import Metrics
from lyrics_jax.training.optimizer import learning_rate, make_optimizer
from lyrics_jax.training.parameters import ModelParameters, Parameters
from lyrics_jax.training.step import TrainState, initial_state, make_train_step
from refiner_export.common.settings import UserError
from refiner_export.records.reader import RecordDirectory


class NonFiniteLoss(UserError):
  """A loss or gradient is infinite or not a number. The message names the step and the records."""


def train(config: Config, records: RecordDirectory, find_origin: Callable[[ModelParameters], Origin | None],
          evaluations: Sequence[Evaluation] = (), load: Callable[..., Any] | None = None) -> None:
  """Trains `config.stage` from the newest checkpoint in `config.output`, or from the start, to `config.steps`.

  Args:
    records: what is trained on.
    find_origin: what a new run of this model starts from; None stands for fresh parameters.
    evaluations: what is measured on the way.
    load: makes the `LoadedModel` that evaluations are given, from (model parameters, mesh, trained, frozen).
  """
  # --- mesh, model and step: all of it abstract, so that a mistake is found before data and weights are read ---
  mesh = make_mesh(config.mesh)
  check_batch(config.microbatch, mesh)
  parameters = ModelParameters.of(config)
  optimizer = make_optimizer(config.optimizer, config.steps, parameters.split(parameters.axes)[0])
  train_step = make_train_step(parameters, optimizer, learning_rate(config.optimizer, config.steps), mesh)
  logging.info("parameters\n%s", parameters.report())

  # --- data ---
  data = _batches(config, records)

  # --- parameters: from this run's newest checkpoint, from elsewhere, or fresh ---
  checkpoints = Checkpoints(config.output, config.keep_checkpoints)
  origin = find_origin(parameters) if checkpoints.latest() is None else None
  trained, frozen = initial_parameters(parameters, mesh, checkpoints, origin)
  checkpoints.save_frozen(frozen, parameters)
  state = initial_state(parameters, optimizer, mesh, trained)
  if checkpoints.latest() is not None:
    state = checkpoints.restore(state, data, parameters)
    logging.info("continuing from step %d of %s", int(state.step), config.output)
  checkpoints.save_config(config, records.manifest)  # not before the old checkpoint was found to fit

  # --- loop ---
  start, key = int(state.step), jax.random.key(config.seed)
  shapes, reports = _Shapes(config), _Reports(config, Metrics(config.output, start, config.steps))
  measure = _Measure(evaluations, load, parameters, mesh, config.steps)
  # Both are closed after an error too: a checkpoint may still be on its way to the disk.
  with jax.set_mesh(mesh), contextlib.closing(checkpoints), contextlib.closing(reports), _preemption() as preempted:
    for step in range(start + 1, config.steps + 1):
      batch = next(data)
      names = batch.pop("records")
      batch = shapes.cut(step, batch)
      state, values = train_step(state, frozen, global_batch(mesh, batch), key)
      reports.finish()  # the step before
      reports.count(batch)
      if measure.due(step):
        with reports.paused(values):
          values = values | measure(step, state, frozen)
      reports.begin(step, values, names)
      stop = preempted.is_set() or checkpoints.reached_preemption(step)
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        reports.finish()  # a state that is not finite is never saved as good
        checkpoints.save(state, data, parameters)
      if stop:
        logging.warning("preempted: saved step %d of %s; start again to continue", step, config.output)
        break


def _batches(config: Config, records: RecordDirectory) -> grain.DatasetIterator:
  """The batches of this host."""
  examples = config.data.rows.examples(config.data, config.fields, config.dimensions, config.stage.objectives)
  return train_batches(config.data, examples, records, config.batch_size, config.seed, jax.process_index(),
                       jax.process_count())


class _Shapes:
  """Cuts the texts of a batch to their bucket, and says which shapes are compiled."""

  def __init__(self, config: Config):
    self.fields, self.buckets = config.fields, config.data.buckets
    self.met: list[Lengths] = []

  def cut(self, step: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    lengths = _agree(lengths_of(self.fields, self.buckets, batch))
    if lengths not in self.met:
      self.met.append(lengths)
      texts = []
      for name in text_masks(self.fields):
        texts.append(f"{lengths[name]} ({name.removesuffix('_mask')})")
      logging.info("step %d: compiling for texts of %s tokens (%d of at most %d compilations)", step, ", ".join(texts),
                   len(self.met), most_shapes(self.fields, self.buckets))
    return cut_to(lengths, batch)


def _agree(lengths: Lengths) -> Lengths:
  """With several hosts, take the maximum length over hosts for each array: one global batch has one shape."""
  if jax.process_count() == 1:
    return lengths
  everywhere = multihost_utils.process_allgather(np.array(list(lengths.values()), np.int32))
  return dict(zip(lengths, everywhere.max(0).tolist()))


class _Measure:
  """The evaluations of a run, on one loaded model that follows the training."""

  def __init__(self, evaluations: Sequence[Evaluation], load: Callable[..., Any] | None, parameters: ModelParameters,
               mesh: jax.sharding.Mesh, steps: int):
    self.evaluations, self.steps = evaluations, steps
    self.load, self.parameters, self.mesh = load, parameters, mesh
    self.loaded = None

  def due(self, step: int) -> bool:
    return any(evaluation.due(step, self.steps) for evaluation in self.evaluations)

  def __call__(self, step: int, state: TrainState, frozen: Parameters) -> dict[str, float]:
    if self.loaded is None:
      self.loaded = self.load(self.parameters, self.mesh, state.parameters, frozen)
    self.loaded.parameters = state.parameters, frozen
    figures = {}
    for evaluation in self.evaluations:
      if evaluation.due(step, self.steps):
        figures |= evaluation(self.loaded)
    self.loaded.parameters = None  # the next step donates these arrays
    return figures


class _Reports:
  """Writes the figures of a step when the next step is already on the device."""

  def __init__(self, config: Config, metrics: Metrics):
    self.config, self.metrics = config, metrics
    self.pending: tuple[int, dict[str, jax.Array], list[str]] | None = None

  def begin(self, step: int, values: dict[str, jax.Array], names: list[str]) -> None:
    """Keeps a step's figures, which may not be computed yet, and the names of this host's records in its batch."""
    self.pending = step, values, names

  def finish(self) -> None:
    """Waits for the figures of the step that was begun. Raises `NonFiniteLoss`."""
    if self.pending is None:
      return
    step, values, names = self.pending
    self.pending = None
    values = jax.tree.map(float, jax.device_get(values))
    if not values.pop("finite"):
      raise NonFiniteLoss(f"loss or gradient is not finite at step {step} (loss {values['loss']}, gradient norm "
                          f"{values['gradient_norm']}); the update was not applied. Examples on this host: "
                          f"{', '.join(names)}. Lower config.optimizer.peak_lr, or look at these records; the last "
                          "checkpoint is good")
    if step % self.config.log_every == 0 or step == self.config.steps:
      self.metrics.write(step, values)

  def count(self, batch: dict[str, np.ndarray]) -> None:
    """Adds a batch to the throughput. Called after `finish`, which writes the rates of the steps before."""
    self.metrics.count(text_tokens(batch, self.config.fields) * jax.process_count(), self.config.batch_size)

  @contextlib.contextmanager
  def paused(self, values: dict[str, jax.Array]) -> Iterator[None]:
    """What happens inside does not count in the rates. The step that computes `values` does, so it is awaited."""
    jax.block_until_ready(values)
    with self.metrics.paused():
      yield

  def close(self) -> None:
    self.metrics.close()


@contextlib.contextmanager
def _preemption() -> Iterator[threading.Event]:
  """An event that SIGTERM sets; clouds send this signal before they take a machine. The loop then ends after its step.

  Several hosts must stop after the same step. There JAX's own service catches the signal, Orbax asks the service, and
  this event is never set.
  """
  preempted = threading.Event()
  if jax.process_count() > 1:
    yield preempted
    return

  def receive(*_) -> None:
    preempted.set()

  before = signal.signal(signal.SIGTERM, receive)
  try:
    yield preempted
  finally:
    signal.signal(signal.SIGTERM, before)
