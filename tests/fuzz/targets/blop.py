"""Programs that try to break out of Blop's sandbox.

A case is the program. Each takes a Node process, hence the small share.
"""

import os
import shutil

from hypothesis import strategies as st

from fuzz import judging
from gemma_sft.tasks.blop import run_js

_SENTINEL = 'SENTINEL_OF_THE_HOST'
_REFERENCE = {
    'js': "function Hi(a) { return blop.h('p', {}, [a.name]); }\n"
          'module.exports = { Hi };', 'names': ['Hi']}


def check(case: bytes, folder: str) -> None:
  """Runs a program beside the reference, which it must not affect."""
  if shutil.which('node') is None:
    return
  program = case.decode('utf-8', 'replace')
  os.environ['SECRET_OF_THE_HOST'] = _SENTINEL
  lines = run_js.run([run_js.ProgramPair(
      _REFERENCE, {'js': program, 'names': {}})])[0]
  if len(lines) < 2 or 'Hi' not in lines[1].get('traces', {}):
    raise judging.Loss('the reference has no trace of its own')
  shown = [run['tree'][3] for run in lines[1]['traces']['Hi']['runs']][:3]
  if shown != [['name_1'], ['name_1'], ['same_0']]:
    raise judging.Loss(f'the reference shows {shown}')
  if _SENTINEL in str(lines) or 'root:x:' in str(lines):
    raise judging.Loss('the program has seen the host')
  if os.listdir(folder):
    raise judging.Loss(f'it wrote {os.listdir(folder)}')


_SHOW = ("\nfunction Hi(a) {{ return blop.h('p', {{}}, ['' + ({})]) }}\n"
         'module.exports = {{ Hi }};')


def seeds() -> list[bytes]:
  """Returns the reference and a program that asks for the host."""
  return [_REFERENCE['js'].encode(), _SHOW.format(
      'typeof process === "object" && process.env.SECRET_OF_THE_HOST'
  ).encode()]


_ROOTS = st.sampled_from((
    'this', 'globalThis', 'blop', 'a', 'module', 'exports', 'require',
    'process', '(() => {}).constructor', 'blopCage__', 'Error', 'Promise',
    '[].constructor.constructor', 'Reflect', 'Symbol', 'WebAssembly', 'fetch',
    "import('fs')", 'Atomics', 'SharedArrayBuffer', 'async function () {}',
    'function* () {}', 'new Proxy({}, {})', 'document', 'console'))
_STEPS = st.lists(st.sampled_from((
    '.constructor', '.__proto__', '.prototype', "('return process')()",
    "('fs')", '.env', '.mainModule', "['require']", '.exports', '.parent',
    '.then((x) => x)', '.catch((e) => e)', ".binding('fs')", '.stack', '()',
    ".readFileSync('/etc/passwd')", '.caller', '.arguments', '.toString()',
    '.prepareStackTrace', '.getPrototypeOf(a)', '.valueOf()')), max_size=4)
_EXPRESSIONS = st.builds(lambda root, steps: root + ''.join(steps), _ROOTS,
                         _STEPS)
_DAMAGE = st.sampled_from((
    '', 'while (true) {}', "Object.prototype.then = () => 'x';",
    'Error.prepareStackTrace = (e, s) => s[0].getThis();',
    'Array.prototype[Symbol.iterator] = null;', 'JSON.stringify = null;',
    'Object.defineProperty(Object.prototype, "tree", { get() { throw 1 } });',
    "const x = []; for (;;) x.push('x'.repeat(1e6));", 'throw null;',
    "'x'.repeat(2 ** 29);", 'new Array(2 ** 32 - 1).fill(0);',
    '(async () => { for (;;) await 0 })();', 'debugger;', '\u2028', '`',
    "for (let i = 0; i < 1e9; i++) ('x' + i).match(/(x+)+$/);",
    'Promise.reject(new Proxy({}, { get() { while (1) {} } }));'))
STRATEGY = st.builds(
    lambda damage, shown: (damage + _SHOW.format(shown)).encode(), _DAMAGE,
    _EXPRESSIONS) | st.text(max_size=30).map(str.encode)
