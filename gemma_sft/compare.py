"""Shows what differs between runs, and whether their results do.

    python -m gemma_sft.compare workdirs/a workdirs/b [more] [--out=page.html]

Each argument is the --workdir of a training run; all others are compared with
the first: config, data, base weights, code, packages and devices; then updates,
losses, time and memory; then the scores from `evaluate`, paired record by
record. --out writes all of it, with the training curves, to one self-contained
HTML page.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.compare',
      cli.text('out', None, 'Page to write, such as page.html.'),
      positional='workdirs')

import os
from typing import Sequence

from configs import default
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import pages
from gemma_sft.evaluation import compare_page
from gemma_sft.evaluation import compare_runs


def main(workdirs: Sequence[str], out: str | None = None) -> int:
  """Compares runs; see the module's docstring."""
  paths = [os.path.realpath(workdir) for workdir in workdirs]
  if len(set(paths)) < 2 or len(set(paths)) < len(paths):
    raise errors.UserError(
        f'compare was given {len(paths)} runs: {", ".join(workdirs) or "none"}',
        'two or more different ones',
        'python -m gemma_sft.compare workdirs/a workdirs/b')
  if out is not None and not (
      out.endswith('.html') and os.path.isdir(os.path.dirname(out) or '.')):
    raise errors.UserError(
        f'--out={out}', 'a file NAME.html in an existing folder',
        'for example --out=page.html')
  defaults = dict(config_lib.leaves(default.get_config()))
  runs = [compare_runs.load(workdir, name, defaults)
          for workdir, name in zip(workdirs, compare_runs.names(workdirs))]
  comparison = compare_runs.compare(runs)
  print(compare_page.text(comparison))
  if out is not None:
    pages.write(
        out, compare_page.page(comparison, compare_page.picture(runs)))
    print(f'page: {out}')
  return 0
