"""Compares what two Blop programs do, as far as the prompt determines it.

The traces are those of `run_js`. An answer may choose wording, wrappers and
class names unless the prompt spells them out. It must show the same data and
have the same controls, which do the same.
"""

import collections
import dataclasses
import json
import re
from typing import Any

# Tags with a function or a meaning. Others count only if the prompt names them.
_FUNCTIONAL = frozenset('''
    button input select option textarea form a img li table tr td th video audio
    source picture canvas iframe progress meter details summary dialog heading
    list svg circle rect line polyline polygon path ellipse g text
    hr'''.split())
_NAMED_BY_A_WORD = frozenset('''
    div span ul ol br em strong blockquote cite figcaption fieldset legend tbody
    thead pre kbd aside article figure'''.split())
_NAMED_AS_A_TAG = frozenset('''
    section header footer nav main time address label p b i u s q code small
    mark dl dt dd sub sup h1 h2 h3 h4 h5 h6'''.split())
_SYNONYMS = {
    'ul': 'list', 'ol': 'list', **{f'h{n}': 'heading' for n in range(1, 7)}}
_SAME_EVENT = {'input': 'change', 'mouseover': 'mouseenter',
               'mouseout': 'mouseleave', 'keyup': 'keydown',
               'keypress': 'keydown'}
# Attributes that an answer may choose unless the prompt names them.
_FREE_ATTRIBUTES = frozenset('''
    alt title id name rel role tabindex for placeholder target rows cols xmlns
    autocomplete autofocus maxlength method action lang preserveAspectRatio
    viewBox loading pattern min max step'''.split())
_FLAGS = frozenset('disabled checked selected hidden required readonly multiple'
                   ' open controls'.split())
_TYPES = frozenset('checkbox radio range file password date color time'.split())
_WORD = re.compile(r'\d+(?:\.\d+)?(?![\w.])|\w+|[★☆♥❤]')
# What made-up inputs look like: 'title_1'.
_INPUT = re.compile(r'[A-Za-z]+_\d+$|[A-Za-z]+key_\d+$')
_QUOTED = re.compile(r"""'([^'\n]{1,60})'(?!\w)|"([^"\n]{1,60})"|`([^`\n]+)`"""
                     '|“([^”]+)”|‘([^’]+)’')

Trace = dict[str, Any]  # Of a program, by `run_js`.


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What a prompt spells out.

  `words` are all its words, in lower case; `spelled` are those that the answer
  must show: in quotes, or capitalised within a sentence ("reads On or Off").
  """

  text: str
  words: frozenset[str]
  spelled: frozenset[str]
  quoted: tuple[str, ...]
  tags: frozenset[str]


def read_prompt(text: str) -> Prompt:
  """Returns what a prompt spells out."""
  quoted = [''.join(groups) for groups in _QUOTED.findall(text)]
  spelled = {word for part in quoted for word in _WORD.findall(part)}
  # Not the first word of a sentence, nor words that only say what is asked for.
  spelled |= set(re.findall(r'(?<=[a-z,;:] )([A-Z][a-z]*)\b', text)) - {
      'Blop', 'I', 'Name', 'Enter', 'Escape', 'Each', 'It', 'The', 'A'}
  lower = text.lower()
  words = frozenset(re.findall(r'\w+', lower))
  tags = (_NAMED_BY_A_WORD & words) | {
      tag for tag in _NAMED_AS_A_TAG
      if re.search(rf'<{tag}>|\b{tag}(?: element|s? tags?)\b', lower)
      or (re.match(r'h\d', tag) and tag in words)}
  if re.search(r'\bparagraphs?\b', lower):
    tags |= {'p'}
  if 'ordered list' in lower:
    tags |= {'ol'}
  return Prompt(text, words, frozenset(spelled), tuple(quoted), tags)


def defined(reference: Trace, answer: Trace) -> bool | None:
  """Whether the answer defines what was asked for, and it works.

  None if nothing of the reference can be tried.
  """
  verdicts = []
  for name, trace in reference['traces'].items():
    worked = [run['k'] for run in trace['runs'] if _works(run)]
    if trace['kind'] != 'value' and worked:
      verdicts.append(_works(_runs(answer, name).get(worked[0])))
  return all(verdicts) if verdicts else None


def _runs(answer, name):
  """Returns {k: run} of an answer's trace; empty if it does not define name."""
  trace = answer['traces'].get(name, {'runs': []})
  return {run['k']: run for run in trace['runs']}


def _works(run):
  return bool(run) and not run.get('failed') and not run.get('threw')


