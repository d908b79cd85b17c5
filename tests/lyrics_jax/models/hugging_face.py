"""A tiny LLaMA of Hugging Face's, with or without PEFT's adapters, and its weights at our paths."""

import jax.numpy as jnp
import torch
import transformers
from flax import nnx

MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
           "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
           "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ADAPTERS = {"lora_a": "lora_A", "lora_b": "lora_B"}


def make_llama(layers: int, kv_heads: int, spread: float) -> transformers.LlamaForCausalLM:
  """50 words, 32 wide, 4 heads, 48 in the MLP; weights of this spread, norms around 1."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
      num_key_value_heads=kv_heads, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0,
      tie_word_embeddings=False)).eval()
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=spread)
  return model


def tensors_at(path: tuple[str, ...], model: transformers.LlamaForCausalLM) -> list[torch.nn.Parameter]:
  """What lies at our path: one tensor, or one per layer."""
  if path[0] != "stack":
    return [{"words": model.model.embed_tokens, "norm": model.model.norm, "head": model.lm_head}[path[0]].weight]
  modules = [layer.get_submodule(MODULES[path[2]]) for layer in model.model.layers]
  if path[3] in _ADAPTERS:
    return [getattr(module, _ADAPTERS[path[3]])["default"].weight for module in modules]
  return [getattr(module, "base_layer", module).weight for module in modules]


def as_ours(path: tuple[str, ...], tensors: list[torch.Tensor]) -> jnp.ndarray:
  """Tensors of `tensors_at`, or their gradients, as our arrays lie in memory: kernels of q, k and v outputs first."""
  turned = path[-1] in ("lora_a", "lora_b") or path[-1] == "kernel" and path[-2] not in ("q", "k", "v")
  ours = [tensor.detach().T if turned else tensor.detach() for tensor in tensors]
  return jnp.asarray((torch.stack(ours) if path[0] == "stack" else ours[0]).numpy())


def state_of(model: transformers.LlamaForCausalLM, state: nnx.State) -> nnx.State:
  """`state`, of a LLaMA of ours, with the weights of Hugging Face's."""
  return nnx.from_flat_state([(path, variable.replace(as_ours(path, tensors_at(path, model))))
                              for path, variable in nnx.to_flat_state(state)])
