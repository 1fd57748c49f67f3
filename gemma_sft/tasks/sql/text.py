"""Finds queries in answers, normalises them and rates their hardness."""

from collections.abc import Collection
import re

import sqlglot
from sqlglot import exp

HARDNESS = ('easy', 'medium', 'hard', 'extra')
SEVERAL = 'several statements'

_FENCE = re.compile(r'```[\w-]*[ \t]*\n?(.*?)(?:```|\Z)', re.DOTALL)
_LABEL = re.compile(r'\A(?:the )?(?:sqlite|sql|query|answer)(?: query)?\s*:\s*',
                    re.IGNORECASE)
# Case counts for most words: an English sentence may begin with Create or Drop.
_STATEMENT = re.compile(
    r'(?i:SELECT\b|VALUES\s*\('
    r'|WITH\s+(?:RECURSIVE\b|\S+?\s*(?:\([^)]*\))?\s*AS\b))'
    r'|(?:INSERT|UPDATE|DELETE|DROP|CREATE|ALTER|ATTACH|DETACH|PRAGMA|REPLACE'
    r'|VACUUM|BEGIN|EXPLAIN|REINDEX|ANALYZE)\b')
# In capitals, or at the start of a line, "SELECT" is SQL and not English.
_IN_PROSE = re.compile(
    r'^[ \t]*((?:SELECT|WITH)\b)|\b((?:SELECT|WITH)\b)', re.MULTILINE)
_TOKEN = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*"
    r'|/\*.*?\*/|(?P<end>;)|(?P<prose>\n[ \t]*\n(?=\s*(?P<next>\w*))'
    r'|\n(?=(?:This|The|Here|Note|Explanation|Question|Answer|Output|Result)s?'
    r'\b[^,(=.]))|.', re.DOTALL)
_COMMENTS = re.compile(r'(?:\s+|;|--[^\n]*|/\*.*?\*/)*', re.DOTALL)
_CLAUSES = frozenset(
    'select from where group order having limit union intersect except join'
    ' inner left right cross full natural on and or case when then else end as'
    ' offset not in between like values'.split())


def extract(answer: str) -> tuple[str, str]:
  """Returns (the query in a model's answer, '' or why it is refused).

  Removes a Markdown fence, a label such as `SQL:`, prose before and after, and
  the semicolon. A second statement is refused: which one is the answer?
  """
  fenced = _FENCE.search(answer)
  text = (fenced.group(1) if fenced else answer).strip()
  text = _LABEL.sub('', text).strip()
  quoted = text.startswith('`')
  if quoted:
    text = text[1:].lstrip()
  if not _STATEMENT.match(text):
    found = _IN_PROSE.search(text)
    if not found:
      return text, ''
    start = found.start(found.lastindex)
    quoted = text[:start].endswith('`')
    text = text[start:]
  if quoted:
    text = text.partition('`')[0]
  for token in _TOKEN.finditer(text):
    if token['end']:
      if _STATEMENT.match(text, _COMMENTS.match(text, token.end()).end()):
        return text, SEVERAL
      break
    if token['prose'] and not fenced and (
        (token['next'] or '').lower() not in _CLAUSES):
      break
  else:
    return text.strip(), ''
  return text[:token.start()].strip(), ''


def _parse(query):
  """Returns the query's tree, or None if sqlglot cannot parse it."""
  try:
    return sqlglot.parse_one(query, read='sqlite')
  except (sqlglot.errors.SqlglotError, RecursionError):
    return None


def is_ordered(query: str) -> bool:
  """Whether a query's rows are ordered, by an ORDER BY at its top level."""
  tree = _parse(query)
  if tree is None:
    return 'order by' in query.rpartition(')')[2].lower()
  return tree.args.get('order') is not None


def normal_form(query: str, names: Collection[str] = ()) -> str | None:
  """Returns a form that queries share if only their spelling differs, or None.

  Spelling is upper and lower case; space; AS, INNER and ASC; the alias of a
  table (replaced by the table unless it occurs twice); an alias in the result
  that nothing refers to; the table before a column if there is only one table;
  and "x" for 'x', which SQLite reads as text if no column has that name.
  `names` are the tables and columns of the database, in lower case; without
  them "x" stays a name.
  """
  tree = _parse(query)
  try:
    return None if tree is None else _normalised(tree, names)
  except RecursionError:  # Nested more deeply than SQLite can run.
    return None


def _normalised(tree, names):
  aliases = {a.alias.lower() for a in tree.find_all(exp.Alias)}
  for name in list(tree.find_all(exp.Identifier)):
    column = name.parent
    is_text = (
        names and name.args.get('quoted') and isinstance(column, exp.Column)
        and column.this is name and not column.table
        and name.name.lower() not in aliases | set(names))
    if is_text:
      column.replace(exp.Literal.string(name.name))
    else:
      name.set('this', name.name.lower())
      name.set('quoted', False)
  for select in list(tree.find_all(exp.Select)):
    _resolve_aliases(select)
  for key in tree.find_all(exp.Ordered):
    key.set('desc', key.args.get('desc') or None)
  for join in tree.find_all(exp.Join):
    if (join.args.get('kind') or '').upper() == 'INNER':
      join.set('kind', None)
  used = {c.name for c in tree.find_all(exp.Column)}
  selects = [tree] if isinstance(tree, exp.Select) else [
      s for s in tree.find_all(exp.Select)
      if isinstance(s.parent, exp.SetOperation)]
  for select in selects:
    for item in list(select.expressions):
      if isinstance(item, exp.Alias) and item.alias not in used:
        item.replace(item.this)
  return tree.sql(dialect='sqlite', comments=False)


