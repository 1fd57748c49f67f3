"""Your own prompts and answers on Gemma 3 270M.

    python -m gemma_sft.train --config=configs/chat.py --workdir=W \\
      --config.data.train=FILE --config.data.validation=FILE

README.md, "Bring your own data", describes the files and columns. Without
validation data there is no evaluation, and the last checkpoint is the best.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  """Returns the config; `data.train` has to be set."""
  config = default.get_config()
  config.task = 'chat'
  config.data.batch_size = 2
  config.lora.targets = 'attn/|mlp/'
  # The rate of lyrics.py, poetry.py, slang.py and sql.py on the same model.
  config.optimizer.update(learning_rate=1e-3, weight_decay=0.01)
  return config
