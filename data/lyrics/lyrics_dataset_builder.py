"""A TFDS data set of the JSON lines in this folder, a config a language.

Prepare it with `python data/lyrics/lyrics_dataset_builder.py --out=DIR`, then
train on `DIR/lyrics/hindi/1.0.0` or `DIR/lyrics/bengali/1.0.0`. It is written
as ArrayRecord, so TensorFlow is not needed.
"""

import argparse
from collections.abc import Iterator
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from gemma_sft import records

_FOLDER = pathlib.Path(__file__).parent
_COLUMNS = ('id', 'title', 'style', 'language')
_LINES = ('lines', 'romanized')


class Lyrics(tfds.core.GeneratorBasedBuilder):
  """Song lyrics, a line of verse an item, with their romanisation."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name='hindi', description='In Devanagari.'),
      tfds.core.BuilderConfig(name='bengali', description='In Bengali script.'),
  ]

  def __init__(self, *, source: pathlib.Path = _FOLDER, **kwargs):
    self._source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=self.__doc__,
        features=tfds.features.FeaturesDict({
            **{name: tfds.features.Text() for name in _COLUMNS},
            **{name: tfds.features.Sequence(tfds.features.Text())
               for name in _LINES},
        }),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing to download.
    folder = self._source / self.builder_config.name
    return {
        split: self._generate_examples(folder / f'{split}.jsonl')
        for split in ('train', 'validation', 'test')
    }

  def _generate_examples(
      self, path: pathlib.Path
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in records.read(str(path), format='jsonl'):
      yield record.fields['id'], record.fields


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, default=_FOLDER)
  parser.add_argument('--out', type=pathlib.Path, default=_FOLDER / 'tfds')
  args = parser.parse_args()
  # The default would keep what an earlier version of the files has left there.
  mode = tfds.GenerateMode.REUSE_CACHE_IF_EXISTS
  for config in Lyrics.builder_configs:
    builder = Lyrics(
        source=args.source, config=config, data_dir=args.out,
        file_format='array_record'
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            download_mode=mode, try_download_gcs=False
        )
    )
    print(f'Prepared {builder.data_dir}')


if __name__ == '__main__':
  main()
