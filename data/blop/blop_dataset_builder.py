"""Builds a TFDS data set from the `# INPUT` / `# OUTPUT` files in this folder.

Run `python data/blop/blop_dataset_builder.py --out=DIR`, then train on
`DIR/blop/1.0.0`.
"""

import argparse
import pathlib

from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Blop(tfds_builder.Builder):
  """Requests for Blop code with their answers."""

  SUFFIX = '.txt'
  FORMAT = 'pairs'
  FEATURES = tfds_builder.text_features('prompt', 'completion')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  tfds_builder.prepare(Blop, **vars(parser.parse_args()))


if __name__ == '__main__':
  main()
