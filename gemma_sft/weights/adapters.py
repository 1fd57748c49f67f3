"""Trained adapters as tensors with PEFT's and llama.cpp's names.

For a weight (out, in) both formats store A as (R, in) and B as (out, R). Our
adapters have the axes of the library's einsums: heads before head width, which
is also the order in the files, so a reshape suffices. The same holds for DoRA's
magnitudes, (out,) in PEFT's files; llama.cpp does not support them.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import numpy as np

from gemma_sft import errors
from gemma_sft.adapters import projections
from gemma_sft.weights import names


@dataclasses.dataclass(frozen=True)
class TensorAdapter:
  """The adapter of the file tensor `name`, in f32."""

  name: str
  a: np.ndarray  # (R, in)
  b: np.ndarray  # (out, R)
  magnitude: np.ndarray | None  # (out,), of DoRA.


def to_file(
    layout: names.WeightLayout, adapters: Mapping[str, Any], form: str
) -> Iterator[TensorAdapter]:
  """Yields the adapters in the order of the tensors in 'hf' or 'gguf'.

  Raises:
    UserError: An adapter belongs to no weight of the model.
  """
  flat = {
      path: np.asarray(leaf, np.float32)
      for path, leaf in traverse_util.flatten_dict(adapters, sep='/').items()
  }
  for row in names.rows(layout):
    weight = row.library.removesuffix('/w')
    parts = projections.BY_LAYER.get(weight.rpartition('/')[2], ())
    for part, name in zip(parts, getattr(row, form)):
      prefix = f'{weight}/{part.name}'
      a = flat.pop(f'{prefix}/a', None)
      if a is None:
        continue
      b = flat.pop(f'{prefix}/b')
      m = flat.pop(f'{prefix}/m', None)
      rank = a.shape[-1]
      yield TensorAdapter(
          name, np.ascontiguousarray(a.reshape(-1, rank).T),
          np.ascontiguousarray(b.reshape(rank, -1).T),
          None if m is None else m.reshape(-1))
  if flat:
    raise errors.UserError(
        f'the adapter {next(iter(flat))} belongs to no weight of the model',
        'the adapters of this model', 'use the config that it was trained with')


def peft_tensors(
    layout: names.WeightLayout, adapters: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a PEFT adapter_model.safetensors."""
  tensors = {}
  for adapter in to_file(layout, adapters, 'hf'):
    prefix = 'base_model.model.' + adapter.name.removesuffix('.weight')
    tensors[f'{prefix}.lora_A.weight'] = adapter.a
    tensors[f'{prefix}.lora_B.weight'] = adapter.b
    if adapter.magnitude is not None:
      tensors[f'{prefix}.lora_magnitude_vector'] = adapter.magnitude
  return tensors


def peft_config(
    layout: names.WeightLayout,
    adapters: Mapping[str, Any],
    *,
    base: str,
    rank: int,
    alpha: float,
    use_rslora: bool,
    dropout: float,
) -> dict[str, Any]:
  """Returns PEFT's adapter_config.json.

  A projection that only some layers adapt is listed in `target_modules` by the
  full names of its modules. `base` is a hub name or a folder.
  """
  found = list(to_file(layout, adapters, 'hf'))
  modules = [adapter.name.removesuffix('.weight') for adapter in found]
  return {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'base_model_name_or_path': base,
      'r': rank,
      'lora_alpha': alpha,
      'lora_dropout': dropout,
      'use_rslora': use_rslora,
      'use_dora': any(adapter.magnitude is not None for adapter in found),
      'bias': 'none',
      'fan_in_fan_out': False,
      'inference_mode': True,
      'modules_to_save': None,
      'target_modules': _short(modules, names.n_layers(layout)),
  }


def _short(modules: list[str], n_layers: int) -> list[str]:
  """Returns 'q_proj' for a projection of all layers, else full names."""
  by_kind = {}
  for name in modules:
    by_kind.setdefault(name.rpartition('.')[2], []).append(name)
  short = []
  for kind, full in by_kind.items():
    short += [kind] if len(full) == n_layers else full
  return short
