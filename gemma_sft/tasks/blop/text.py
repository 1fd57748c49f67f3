"""Finds facts about Blop and habits of other languages in an answer's text."""

import functools
import json
import pathlib
import re
from typing import Any

_STRING = re.compile(r"'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"|`[^`]*`")
_COMMENT = re.compile(r'(?<!:)//[^\n]*|/\*.*?\*/', re.DOTALL)

# Patterns that no Blop program has outside strings and comments. The compiler
# wants spaces inside the braces of an object, so `={x` is JSX.
_HABITS = {name: re.compile(pattern, re.MULTILINE) for name, pattern in {
    'semicolons': r';[ \t]*$',
    'const, let, var': r'(?:^|[({])\s*(?:export )?(?:const|let|var) [\w{\[]',
    'function': r'\bfunction\b\s*\w*\s*\(',
    'export': r'^\s*export\b',
    '===': r'[=!]==',
    '? :': r' \?\s[^:\n]*\s?:\s',
    '?. ??': r'\w\?\.\w|\s\?\?\s',
    '++ --': r'\w\+\+|\w--(?!\w)|\+\+\w',
    'else if': r'\}\s*else if\b',
    'for (...)': r'\bfor (?:await )?\((?:const|let|var)?\s*\w+\s*(?:=|of|in)\b',
    'switch': r'\bswitch \(',
    'JSX attributes': r'\w=\{[^\s}]|\w=\{\{',
    'JSX braces': r'(?<![=-])>\s*\{[^\s{]|^\s*\{[\w.]+(?:\}|\.map\(| && | \?)',
    'JSX words': r'(?<![=-])>\s*[A-Z][a-z]*(?: [A-Za-z]\w*)+[.!?]?\s*</',
    'className': r'\bclassName=|\bhtmlFor=',
    'return (': r'\breturn \(\s*(?:<|$)|=> \(\s*(?:<|$)',
    'def ... :': r'^\s*(?:async )?def \w+\(.*\)(?:\s*->\s*[\w\[\]]+)?:\s*$',
    'if ... :': r'^\s*(?:if|elif|for|while|with|except|class)\b[^{\n]*:\s*$'
                r'|^\s*(?:else|try|finally):\s*$',
    'elif': r'\belif\b',
    'None, True, False': r'\b(?:None|True|False)\b',
    'self': r'\bself\b(?!\s*=)',
    '# comments': r'^\s*#(?!\w*\d)',
    'print': r'(?<![.\w])(?<!def )print\(',
    'and, or, not': r'\bif not \w|\b\w+ (?:and|or) \w+.*[:{]\s*$',
}.items()}
# Patterns inside back-ticks or before a quote.
_RAW_HABITS = {'${...}': re.compile(r'`[^`]*\$\{'),
               'f-strings': re.compile(r"(?<![\w'])f['\"]\w*[^'\"\n]*\{\w")}


def habits(code: str) -> list[str]:
  """Returns the habits of JavaScript, JSX and Python found in code."""
  found = [name for name, pattern in _RAW_HABITS.items()
           if pattern.search(code)]
  bare = _COMMENT.sub(' ', _STRING.sub("''", code))
  return found + [name for name, pattern in _HABITS.items()
                  if pattern.search(bare)]


@functools.lru_cache
def _facts() -> dict[str, Any]:
  path = pathlib.Path(__file__).with_name('facts.json')
  return json.loads(path.read_text(encoding='utf-8'))


def knowledge(prompt: str, answer: str) -> dict[str, Any] | None:
  """Returns {knows, facts, wrong}, or None for a question without key facts.

  `knows` is the share of the key facts that the answer states, or 0 if it
  states anything wrong; `facts` and `wrong` list both.
  """
  prompt, general = prompt.strip(), _facts()['general']
  is_general = re.fullmatch(general['asks'], prompt, re.IGNORECASE)
  asked = _facts()['questions'].get(prompt, general if is_general else None)
  if asked is None:
    return None
  asked = general if asked == 'general' else asked
  stated = [name for name, pattern in asked['facts'].items()
            if re.search(pattern, answer, re.IGNORECASE)]
  mistaken = [name for name, pattern in asked['wrong'].items()
              if re.search(pattern, answer, re.IGNORECASE if name != (
                  'made by somebody else') else 0)]
  share = 0.0 if mistaken else len(stated) / len(asked['facts'])
  return {'knows': share, 'facts': ', '.join(stated),
          'wrong': ', '.join(mistaken)}
