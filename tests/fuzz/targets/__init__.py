"""The targets; see the docstring of the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Drill:
  """How a target is tried.

  Attributes:
    share: Its share of the cases.
    packages: The packages to instrument.
    guided: Whether coverage guides new cases. If not, the strategy makes all of
      them: the tested code runs in another process or language.
    as_json: Whether a case is a JSON document, to be mutated as a tree.
  """

  share: float
  packages: tuple[str, ...]
  guided: bool = True
  as_json: bool = False


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
    'blop': Drill(0.0005, ('gemma_sft.tasks',), guided=False),
}
