"""A TFDS data set of the JSON lines in this folder.

Prepare it with `python data/poetry/poetry_dataset_builder.py --out=DIR`, then
train on `DIR/poetry/1.0.0`.
"""

import argparse
import pathlib

import tensorflow_datasets as tfds

from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Poetry(tfds_builder.Builder):
  """Regulated verse in four forms, by title."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  SUFFIX = '.jsonl'
  FEATURES = {name: tfds.features.Text() for name in ('title', 'form', 'text')}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  args = parser.parse_args()
  tfds_builder.prepare(Poetry(
      source=args.source, data_dir=args.out, file_format='array_record'))


if __name__ == '__main__':
  main()