def _tables(select):
  """Returns the tables and subqueries in a SELECT's FROM and JOINs."""
  parts = [select.args.get('from_'), *(select.args.get('joins') or ())]
  return [part.this for part in parts if part is not None]


def _resolve_aliases(select):
  sources = _tables(select)
  tables = [s for s in sources if isinstance(s, exp.Table)]
  named = [t.name for t in tables]
  names = {t.alias: t.name for t in tables
           if t.alias and named.count(t.name) == 1}
  for column in select.find_all(exp.Column):
    if column.table in names and not _is_hidden(column, select):
      column.set('table', exp.to_identifier(names[column.table]))
  for table in tables:
    if table.alias in names:
      table.set('alias', None)
  if len(sources) == 1 and tables:
    own = tables[0].alias_or_name
    for column in select.find_all(exp.Column):
      if column.table == own and column.find_ancestor(exp.Select) is select:
        column.set('table', None)


def _is_hidden(column, select):
  """Whether a SELECT nested in between defines the column's table name."""
  inner = column.find_ancestor(exp.Select)
  while inner is not None and inner is not select:
    if any(s.alias_or_name == column.table for s in _tables(inner)):
      return True
    inner = inner.find_ancestor(exp.Select)
  return False


def compare(query: str, reference: str,
            names: Collection[str]) -> dict[str, bool | str]:
  """Returns {exact: the normal forms are equal, hardness: the reference's}.

  `hardness` is left out if the reference cannot be parsed.
  """
  form = normal_form(query, names)
  row = {'exact': form is not None and form == normal_form(reference, names),
         'hardness': hardness(reference)}
  return {name: value for name, value in row.items() if value is not None}


def hardness(query: str) -> str | None:
  """Returns easy, medium, hard or extra, counted as in Spider's evaluation.py.

  Its oddities (NOT counts as an aggregate, aggregates in HAVING do not count,
  and of a set operation only the first SELECT does) stay, so that the classes
  are those of published results (github.com/taoyds/spider, eval_hardness).
  """
  tree = _parse(query)
  if tree is None:
    return None
  first, n_nested = tree, 0  # Of a set operation.
  while isinstance(first, (exp.SetOperation, exp.Subquery)):
    n_nested = n_nested or isinstance(first, exp.SetOperation)
    first = first.this
  if not isinstance(first, exp.Select):
    return None
  args = first.args
  where, where_or = _conditions(args.get('where'))
  having, having_or = _conditions(args.get('having'))
  on, on_or = _conditions(*(j.args.get('on') for j in args.get('joins') or ()))
  conditions = where + having + on
  order, group = args.get('order'), args.get('group')
  clauses = (bool(where) + bool(group) + bool(order) + bool(args.get('limit'))
             + max(0, len(_tables(first)) - 1) + where_or + having_or + on_or
             + sum(isinstance(_plain(c), exp.Like) for c in conditions))
  n_nested += sum(_subqueries(_plain(c)) for c in conditions)
  aggregates = sum(
      item.find(exp.AggFunc) is not None for item in first.expressions)
  aggregates += sum(_is_negated(c) for c in where + having)
  if order:
    aggregates += sum(1 for _ in order.find_all(exp.AggFunc))
  others = ((aggregates > 1) + (len(first.expressions) > 1) + (len(where) > 1)
            + bool(group and len(group.expressions) > 1))
  return _level(clauses, int(n_nested), others)


def _level(clauses, n_nested, others):
  if clauses <= 1 and not others and n_nested <= 1:
    return 'hard' if n_nested else 'easy'
  if n_nested:
    return 'extra'
  if clauses <= 1 and others <= 2 or clauses <= 2 and others < 2:
    return 'medium'
  if clauses <= 2 and others > 2 or clauses == 3 and others <= 2:
    return 'hard'
  return 'extra'


def _conditions(*clauses):
  """Returns the conditions that AND and OR join, and the number of ORs."""
  found, n_or, left = [], 0, [c for c in clauses if c is not None]
  while left:
    part = left.pop()
    if isinstance(part, (exp.And, exp.Or)):
      n_or += isinstance(part, exp.Or)
      left += [part.this, part.expression]
    elif isinstance(part, (exp.Where, exp.Having, exp.Paren)):
      left.append(part.this)
    else:
      found.append(part)
  return found, n_or


def _plain(condition):
  while isinstance(condition, (exp.Not, exp.Paren)):
    condition = condition.this
  return condition


def _is_negated(condition):
  return isinstance(condition, exp.Not) and not isinstance(
      condition.this, exp.Is) or bool(condition.args.get('negate'))


def _subqueries(condition):
  return sum(
      1 for s in condition.find_all(exp.Select)
      if s.find_ancestor(exp.Select) is condition.find_ancestor(exp.Select))
