"""What the backward pass of a block keeps, and what it recomputes."""

import jax
from jax.ad_checkpoint import checkpoint_name

# Names of results by which a policy keeps them: results of attention, and results of a linear map together with what is
# done to them at once.
ATTENTION, LINEAR = "attention", "linear"
named = checkpoint_name

# What is kept besides a block's input; without a policy, nothing is.
POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(LINEAR, ATTENTION)),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),  # attention is the dearest to compute again
    "full": None,
}
