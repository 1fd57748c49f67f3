"""Builds a TFDS data set from the questions and databases in this folder.

Run `python data/sql/sql_dataset_builder.py --out=DIR`, then train on
`DIR/sql/1.0.0`. Each example contains its database as a script, because the
data set has no folder of databases beside it.
"""

import argparse
import pathlib
from typing import Any

from gemma_sft.inputs import records
from gemma_sft.inputs import tfds_builder

_FOLDER = pathlib.Path(__file__).parent


class Sql(tfds_builder.Builder):
  """Questions about eight databases with the queries that answer them."""

  SUFFIX = '.jsonl'
  # `context` holds CREATE TABLE and INSERT INTO.
  FEATURES = tfds_builder.text_features(
      'db_id', 'question', 'query', 'context')

  def example(self, record: records.Record) -> dict[str, Any]:
    name = record.fields['db_id']
    script = self.source / 'database' / name / f'{name}.sql'
    return {**record.fields, 'context': script.read_text('utf-8')}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  tfds_builder.prepare(Sql, **vars(parser.parse_args()))


if __name__ == '__main__':
  main()
