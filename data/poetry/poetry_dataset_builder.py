"""Builds a TFDS data set from the JSON lines in this folder.

Run `python data/poetry/poetry_dataset_builder.py --out=DIR`, then train on
`DIR/poetry/1.0.0`.
"""

import argparse
import pathlib

from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Poetry(tfds_builder.Builder):
  """Regulated verse in four forms, by title."""

  SUFFIX = '.jsonl'
  FEATURES = tfds_builder.text_features('title', 'form', 'text')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  tfds_builder.prepare(Poetry, **vars(parser.parse_args()))


if __name__ == '__main__':
  main()
