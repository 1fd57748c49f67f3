"""The cage of Blop programs, and the verdict on pairs that ran in it."""

import shutil
import subprocess

import pytest

from gemma_sft.evaluation import judge
from gemma_sft.inputs import records
from gemma_sft.tasks.blop import run_js
from gemma_sft.tasks.blop import task
from gemma_sft.tasks.blop import text

needs_node = pytest.mark.skipif(not shutil.which('node'), reason='no Node.js')
needs_compiler = pytest.mark.skipif(
    bool(task.compiler_problem()), reason=task.compiler_problem())

_REFERENCE = {
    'js': "function Hi(a) { return blop.h('p', {}, [a.name]); }\n"
          'module.exports = { Hi };', 'names': ['Hi']}
# What a hostile program does, and what it comes to: 'fails' is a component that
# does not render, 'stopped' a program or a process that was ended, other words
# are what it shows. A program that defines no Hi is its body; $FINE returns a
# page, $SHOWS a page with `found`.
_HOSTILE = {
    'endless loop': ('while (true) {}', 'fails'),
    'endless loop on loading': ('while (true) {} function Hi(a) {}', 'stopped'),
    'endless promises': (
        '(async () => { for (;;) await 0 })(); function Hi(a) {}', 'stopped'),
    'promises later': ('(async () => { for (;;) await 0 })(); $FINE', 'fine'),
    'a timer': ('setInterval(() => { while (true) {} }, 1); $FINE', 'fine'),
    'slow pattern': ("return /(a+)+$/.test('a'.repeat(40) + 'b')", 'fails'),
    # By the clock or by the heap, whichever is first.
    'memory': ('const x = []; for (;;) x.push(new Array(1e6).fill(1.5))',
               'stopped or fails'),
    'memory outside the heap': ('new Uint8Array(1e8)', 'fails'),
    'deep recursion': ('function Hi(a) { return Hi(a) }', 'fails'),
    'require': ("const found = require('fs').readFileSync('/etc/passwd');"
                'function Hi(a) { $SHOWS }',
                'finefs.readFileSync(/etc/passwd)'),
    'import': ("let found = 'none'; import('fs').then(() => { found = 'fs' },"
               " () => { found = 'refused' }); function Hi(a) { $SHOWS }",
               'finerefused'),
    'the constructor of an error of Node': (
        "let found = 'none'; import('fs').catch((e) => { try { found ="
        " e.constructor.constructor('return process')().pid }"
        " catch (x) { found = 'refused' } }); function Hi(a) { $SHOWS }",
        'finerefused'),
    'the global': ("this.constructor.constructor('return process')()", 'fails'),
    'the harness': ("blopCage__.step.constructor('return 7')()", 'fails'),
    'eval': ("eval('1')", 'fails'),
    'process.exit': ('process.exit(0)', 'fails'),
    'the network': ("const found = typeof fetch('http://127.0.0.1/').then"
                    ' + typeof XMLHttpRequest; function Hi(a) { $SHOWS }',
                    'finefunctionundefined'),
    'changed prototypes': (
        "Object.prototype.toJSON = () => 'forged'; Array.prototype.push = null;"
        "JSON.stringify = () => '7'; String.prototype.slice = () => 'forged';"
        'function Hi(a) { $FINE }', 'fine'),
    'names of the harness': (
        'let Object = 1; class Map {} let Promise = 2; const JSON = 3;'
        'function Hi(a) { $FINE }', 'fine'),
    'a huge page': (
        "const c = []; for (let i = 0; i < 1e5; i++) c.push(blop.h('p', {},"
        " ['x'])); return blop.h('p', {}, c)", 'fails'),
    'a page within itself': (
        "const n = blop.h('p', {}, []); n.children.push(n); return n", 'fails'),
    'a thrown trap': (
        'throw new Proxy({}, { get() { while (true) {} },'
        ' getPrototypeOf() { while (true) {} } }); function Hi(a) {}',
        'stopped'),
    'a getter': ("return blop.h('p', { get id() { throw 1 } }, [])", 'fails'),
    'a proxy that traps': (
        "return blop.h('p', { id: new Proxy({}, { ownKeys() { throw 1 } }) },"
        " ['fine'])", 'fine'),
    'exports': ('module.exports = { get Hi() { while (true) {} } }', 'stopped'),
    'lines that look like answers': (
        "return blop.h('p', {}, ['fine\\n{\"traces\": {}}\\n'])",
        'fine\n{"traces": {}}\n')}
