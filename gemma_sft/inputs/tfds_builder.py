"""Builds TFDS data sets from the files of a data folder.

Each folder's `<name>_dataset_builder.py` describes its columns; splits, keys
and preparation are here. The data sets are ArrayRecord files and need no
TensorFlow.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from gemma_sft.inputs import records as records_lib


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of train, validation and test; subclasses describe it."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  SUFFIX: str  # The ending of the three files, such as '.jsonl'.
  FORMAT = 'auto'  # See `records.read`.
  FEATURES: Mapping[str, Any]  # By column; `id` ('train.jsonl:7') is added.

  def __init__(self, *, source: pathlib.Path, **kwargs: Any):
    """Takes the files' folder, and the arguments of TFDS."""
    self.source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self, description=self.__doc__,
        features=tfds.features.FeaturesDict({
            **self.FEATURES,
            'id': tfds.features.Text(doc='File and line, or a name.')}))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # There is nothing to download.
    return {
        split: self._generate_examples(self.folder() / f'{split}{self.SUFFIX}')
        for split in ('train', 'validation', 'test')}

  def _generate_examples(
      self, path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in records_lib.read(str(path), format=self.FORMAT):
      line = record.where.rpartition(':')[2]
      example = {'id': f'{path.name}:{line}'} | self.example(record)
      yield example['id'], example

  def folder(self) -> pathlib.Path:
    """Returns the folder of the three files."""
    return self.source

  def example(self, record: records_lib.Record) -> dict[str, Any]:
    """Returns the columns of a record."""
    return {name: record.fields[name] for name in self.FEATURES}


def text_features(*names: str) -> dict[str, tfds.features.Text]:
  """Returns a text feature for each name."""
  return {name: tfds.features.Text() for name in names}


def prepare(
    builder: type[Builder], source: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the configs of a data set that `out` lacks, and prints where."""
  for config in builder.builder_configs or {None: None}:
    made = builder(source=source, config=config, data_dir=out,
                   file_format='array_record')
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(
        # The default mode would keep what was written from older files.
        download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,
        try_download_gcs=False))
    print(f'Prepared {made.data_dir}')
