"""A Gemma of 0.1 M random weights on Blop data, for tests and debugging.

    python -m gemma_sft.train --config=configs/tiny.py --workdir=workdirs/tiny

It trains in seconds on a CPU and downloads nothing, but learns only the
frequencies of bytes. `--config=configs/tiny.py:2` takes generation 2.
"""

from ml_collections import config_dict

from configs import blop


def get_config(arg: str = '3') -> config_dict.ConfigDict:
  """Returns the config of a Gemma generation, 1 to 4."""
  config = blop.get_config()
  config.model.update(
      name='custom', weights='random', tokenizer='byte', generation=int(arg),
      vocab_size=512, num_layers=2, embed_dim=32, hidden_dim=64, num_heads=4,
      num_kv_heads=2, head_dim=16, sliding_window=64)
  config.data.update(max_length=768, batch_size=8)
  config.lora.update(rank=4, dropout=0.0)  # Tests compare exact numbers.
  config.optimizer.learning_rate = 1e-3
  config.train.update(steps=6, epochs=1, log_every=1)
  config.eval.update(
      every=3, judged=2, max_new_tokens=8, prompts=('What is Blop?',),
      metric='loss', mode='min')
  return config
