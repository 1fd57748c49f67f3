"""The targets; see the docstring of the package."""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Drill:
  """How a target is tried."""

  share: float  # Of the cases.
  packages: tuple[str, ...]  # To instrument.
  # Whether coverage guides new cases. If not, the strategy makes all of them:
  # the tested code runs in another process or language.
  guided: bool = True
  as_json: bool = False  # A case is JSON, to be mutated as a tree.


DRILLS = {
    'records': Drill(0.36, ('gemma_sft',)),
    'chat': Drill(0.13, ('gemma_sft',), as_json=True),
    'gguf': Drill(0.15, ('gemma_sft.weights', 'gguf')),
    'safetensors': Drill(0.12, ('gemma_sft.weights',)),
    'config': Drill(
        0.09, ('gemma_sft.cli', 'gemma_sft.config', 'gemma_sft.sweeping'),
        as_json=True),
    'web': Drill(
        0.13, ('gemma_sft.serving', 'gemma_sft.config', 'gemma_sft.chat'),
        as_json=True),
    'ratings': Drill(0.02, ('gemma_sft.serving.ratings',)),
    'sql': Drill(0.012, ('gemma_sft.tasks',), guided=False, as_json=True),
    'blop': Drill(0.0005, ('gemma_sft.tasks',), guided=False)}


@functools.cache
def model(num_layers: int = 2):
  """Returns the Gemma 3 of the targets, as small as it may be."""
  from gemma_sft import model as model_lib

  return model_lib.make_model(
      'custom', generation=3, vocab_size=512, num_layers=num_layers,
      embed_dim=8, hidden_dim=8, num_heads=2, num_kv_heads=1, head_dim=4,
      sliding_window=4)
