"""Pages: Markdown tables, HTML, figures and files."""

import subprocess
import sys

import jinja2
import pytest

from gemma_sft import pages


@pytest.mark.parametrize('header, rows, text', [
    (['a', 'metric'], [['x|y', 1], ['two\nlines', None]],
     '| a         | metric |\n'
     '| --------- | ------ |\n'
     '| x\\|y      | 1      |\n'
     '| two lines | None   |'),
    (['a', 'bcde'], [], '| a   | bcde |\n| --- | ---- |'),
], ids=['padded', 'header alone'])
def test_table(header, rows, text):
  assert pages.table(header, rows) == text


def test_a_long_cell_does_not_widen_the_other_rows():
  lines = pages.table(['a', 'b'], [['x' * 500, 'y'], ['z', 'y']]).splitlines()
  assert len(lines[2]) > 500 > 100 > len(lines[3])


def test_table_needs_a_cell_for_each_column():
  with pytest.raises(ValueError):
    pages.table(['a', 'b'], [['one']])


def test_render_escapes_embeds_and_insists_on_all_values(tmp_path, monkeypatch):
  (tmp_path / 'page.html').write_text(
      '<!doctype html>{% block body %}{% endblock %}')
  (tmp_path / 't.html').write_text(
      '{% extends "page.html" %}{% block body %}{{ name }}'
      '<img src="{{ png | data_uri }}">{% endblock %}')
  monkeypatch.setattr(pages, '__file__', str(tmp_path / 'pages.py'))
  assert pages.render('t.html', name='<b>', png=b'abc') == (
      '<!doctype html>&lt;b&gt;<img src="data:image/png;base64,YWJj">')
  with pytest.raises(jinja2.UndefinedError, match='name'):
    pages.render('t.html', png=b'')


def _figure():
  figure, (left, right) = pages.make_figure(2, width=3, height=2)
  left.plot([1, 2], [3, 4])
  right.set(title='second')
  return pages.to_png(figure)


def test_figures_are_reproducible_and_of_the_size_asked_for():
  png = _figure()
  assert png == _figure()
  assert png[:8] == b'\x89PNG\r\n\x1a\n'
  width, height = (int.from_bytes(png[i:i + 4], 'big') for i in (16, 20))
  assert (width, height) == (6 * 150, 2 * 150)


def test_write_replaces_text_and_bytes(tmp_path):
  path = tmp_path / 'page'
  for content in ('größer', b'\x89PNG', 'x'):
    pages.write(path, content)
    assert path.read_bytes() == (
        content if isinstance(content, bytes) else content.encode())
  assert [p.name for p in tmp_path.iterdir()] == ['page']


def test_importing_pages_is_cheap():
  subprocess.run(
      [sys.executable, '-c', 'import sys; from gemma_sft import pages;'
       ' assert not {"matplotlib", "jinja2", "numpy"} & set(sys.modules)'],
      check=True)
