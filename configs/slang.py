"""New slang terms for a context, judged by format, use and novelty.

    python -m gemma_sft.curate --config=configs/curation.py:slang --out=DIR
    python -m gemma_sft.train --config=configs/slang.py --workdir=W
    python -m gemma_sft.evaluate --workdir=W

With seed 0 the three attempts on the 270M give 0, 64 and 87 % good answers on
55 test prompts (data/README.md). The variant :270m, with three epochs, gives
67 %; it was not tried with ten. On validation the third attempt gives 82 % both
after three epochs, where its loss is lowest (2.75), and after ten (3.05).
"""

from ml_collections import config_dict

from configs import default


def get_config(arg: str = '270m') -> config_dict.ConfigDict:
  """Returns the config.

  '270m' is Gemma 3 270M, pretrained, from PyPI. The others are the seed
  project's attempts: 'attempt1' takes 150 rows with only the term and its
  description, rank 4, one epoch; 'attempt2' all rows and columns, rank 8, five
  epochs; 'attempt3' the same with ten epochs.
  """
  config = default.get_config()
  config.task = 'slang'
  config.data.update(
      train='data/slang/train.csv', validation='data/slang/validation.csv',
      test='data/slang/test.csv', max_length=256, batch_size=4)
  config.lora.targets = 'attn/|mlp/'
  config.optimizer.update(learning_rate=1e-3, weight_decay=0.01)
  config.eval.update(
      # The judge chooses the checkpoint: the validation loss rises after one
      # epoch, but usage and novelty of the terms improve until the second or
      # third.
      judged=-1, max_new_tokens=112, metric='judge/good', mode='max')
  # Greedy decoding gives the same term for similar contexts.
  config.sampling.update(temperature=0.8, repetition_penalty=1.1, top_p=0.95,
                         max_new_tokens=160)
  if arg in ('attempt1', 'attempt2', 'attempt3'):
    # The LoRA of Keras, which the seed project used, adapts q and v and scales
    # by 1.
    rank = 4 if arg == 'attempt1' else 8
    config.lora.update(rank=rank, alpha=float(rank), targets='/(q|v)$')
    config.train.epochs = {'attempt1': 1, 'attempt2': 5, 'attempt3': 10}[arg]
    if arg == 'attempt1':
      config.data.update(limit=150, fields=('Slang', 'Description'))
  elif arg != '270m':
    raise ValueError(f'configs/slang.py:{arg}: use :270m, :attempt1, :attempt2'
                     ' or :attempt3')
  return config


def sweep() -> dict:
  """Returns the seed project's three attempts as one comparison.

      python -m gemma_sft.sweep --config=configs/slang.py --workdir=W
  """
  return {'grid': {'config': ('attempt1', 'attempt2', 'attempt3')}, 'seeds': 3}