_LIST = """def UserList(attributes) {
  <ul class='users'>
    for user in attributes.users {
      <li>user.name</li>
    }
  </ul>
}"""
_BUTTON = """def LikeButton(attributes) {
  { song, onLike } = attributes
  <button on={ click: () => onLike(song.id) }>song.title</button>
}"""
_STEPS = """def Steps(_attributes, _children, node) {
  { value as count, setState } = node.useState('count', 0)
  <div>
    <span>count</span>
    <button on={ click: () => setState(count + 1) }>'More'</button>
  </div>
}"""
_SUM = """def total(prices) {
  sum = 0
  for price in prices {
    sum := sum + price
  }
  return sum
}"""
_ACCOUNT = """class Account {
  def constructor(balance) {
    this.balance = balance
  }
  def deposit(amount) {
    this.balance = this.balance + amount
    return this.balance
  }
}"""
_MARK = """def Mark(attributes) {
  { points } = attributes
  <li class=if points > 50 => 'passed' else 'failed'>points</li>
}"""
# {prompt: (reference, {what it is: (verdict, *edits)})}. The verdict is yes, no
# or nothing on component, right and same_tags; an edit is the whole answer, or
# what stands in the answer before and what after.
_ANSWERS = {
    'Write UserList in Blop: a list item with the name of each user.': (_LIST, {
        'the same': ('yyy',), 'another name': ('nnn', ('UserList', 'Users')),
        'another wrapper, class and variable': (
            'yyn', ("<ul class='users'>", '<div><ul>'),
            ('</ul>', '</ul></div>'), ('for user', 'for one'),
            ('user.name', 'one.name')),
        'another tag': ('ynn', ('li>', 'td>')),
        'a field that the prompt names': ('yny', ('user.name', 'user.email')),
        'only the first': ('ynn', 'def UserList(attributes) {\n  <ul>\n'
                           '    <li>attributes.users[0].name</li>\n  </ul>\n}'),
        'does not compile': ('nnn', _LIST + ';'),
        'throws': ('nnn', ('attributes.users', 'attributes.a.b'))}),
    'Write a Blop component with a list item for the name of each user.': (
        _LIST, {'a name left open': ('yyy', ('UserList', 'Users'))}),
    'Write UserList in Blop: a list item for each user.': (_LIST, {
        'a field that it leaves open': ('yyy', ('user.name', 'user.email'))}),
    'Write LikeButton: takes `song` and `onLike`, shows the title.': (_BUTTON, {
        'the same call': (
            'yyy', (': () => onLike(song.id)', ''),
            ('  <', '  click = () => {\n    onLike(song.id)\n  }\n  <')),
        'a call with something else': ('yny', ('song.id', 'song.title')),
        'no handler': ('yny', (' on={ click: () => onLike(song.id) }', ''),
                       (', onLike', '')),
        'another event': ('yny', ('click', 'mouseenter'))}),
    'Write Steps: a number, and a button More that adds one.': (_STEPS, {
        'state that counts by two': ('yny', ('count + 1', 'count + 2')),
        'state in a class': ('yyn', """import { Component } from 'blop'

class Steps extends Component {
  def render() {
    this.count = this.count || 0
    more = () => {
      this.count = this.count + 1
      this.refresh()
    }
    <p>
      = this.count
      <button on={ click: more }>'More'</button>
    </p>
  }
}""")}),
    "Write Mark: class 'passed' above 50 points, else 'failed'.": (_MARK, {
        'a class the other way round': ('yny', ('> 50', '<= 50')),
        'a limit off by one': ('yny', ('> 50', '>= 50'))}),
    'Write total(prices) in Blop.': (_SUM, {
        'another way to the same result': (
            'yy-', 'def total(prices) {\n  return prices.reduce('
            '(a, b) => a + b, 0)\n}'),
        'a wrong start': ('yn-', ('sum = 0', 'sum = 1'))}),
    'Write the class Account with deposit(amount).': (_ACCOUNT, {
        'a class': ('yy-', ('this.balance', 'this.money')),
        'a class that forgets': (
            'yn-', ('this.balance = this.balance + amount\n    ', ''))}),
    'Write the async function later(x).': (
        'async def later(x) {\n  return x * 2\n}', {'a promise': (
            'yy-', 'def later(x) {\n  return new Promise((done) =>'
            ' done(x + x))\n}')}),
    'Log hello in Blop.': ("x = 1\nconsole.log('hello')", {
        'output': ('-n-', ('hello', 'bye'))}),
    # Nothing to compare: its words are the author's choice.
    'Write Empty, a friendly message.': ("def Empty() {\n  <p>'None'</p>\n}", {
        'a static page': ('y-y', ('None', 'Nothing here'))})}


