"""Your own prompts and answers on Gemma 3 270M.

    python -m gemma_sft.train --config=configs/chat.py --workdir=W \\
      --config.data.train=FILE --config.data.validation=FILE

Files and columns: see README.md, "Bring your own data". Without validation data
nothing is evaluated and the last checkpoint counts.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  """Returns the config; `data.train` is yours to set."""
  config = default.get_config()
  config.task = 'chat'
  config.data.update(batch_size=2)
  config.lora.update(rank=16, alpha=16.0, targets='attn/|mlp/')
  # What served Blop on the same model: configs/blop.py.
  config.optimizer.update(learning_rate=1e-3, weight_decay=0.01)
  return config
