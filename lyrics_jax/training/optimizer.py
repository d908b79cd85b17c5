"""AdamW with linear warm-up, cosine decay and clipping of the global gradient norm (paper section 4.1)."""

import optax

from lyrics_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  warmup = round(config.warmup_fraction * steps)
  return optax.warmup_cosine_decay_schedule(0.0 if warmup else config.peak_lr, config.peak_lr, warmup, steps, config.final_lr)


def make_optimizer(config: OptimizerConfig, steps: int, axes: dict[str, tuple]) -> optax.GradientTransformation:
  """`axes`: logical axes of the trained parameters by path; biases, norms and scalars (fewer than two) do not decay."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(learning_rate(config, steps), config.beta1, config.beta2, weight_decay=config.weight_decay,
                  mask=lambda parameters: {path: len(axes[path]) >= 2 for path in parameters}))