def same_tags(reference: Trace, answer: Trace) -> bool | None:
  """Whether the trees of tags are equal; None if there are none."""
  verdicts = [
      _shape(page['tree']) == _shape(other.get('tree'))
      for name, trace in reference['traces'].items()
      for page, other in _pages(trace, _runs(answer, name))]
  return all(verdicts) if verdicts else None


def _pages(trace, runs):
  """Returns the reference's runs that show a page, each with the answer's."""
  return [(run, runs.get(run['k'], {})) for run in trace['runs']
          if _works(run) and run.get('tree')]


def _shape(tree):
  return tree and [tree[0], [_shape(c) for c in tree[3] if isinstance(c, list)]]


def same_behaviour(
    reference: Trace, answer: Trace, prompt: Prompt) -> tuple[bool | None, str]:
  """Whether the answer does what the reference does, and the first difference.

  None if the reference does nothing that can be seen.
  """
  checks = list(_checks(reference, answer, prompt))
  # Only the reference decides whether there is something to compare.
  if not any(shows for shows, _ in checks):
    return None, ''
  difference = next((found for _, found in checks if found), '')
  return not difference, difference


def _checks(reference, answer, prompt):
  """Yields (whether the reference shows something, the difference or '')."""
  for name, trace in reference['traces'].items():
    if trace['kind'] == 'value':
      # Only variables that the prompt names count.
      if (name.lower() in prompt.words
          and not _is_kind(trace['value'], 'function')):
        value = answer['traces'].get(name, {}).get('value')
        same = value == trace['value']
        yield True, '' if same else f'{name} has another value'
      continue
    runs = _runs(answer, name)
    pages = _pages(trace, runs)
    groups = _groups(run for run, _ in pages)
    problem = ('text that depends on other things' if runs
               else 'fails, or is not defined')
    yield len(set(groups)) > 1, '' if (
        groups == _groups(run for _, run in pages)) else f'{name}: {problem}'
    for run in trace['runs']:
      expected = _behaviour(run, run, prompt)
      if expected is not None:
        difference = _difference(
            expected, _behaviour(runs.get(run['k'], {}), run, prompt))
        yield any(expected.values()), difference and f'{name}: {difference}'
  # Only output counts: authors choose their assertions and set-up calls.
  expected = [e for e in reference['load'] if e[0] in ('log', 'call', 'mount')]
  if expected:
    kinds = {e[0] for e in expected}
    same = [e for e in answer['load'] if e[0] in kinds] == expected
    yield True, '' if same else 'other output'


def _groups(runs):
  """Returns for each run the index of the first run with the same text.

  An answer may choose its wording, but its text must depend on the same inputs.
  """
  texts = [
      ' '.join(child for node in _nodes(run['tree']) for child in node[3]
               if isinstance(child, str)) if run.get('tree') else None
      for run in runs]
  return [texts.index(text) for text in texts]


def _difference(expected, got):
  if got is None:
    return 'fails, or is not defined'
  return next((f'other {k}' for k in expected if expected[k] != got.get(k)), '')


def _is_kind(value, kind):
  return isinstance(value, dict) and value.get('$') == kind


def _behaviour(run, model, prompt):
  """Returns {kind: what counts of a run}, or None if the run does not count.

  `model` is the reference's run; `run` is the same or the answer's.
  """
  raises = bool(prompt.words & {'throw', 'throws', 'error', 'errors', 'fails'})
  if not run or run.get('failed'):
    return None
  if model.get('tree'):
    return _page_behaviour(run, prompt) if run.get('tree') else None
  if model.get('threw') and not raises:
    return None
  if run.get('threw') or model.get('threw'):
    return {'throwing': bool(run.get('threw'))}
  if 'NaN' in json.dumps(model):
    return None  # Outside the function's domain any result is fine.
  logs = any(e[0] == 'log' for e in model.get('effects', []))
  effects = [e for e in run.get('effects', []) if e[0] != 'log' or logs]
  result = run.get('result')
  if _is_kind(model.get('result'), 'node'):
    if not _is_kind(result, 'node'):
      return None
    result = _seen(result['tree'], prompt)
  arguments = [a for a in run.get('args', []) if isinstance(a, (dict, list))]
  return {
      'result': None if _is_kind(result, 'undefined') else result,
      'methods': run.get('methods'), 'returned function': run.get('calls'),
      # Arguments count only if they are changed.
      'changes to its arguments': arguments or None,
      'calls': effects}


