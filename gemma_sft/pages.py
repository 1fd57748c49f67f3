"""Writes pages for people: Markdown tables, HTML from templates, figures."""

import base64
import io
import os
import pathlib
from typing import Any
from typing import Sequence

from gemma_sft import cache

# Columns of Markdown tables are padded up to this width; longer cells stick
# out.
_MAX_WIDTH = 60


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a Markdown table that is readable in a terminal too.

  Cells may hold Markdown: only bars and line breaks, which would end a cell,
  are replaced.
  """
  lines = [[' '.join(str(cell).split()).replace('|', r'\|') for cell in row]
           for row in (header, *rows)]
  widths = [max(3, *(min(len(cell), _MAX_WIDTH) for cell in column))
            for column in zip(*lines, strict=True)]
  lines.insert(1, ['-' * width for width in widths])
  return '\n'.join(
      '| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines)


def render(template: str, **values: Any) -> str:
  """Returns a self-contained HTML page; all values are escaped.

  The Jinja template, a path below `gemma_sft`, extends `page.html` and has the
  filter `data_uri`, which makes a PNG's bytes the source of an <img>. A missing
  value is an error.
  """
  import jinja2

  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
      autoescape=True, trim_blocks=True, lstrip_blocks=True,
      undefined=jinja2.StrictUndefined)
  environment.filters['data_uri'] = lambda png: (
      'data:image/png;base64,' + base64.b64encode(png).decode())
  return environment.get_template(template).render(**values)


def make_figure(n_axes: int = 1, width: float = 5, height: float = 3.5
                ) -> tuple[Any, list[Any]]:
  """Returns a matplotlib figure and its axes, which stand side by side.

  The width is that of each of the axes; both sizes are in inches.
  """
  # Not through pyplot, which would choose a window system and keep figures.
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(
      figsize=(n_axes * width, height), layout='constrained')
  axes = list(figure.subplots(1, n_axes, squeeze=False)[0])
  for axis in axes:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25)
  return figure, axes


def to_png(figure: Any) -> bytes:
  """Returns a figure as a PNG: the same figure gives the same bytes."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=150, metadata={'Software': None})
  return buffer.getvalue()


def write(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file, text in UTF-8; replaces an existing one."""
  if isinstance(content, str):
    content = content.encode()
  with cache.replacing(path) as partial:
    partial.write_bytes(content)
