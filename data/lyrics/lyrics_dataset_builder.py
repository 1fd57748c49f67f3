"""Builds a TFDS data set from the JSON lines in this folder.

Run `python data/lyrics/lyrics_dataset_builder.py --out=DIR`, then train on
`DIR/lyrics/hindi/1.0.0` or `DIR/lyrics/bengali/1.0.0`: each language is a
config.
"""

import argparse
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from gemma_sft.inputs import records
from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Lyrics(tfds_builder.Builder):
  """Song lyrics as lists of lines, with their romanisation."""

  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name='hindi', description='In Devanagari.'),
      tfds.core.BuilderConfig(name='bengali', description='In Bengali script.'),
  ]
  SUFFIX = '.jsonl'
  FEATURES = {
      **tfds_builder.text_features('title', 'style', 'language'),
      **{name: tfds.features.Sequence(tfds.features.Text())
         for name in ('lines', 'romanized')},
  }

  def folder(self) -> pathlib.Path:
    return self.source / self.builder_config.name

  def example(self, record: records.Record) -> dict[str, Any]:
    return record.fields  # They include the song's id.


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  tfds_builder.prepare(Lyrics, **vars(parser.parse_args()))


if __name__ == '__main__':
  main()
