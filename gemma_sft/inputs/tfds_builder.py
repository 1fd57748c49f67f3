"""TFDS data sets of the files in a data folder: what all of them share.

A folder's `<name>_dataset_builder.py` names its columns and their description;
splits, keys and preparation are here. Written as ArrayRecord, and TensorFlow is
not needed.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from gemma_sft.inputs import records as records_lib

SPLITS = ('train', 'validation', 'test')


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of train, validation and test in one folder.

  Subclasses have a docstring, which describes the data, VERSION,
  RELEASE_NOTES, and:

  Attributes:
    SUFFIX: Of the three files, such as '.jsonl'.
    FORMAT: Of the files, see `records.read`.
    FEATURES: {column: feature}; `id` is added, 'train.jsonl:7'.
  """

  SUFFIX: str
  FORMAT = 'auto'
  FEATURES: Mapping[str, Any]

  def __init__(self, *, source: pathlib.Path, **kwargs: Any):
    """Takes the folder of the files; the rest is tfds's."""
    self.source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self, description=self.__doc__,
        features=tfds.features.FeaturesDict({
            **self.FEATURES,
            'id': tfds.features.Text(doc='File and line, or a name.')}))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing to download.
    return {split: self._generate_examples(self.folder() / (
        split + self.SUFFIX)) for split in SPLITS}

  def _generate_examples(
      self, path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in records_lib.read(str(path), format=self.FORMAT):
      line = record.where.rpartition(':')[2]
      example = {'id': f'{path.name}:{line}'} | self.example(record)
      yield example['id'], example

  def folder(self) -> pathlib.Path:
    """Returns where the three files lie."""
    return self.source

  def example(self, record: records_lib.Record) -> dict[str, Any]:
    """Returns the columns of a record."""
    return {name: record.fields[name] for name in self.FEATURES}


def prepare(builder: Builder) -> None:
  """Writes a data set, or keeps one that is up to date, and says where."""
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
          # The default would keep what an earlier version of the files has
          # left there.
          download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,
          try_download_gcs=False))
  print(f'Prepared {builder.data_dir}')
