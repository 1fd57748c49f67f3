"""A TFDS data set of the questions and databases in this folder.

Prepare it with `python data/sql/sql_dataset_builder.py --out=DIR`, then train
on `DIR/sql/1.0.0`. Each example carries its database as a script, since no
folder lies beside it.
"""

import argparse
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from gemma_sft.inputs import records
from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Sql(tfds_builder.Builder):
  """Questions about eight databases with the queries that answer them."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  SUFFIX = '.jsonl'
  FEATURES = {
      'db_id': tfds.features.Text(),
      'question': tfds.features.Text(),
      'query': tfds.features.Text(),
      'context': tfds.features.Text(doc='CREATE TABLE and INSERT INTO.'),
  }

  def example(self, record: records.Record) -> dict[str, Any]:
    name = record.fields['db_id']
    script = self.source / 'database' / name / f'{name}.sql'
    return {**record.fields, 'context': script.read_text('utf-8')}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  args = parser.parse_args()
  tfds_builder.prepare(Sql(
      source=args.source, data_dir=args.out, file_format='array_record'))


if __name__ == '__main__':
  main()
