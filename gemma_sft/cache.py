"""The cache folder of downloads and conversions, and atomic writes."""

import contextlib
import os
import pathlib
from typing import Iterator


def folder(*names: str) -> pathlib.Path:
  """Returns a folder below $GEMMA_SFT_CACHE, or else ~/.cache/gemma_sft."""
  root = os.environ.get('GEMMA_SFT_CACHE') or os.path.join(
      os.path.expanduser('~'), '.cache', 'gemma_sft')
  return pathlib.Path(root, *names)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path, which is renamed to `path` at the end.

  A reader of `path` sees the old content or all of the new one. After an error
  the old content remains and the temporary file is removed. If several
  processes write the same path, the last one wins.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
