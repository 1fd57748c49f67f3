"""A TFDS data set of the JSON lines in this folder, a config a language.

Prepare it with `python data/lyrics/lyrics_dataset_builder.py --out=DIR`, then
train on `DIR/lyrics/hindi/1.0.0` or `DIR/lyrics/bengali/1.0.0`.
"""

import argparse
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from gemma_sft.inputs import records
from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Lyrics(tfds_builder.Builder):
  """Song lyrics, a line of verse an item, with their romanisation."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name='hindi', description='In Devanagari.'),
      tfds.core.BuilderConfig(name='bengali', description='In Bengali script.'),
  ]
  SUFFIX = '.jsonl'
  FEATURES = {
      **{name: tfds.features.Text() for name in ('title', 'style', 'language')},
      **{name: tfds.features.Sequence(tfds.features.Text())
         for name in ('lines', 'romanized')},
  }

  def folder(self) -> pathlib.Path:
    return self.source / self.builder_config.name

  def example(self, record: records.Record) -> dict[str, Any]:
    return record.fields  # With the id of the song.


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  args = parser.parse_args()
  for config in Lyrics.builder_configs:
    tfds_builder.prepare(Lyrics(
        source=args.source, config=config, data_dir=args.out,
        file_format='array_record'))


if __name__ == '__main__':
  main()
