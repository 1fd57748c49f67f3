"""Builds a TFDS data set from the CSV files in this folder.

Run `python data/slang/slang_dataset_builder.py --out=DIR`, then train on
`DIR/slang/1.0.0`.
"""

import argparse
import pathlib

from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Slang(tfds_builder.Builder):
  """Slang terms with their meaning, an example and a context."""

  SUFFIX = '.csv'
  FEATURES = tfds_builder.text_features(
      'Slang', 'Description', 'Example', 'Context')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  tfds_builder.prepare(Slang, **vars(parser.parse_args()))


if __name__ == '__main__':
  main()
