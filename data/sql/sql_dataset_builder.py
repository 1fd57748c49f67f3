"""A TFDS data set of the questions and databases in this folder.

Prepare it with `python data/sql/sql_dataset_builder.py --out=DIR`, then train
on `DIR/sql/1.0.0`. It is written as ArrayRecord, so TensorFlow is not needed.
Each example carries its database as a script, since no folder lies beside it.
"""

import argparse
from collections.abc import Iterator
import pathlib

import tensorflow_datasets as tfds

from gemma_sft import records

_FOLDER = pathlib.Path(__file__).parent


class Sql(tfds.core.GeneratorBasedBuilder):
  """Questions about eight databases with the queries that answer them."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}

  def __init__(self, *, source: pathlib.Path = _FOLDER, **kwargs):
    self._source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=self.__doc__,
        features=tfds.features.FeaturesDict({
            'db_id': tfds.features.Text(),
            'question': tfds.features.Text(),
            'query': tfds.features.Text(),
            'context': tfds.features.Text(doc='CREATE TABLE and INSERT INTO.'),
            'id': tfds.features.Text(doc='File and line of the example.'),
        }),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing to download.
    return {
        split: self._generate_examples(self._source / f'{split}.jsonl')
        for split in ('train', 'validation', 'test')
    }

  def _generate_examples(
      self, path: pathlib.Path
  ) -> Iterator[tuple[str, dict[str, str]]]:
    for record in records.read(str(path)):
      name = record.fields['db_id']
      script = self._source / 'database' / name / f'{name}.sql'
      line = record.where.rpartition(':')[2]
      key = f'{path.name}:{line}'
      yield key, {**record.fields, 'context': script.read_text('utf-8'),
                  'id': key}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  args = parser.parse_args()
  builder = Sql(
      source=args.source, data_dir=args.out, file_format='array_record'
  )
  # The default would keep what an earlier version of the files has left there.
  mode = tfds.GenerateMode.REUSE_CACHE_IF_EXISTS
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
          download_mode=mode, try_download_gcs=False
      )
  )
  print(f'Prepared {builder.data_dir}')


if __name__ == '__main__':
  main()
