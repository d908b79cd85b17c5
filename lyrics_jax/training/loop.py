"""The training loop of every stage.

Order of one step, and why: take a batch; dispatch the step, which is asynchronous; only then look at the metrics of the
step before, so that the device never waits for the host; evaluate; save; log; stop when preempted.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lyrics_jax.config import Config
from lyrics_jax.data.batch import text_masks, text_tokens
from lyrics_jax.data.buckets import Lengths, cut_to, lengths_of, most_shapes
from lyrics_jax.data.loader import train_batches
from lyrics_jax.data.rows import Records
from lyrics_jax.sharding import check_batch, global_batch, make_mesh
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.evaluations import Evaluation
from lyrics_jax.training.initialise import Origin, initial_parameters
from lyrics_jax.training.metrics import Metrics
from lyrics_jax.training.optimizer import learning_rate, make_optimizer
from lyrics_jax.training.parameters import ModelParameters, Parameters
from lyrics_jax.training.step import TrainState, initial_state, make_train_step
from refiner_export.common.settings import UserError


class NonFiniteLoss(UserError):
  """A loss or gradient became infinite or not a number; the message names the step and the examples."""


def train(config: Config, records: Records, find_origin: Callable[[ModelParameters], Origin | None],
          evaluations: Sequence[Evaluation] = (), load: Callable[..., Any] | None = None) -> None:
  """Trains `config.stage` from the newest checkpoint in `config.output`, or from the start, to `config.steps`.

  Args:
    records: what is trained on; it has a `manifest`.
    find_origin: what a new run starts from, by the model's parameters; None for fresh ones.
    evaluations: what is measured on the way.
    load: makes the `LoadedModel` that evaluations are given, from (model parameters, mesh, trained, frozen).
  """
  # --- mesh and model: everything abstract first ---
  mesh = make_mesh(config.mesh)
  check_batch(config.microbatch, mesh)
  parameters = ModelParameters.of(config)
  optimizer = make_optimizer(config.optimizer, config.steps, parameters.split(parameters.axes)[0])
  parameters.shardings(mesh)

  # --- data ---
  examples = config.data.rows.examples(config.data, config.fields, config.dimensions, config.stage.objectives)
  data = train_batches(config.data, examples, records, config.batch_size, config.seed, jax.process_index(),
                       jax.process_count())

  # --- parameters: from this run's newest checkpoint, from elsewhere, or fresh ---
  logging.info("parameters\n%s", parameters.report())
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
  start = int(state.step)
  schedule = learning_rate(config.optimizer, config.steps)
  train_step = make_train_step(parameters, optimizer, schedule, mesh)
  key = jax.random.key(config.seed)
  metrics = Metrics(config.output, start, config.steps)
  measure = _Measure(evaluations, load, parameters, mesh, config.steps)
  shapes = _Shapes(config)
  pending = None  # (step, its metrics on the device, its records' names)
  # Closed after an error too: a checkpoint may still be on its way to the disk.
  with jax.set_mesh(mesh), contextlib.closing(checkpoints), contextlib.closing(metrics), _preemption() as preempted:
    for step in range(start + 1, config.steps + 1):
      batch = next(data)
      names = batch.pop("records")
      batch = shapes.cut(step, batch)
      state, values = train_step(state, frozen, global_batch(mesh, batch), key)
      if pending is not None:
        _finish(metrics, config, *pending)
      # Counted after the step before was told its rates.
      metrics.count(text_tokens(batch, config.fields) * jax.process_count(), config.batch_size)
      if measure.due(step):
        jax.block_until_ready(values)  # the step's own time counts as training
        with metrics.paused():
          values = values | measure(step, state, frozen)
      pending = (step, values, names)
      stop = preempted() or checkpoints.reached_preemption(step)
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        _finish(metrics, config, *pending)  # a state that is not finite is never saved as good
        pending = None
        checkpoints.save(state, data, parameters)
      if stop:
        logging.warning("preempted: saved step %d of %s; start again to continue", step, config.output)
        break


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


class _Shapes:
  """Cuts the texts of a batch to their bucket, and says which shapes are compiled."""

  def __init__(self, config: Config):
    self.fields, self.buckets = config.fields, config.data.buckets
    self.met: list[Lengths] = []

  def cut(self, step: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    lengths = _agree(lengths_of(self.fields, self.buckets, batch))
    if lengths not in self.met:
      self.met.append(lengths)
      texts = ", ".join(f"{lengths[name]} ({name.removesuffix('_mask')})" for name in text_masks(self.fields))
      logging.info("step %d: compiling for texts of %s tokens (%d of at most %d compilations)", step, texts,
                   len(self.met), most_shapes(self.fields, self.buckets))
    return cut_to(lengths, batch)


def _agree(lengths: Lengths) -> Lengths:
  """With several hosts, the maximum length over hosts for each array: one global batch has one shape."""
  if jax.process_count() == 1:
    return lengths
  everywhere = multihost_utils.process_allgather(np.array(list(lengths.values()), np.int32))
  return dict(zip(lengths, everywhere.max(0).tolist()))


def _finish(metrics: Metrics, config: Config, step: int, values: dict[str, jax.Array], names: list[str]) -> None:
  values = {name: float(value) for name, value in jax.device_get(values).items()}
  if not values.pop("finite"):
    raise NonFiniteLoss(f"loss or gradient is not finite at step {step} (loss {values['loss']}, gradient norm "
                        f"{values['gradient_norm']}); the update was not applied. Examples on this host: "
                        f"{', '.join(names)}. Lower config.optimizer.peak_lr, or look at these records; the last "
                        "checkpoint is good")
  if step % config.log_every == 0 or step == config.steps:
    metrics.write(step, values)


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[], bool]]:
  """Makes SIGTERM, which clouds send before taking a machine, end the loop after its current step; yields the question.

  Several hosts must stop after the same step: there JAX's own service catches the signal and Orbax asks it.
  """
  if jax.process_count() > 1:
    yield lambda: False
    return
  received = []

  def receive(*_) -> None:
    received.append(True)

  before = signal.signal(signal.SIGTERM, receive)
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)