def _edited(code, edits):
  for edit in edits:
    code = edit if isinstance(edit, str) else code.replace(*edit)
  return code


_PAIRS = {
    name: (records.Record({'prompt': prompt, 'completion': reference}, 'x:1'),
           _edited(reference, edits),
           tuple({'y': True, 'n': False, '-': None}[c] for c in verdict))
    for prompt, (reference, answers) in _ANSWERS.items()
    for name, (verdict, *edits) in answers.items()}
_GOOD_ANSWER = ('Blop is a language for the web with HTML-like tags in code.'
                ' It compiles to ES6 JavaScript and renders a virtual DOM.')


def _program(js):
  js = js.replace('$FINE', "return blop.h('p', {}, ['fine'])").replace(
      '$SHOWS', "return blop.h('p', {}, ['fine', '' + found])")
  if 'Hi' not in js:
    js = f'function Hi(a) {{ {js} }}'
  if 'module.exports' not in js:
    js += '\nmodule.exports = { Hi };'
  return {'js': js, 'names': {}}


def _outcome(lines):
  if len(lines) < 3 or 'Hi' not in lines[2].get('traces', {}):
    return 'stopped'
  first = lines[2]['traces']['Hi']['runs'][0]
  if 'tree' not in first or not first['tree']:
    return 'fails'
  return ''.join(first['tree'][3])


@pytest.fixture(scope='module')
def hostile():
  pairs = [run_js.ProgramPair(_REFERENCE, _program(js))
           for js, _ in _HOSTILE.values()]
  return dict(zip(_HOSTILE, run_js.run(pairs)))


@needs_node
@pytest.mark.parametrize('name', _HOSTILE)
def test_a_hostile_program(hostile, name):
  assert _outcome(hostile[name]) in _HOSTILE[name][1].split(' or ')
  # The reference's trace was finished before and is intact.
  trace = hostile[name][1]['traces']['Hi']
  assert [run['tree'][3] for run in trace['runs']][:3] == [
      ['name_1'], ['name_1'], ['same_0']]


# The second barrier: what a program could do outside of its context.
@needs_node
@pytest.mark.parametrize('script', [
    "require('fs').readFileSync('/etc/passwd')",
    "require('fs').writeFileSync('/tmp/blop_cage_was_here', 'x')",
    "require('child_process').execSync('true')",
    "new (require('worker_threads').Worker)('1', { eval: true })",
    "Function('return 1')()", "eval('1')",
    'const x = []; for (;;) x.push(new Array(1e6).fill(1.5))',
    'const x = []; for (let i = 0; i < 200; i++) x.push(Buffer.alloc(1e8, 1))'])
