"""The model of the PyTorch peers: transformers with PEFT's adapters."""

from typing import Any
from typing import Callable

import peft
import torch
import transformers

from peers import common

LIBRARIES = ('torch', 'transformers', 'peft')


def device(spec: common.Spec) -> str:
  """Returns PyTorch's name of the device."""
  return 'cuda' if spec.gpu else 'cpu'


def load_base(spec: common.Spec) -> transformers.PreTrainedModel:
  """Returns the base in the dtype, on the device."""
  if not spec.gpu:
    torch.set_num_threads(1)
  model = transformers.Gemma3ForCausalLM.from_pretrained(
      spec.work, dtype=getattr(torch, spec.dtype),
      attn_implementation=spec.attention)
  for parameter in model.parameters():
    # Copies: pages of a mapped file would count as memory of the steps.
    parameter.data = parameter.data.clone()
  return model.to(device(spec))


def lora_config() -> peft.LoraConfig:
  """Returns PEFT's settings for the common adapters."""
  return peft.LoraConfig(
      r=common.RANK, lora_alpha=common.ALPHA, lora_dropout=0.0, bias='none',
      task_type='CAUSAL_LM',
      target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'])


def fill_adapters(spec: common.Spec, model: torch.nn.Module) -> None:
  """Sets PEFT's A to the common one; its B is zero already."""
  layers = model.get_base_model().model.layers
  for layer, name, a_RI in common.load_adapters(spec):
    module = getattr(layers[layer].self_attn, f'{name}_proj')
    with torch.no_grad():
      module.lora_A['default'].weight.copy_(torch.from_numpy(a_RI))
    assert not module.lora_B['default'].weight.any()


def n_trainable(model: torch.nn.Module) -> int:
  """Returns the number of trained weights."""
  return sum(p.numel() for p in model.parameters() if p.requires_grad)


def product(spec: common.Spec, n: int) -> Callable[[], Any]:
  """Returns a call that multiplies two (n, n) matrices and waits."""
  x = torch.randn(n, n, device=device(spec)).to(getattr(torch, spec.dtype))

  def run():
    torch.matmul(x, x)
    if spec.gpu:
      torch.cuda.synchronize()

  return run


def device_bytes(spec: common.Spec, *, peak: bool) -> int:
  """Returns the allocated bytes, now or at their peak; 0 on a CPU."""
  read = (torch.cuda.max_memory_allocated if peak
          else torch.cuda.memory_allocated)
  return read() if spec.gpu else 0