def _page_behaviour(run, prompt):
  later = _seen(run.get('later') or run['tree'], prompt)
  outcomes = [_outcome(event, prompt) for event in run.get('events', [])]
  return {
      **_seen(run['tree'], prompt),
      **{f'{kind} after a while': counts for kind, counts in later.items()},
      'events': collections.Counter(kind for kind, *_ in outcomes),
      'reactions': collections.Counter(
          json.dumps(outcome, sort_keys=True) for outcome in outcomes),
      'effects': _calls(
          run.get('mounted', []) + run.get('unmounted', []), prompt)}


def _outcome(event, prompt):
  turns = []
  for turn in event['turns']:
    seen = turn['tree'] and [
        sorted(counts.items())
        for counts in _seen(turn['tree'], prompt, typed=True).values()]
    turns.append([_calls(turn['effects'], prompt), turn['threw'], seen])
  return [_SAME_EVENT.get(event['type'], event['type']), event['key'], turns]


def _calls(effects, prompt):
  """Returns the effects without logs and without events passed on."""
  prevents = prompt.words & {'prevent', 'prevents', 'default', 'reload',
                             'reloading', 'propagation', 'instead'}
  calls = []
  for kind, *rest in effects:
    if kind == 'log' or kind == 'prevent' and not prevents:
      continue
    rest = [[a for a in r if not _is_kind(a, 'event')]
            if isinstance(r, list) else r for r in rest]
    calls.append(json.dumps([kind, *rest], sort_keys=True))
  return sorted(calls)


def _seen(tree, prompt, typed=False):
  """Returns counts of the words, tags and attributes that a page shows."""
  texts, tags, marks = (collections.Counter() for _ in range(3))
  for tag, attributes, _, children in _nodes(tree):
    for name in {tag, _SYNONYMS.get(tag, tag)}:
      if name in prompt.tags or name in _FUNCTIONAL or name[0].isupper():
        tags[name] += 1
    if tag == 'input' and attributes.get('type') in _TYPES:
      tags[f'input {attributes["type"]}'] += 1
    for child in children:
      if isinstance(child, str):
        texts.update(w for w in _WORD.findall(child) if _counts(w, prompt))
    for name, value in attributes.items():
      if (tag[0].isupper() and name.lower() in prompt.words
          and not _is_kind(value, 'undefined')):
        marks[f'{tag} {name}'] += 1  # An attribute of a component.
      marks.update(_marks(name, value, prompt, typed))
  return {'text': texts, 'tags': tags, 'attributes': marks}


def _nodes(tree):
  style = tree[1].get('style')
  if tree[1].get('hidden') is True or (
      isinstance(style, dict) and style.get('display') == 'none'):
    return
  yield tree
  for child in tree[3]:
    if isinstance(child, list):
      yield from _nodes(child)


def _counts(word, prompt):
  return bool(_INPUT.match(word) or word in prompt.spelled
              or word[0].isdigit() or word in '★☆♥❤')


def _marks(name, value, prompt, typed):
  if name in _FLAGS:
    return [name] if value is True or value == {'$': 'true'} else []
  lower = name.lower()
  if lower.startswith(('aria-', 'data-', 'on')) or (
      lower in _FREE_ATTRIBUTES and lower not in prompt.words):
    return []
  if typed and name == 'value':
    return []  # An answer need not bind a field to the text typed into it.
  if name == 'style' and isinstance(value, dict):
    value = list(value.values())  # backgroundColor or background.
  text = value if isinstance(value, str) else json.dumps(value)
  found = []
  for word in _WORD.findall(text):
    counts = word in prompt.spelled or name != 'class' and _INPUT.match(word)
    if name == 'class' and 'class' in prompt.words or (
        name == 'style' and not word.isdigit()):
      counts = counts or word.lower() in prompt.words
    if counts:
      found.append(f'{"" if name == "style" else name} {word}')
  return found


def open_names(reference: Trace, answer: Trace,
               prompt: Prompt) -> dict[str, dict[str, str]]:
  """Returns the answer's names for fields that the prompt does not name.

  The fields that the answer reads and does not find (a movie's `name`) stand,
  in order, for those that only the reference reads (its `title`).
  """
  def unnamed(names):
    return [name for name in names
            if not re.search(rf'\b{re.escape(name)}\b', prompt.text)]

  aliases = {}
  for path, reads in answer['reads'].items():
    known = reference['reads'].get(path, {'read': []})['read']
    free = unnamed(name for name in known if name not in reads['read'])
    if pairs := dict(zip(unnamed(reads['missing']), free)):
      aliases[path] = pairs
  return aliases
