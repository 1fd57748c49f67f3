"""Where downloads and conversions are kept between runs."""

import os
import pathlib


def folder(*names: str) -> pathlib.Path:
  """Returns a folder below $GEMMA_SFT_CACHE, or else ~/.cache/gemma_sft."""
  root = os.environ.get('GEMMA_SFT_CACHE') or os.path.join(
      os.path.expanduser('~'), '.cache', 'gemma_sft')
  return pathlib.Path(root, *names)
