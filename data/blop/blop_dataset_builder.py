"""A TFDS data set of the `# INPUT` / `# OUTPUT` files in this folder.

Prepare it with `python data/blop/blop_dataset_builder.py --out=DIR`, then
train on `DIR/blop/1.0.0`.
"""

import argparse
import pathlib

import tensorflow_datasets as tfds

from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Blop(tfds_builder.Builder):
  """Requests for Blop code with their answers."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  SUFFIX = '.txt'
  FORMAT = 'pairs'
  FEATURES = {name: tfds.features.Text() for name in ('prompt', 'completion')}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  args = parser.parse_args()
  tfds_builder.prepare(Blop(
      source=args.source, data_dir=args.out, file_format='array_record'))


if __name__ == '__main__':
  main()