def test_the_process_has_no_rights(script):
  flags = run_js.permission_flags()
  if not flags and 'require' in script:
    pytest.skip('this Node has no permissions')
  done = subprocess.run(run_js.command(f"{script}; console.log('done')", flags),
                        capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode and 'done' not in done.stdout


@needs_node
def test_plans_of_runs(monkeypatch):
  js = ('function Hi(a) { let items = a.items.map((i) => i.label);'
        ' let keys = Object.keys(a.prices);'
        ' return blop.h("p", { on: { click: () => a.go(a.user.id) } },'
        ' [`${a.total.toFixed(2)} ${items} ${keys} ${a.user.name}`]) }\n'
        'module.exports = { Hi };')
  plan, trace = run_js.run(
      [run_js.ProgramPair({'js': js, 'names': ['Hi']}, None)])[0]
  fields = plan['plan']['Hi']['shapes'][0]['shape']['fields']
  assert {name: shape['t'] for name, shape in fields.items()} == {
      'items': 'list', 'prices': 'map', 'total': 'number', 'user': 'object',
      'go': 'function'}
  assert fields['items']['of']['fields'] == {'label': {'t': 'text'}}
  first = trace['traces']['Hi']['runs'][0]
  assert 'undefined' not in str(first) and 'NaN' not in str(first)
  assert first['events'][0]['turns'][0]['effects'][0][0] == 'call'
  # A cage that does not start is an error.
  monkeypatch.setattr(run_js, '_inside', lambda: 'throw 1')
  with pytest.raises(run_js.CageError):
    run_js.run([run_js.ProgramPair(_REFERENCE, None)])


def test_literals_are_what_a_program_compares_with():
  found = run_js.literals(
      "if (a.kind === 'sun') {} else if (a.points >= 50 && a.x % 2 === 0) {}"
      " event.key === 'Tab'; c = ({ low: 'green' }); c[a.b]")
  assert 'sun' in found['texts'] and 'low' in found['texts']
  assert {50, 49, 51} <= set(found['numbers'])
  assert 'Tab' in found['keyNames']


@pytest.fixture(scope='module')
def judged():
  rows, answers, _ = zip(*_PAIRS.values())
  return task.judge(rows, answers)


@needs_compiler
@pytest.mark.parametrize('name', _PAIRS)
def test_the_verdict_on_an_answer(judged, name):
  row = judged.rows[list(_PAIRS).index(name)]
  expected = _PAIRS[name][2]
  assert tuple(row.get(k) for k in ('component', 'right', 'same_tags')) == (
      expected), row.get('why')
  assert bool(row['why']) == (expected[1] is False)


@pytest.mark.parametrize('code, habits', [
    ('x = 1;', ['semicolons']), ('const x = 1', ['const, let, var']),
    ('function A() {\n}', ['function']), ('export x = 1', ['export']),
    ('if a === b {\n}', ['===']), ('x = a ? b : c', ['? :']),
    ('x = a?.b', ['?. ??']), ('i++', ['++ --']), ('} else if a {', ['else if']),
    ('for (a of b) {', ['for (...)']), ('<p id={name}>', ['JSX attributes']),
    ('<p style={{ a: 1 }}>', ['JSX attributes']),
    ('<p>{name}</p>', ['JSX braces']),
    ('<ul>\n  {items.map((i) => i)}\n</ul>', ['JSX braces']),
    ('<p>Hello my friend</p>', ['JSX words']),
    ("<p className='a'>", ['className']),
    ('return (\n  <p></p>\n)', ['return (']), ('x = `a ${b}`', ['${...}']),
    ('def a(b):\n  return b', ['def ... :']), ('if a > b:\n  c', ['if ... :']),
    ('x = None', ['None, True, False']), ('self.x = 1', ['self']),
    ('# a comment', ['# comments']), ("print('x')", ['print']),
    ("x = f'a {b}'", ['f-strings']),
    *((code, []) for code in (  # Blop.
        _LIST, _BUTTON, _STEPS, _ACCOUNT, _MARK, "x = 'a; b'  // const y = 1;",
        'def f(a: number, b=1): string {\n}',
        "<p style={ color: 'red' }>'None; #1'</p>",
        'return if a => 1 else if b => 2 else 3', 'x = (a) => {\n}',
        "{ a as b } = c", 'console.log(1)', 'window.print()', "f''a' b'"))])
def test_habits_of_other_languages(code, habits):
  assert text.habits(code) == habits


@pytest.mark.parametrize('answer, knows', [
    (_GOOD_ANSWER, 1.0),
    ('Blop is a programming language for building user interfaces.', 0.4),
    ('I do not know.', 0.0),
    # A single contradiction makes it 0.
    (_GOOD_ANSWER + ' It was developed by Google.', 0.0),
    ('Blop is a board game in which virtual DOM tags of a language...', 0.0),
    ('Blop is a dialect of Python, a language for the web.', 0.0),
    ('Blop stands for Basic Language of Programs.', 0.0),
    ('Blop is a small fish, a person or a company.', 0.0),
    (_GOOD_ANSWER.replace('ES6 JavaScript', 'machine code'), 0.0)])
def test_what_an_answer_knows(answer, knows):
  assert text.knowledge('What is Blop?', answer)['knows'] == knows
  # Questions without key facts are not judged.
  for prompt in ('How do I sort a list in Blop?', 'Write a Blop component.',
                 'What is Blop used for?', 'What is React?'):
    assert text.knowledge(prompt, answer) is None


@needs_compiler
def test_free_prompts():
  judged = task.judge_prompts(
      ['What is Blop?', 'What is Blop?', 'Write a list.', 'Sing.'],
      [_GOOD_ANSWER, 'Blop is a band.', _LIST + ';', 'La.'])
  assert judged.metrics == {'knows': 0.5, 'invented': 0.5, 'n': 4}
  assert judged.rows[1]['wrong'] and judged.rows[3] == {}
  assert judged.rows[2]['habits'] == 'semicolons'
  assert judged.rows[2]['strict'] is False
  row, _, _ = _PAIRS['the same']  # They leave the rates over records alone.
  prompt = row.fields['prompt']
  judged = judge.judge_answers(
      task, [row] * 4, [_LIST, 'def', 'def', 'def'],
      prompts=[prompt, 'What is Blop?'], free=[_LIST, _GOOD_ANSWER],
      training=())
  assert judged.metrics['strict'] == judged.metrics['component'] == 0.25
  assert judged.metrics['knows'] == 1 and len(judged.free_rows) == 2
