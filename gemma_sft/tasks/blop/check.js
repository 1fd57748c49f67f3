// Compiles Blop snippets with the real compiler: JSON lines in, JSON lines out.
//
//   node check.js DIR < snippets.jsonl     DIR holds node_modules/blop-language
//
// in   {"id": 7, "code": "def Hello() {\n  <p>'hi'</p>\n}"}
// out  {"id": 7, "strict": true, "wrapped": true, "parses": true,
//       "stage": "ok", "line": 0, "column": 0, "message": "",
//       "js": "function Hello() {...", "names": ["Hello"]}
//
// strict   the compiler accepts the snippet as a whole file
// wrapped  it accepts it as a file, or as the body of a function (fragments)
// parses   the grammar accepts it in one of the two places; names may be
//          undefined
// stage    where the strict attempt ended: tokenize, parse, semantic, empty, ok
// line, column are counted from 1, and 0 if the compiler gives none.
// js, names: the JavaScript, if strict, and the names that it exports.
//
// The code is compiled, never run. Start this in a folder without a
// blop.config.js in it or above, because the compiler reads globals from there.
'use strict';

const path = require('path');
const readline = require('readline');

const manifest = require.resolve(
  'blop-language/package.json', { paths: [path.resolve(process.argv[2])] });
const source = path.join(path.dirname(manifest), 'src');
const backend = require(path.join(source, 'backend.js'));
const parser = require(path.join(source, 'parser.js'));
const { tokensDefinition } = require(path.join(source, 'tokensDefinition.js'));

// The compiler also accepts an empty file, a single string and a single name;
// an answer in prose or within back-ticks would count as Blop.
const STATEMENTS = new Set([
  'func_def', 'class_def', 'virtual_node', 'virtual_node_exp', 'assign',
  'assign_op', 'import_statement', 'for_loop', 'while_loop', 'condition',
  'try_catch', 'throw', 'return', 'func_call', 'named_func_call',
]);

function countStatements(node) {
  return (node.children || []).reduce(
    (sum, child) => sum + countStatements(child), Number(STATEMENTS.has(node.type)));
}

function at(token, message) {
  const placed = token && token.lineStart !== undefined;
  return {
    line: placed ? token.lineStart + 1 : 0,
    column: placed ? token.columnStart + 1 : 0,
    message: String(message),
  };
}

function firstToken(node) {
  let current = node;
  while (current && current.lineStart === undefined) {
    current = current.token || (current.children || [])[0];
  }
  return current;
}

// Makes one attempt: {stage, line, column, message}. `given` is the number of
// statements in the wrapper, which are not part of the answer.
function compile(code, given = 0) {
  let stream;
  try {
    stream = parser.tokenize(tokensDefinition, code);
  } catch (error) {
    return { stage: 'tokenize', ...at(error.token, error.message) };
  }
  const tree = parser.parse(stream);
  if (!tree.success) {
    const got = JSON.stringify(tree.token ? tree.token.value : '');
    const wanted = tree.sub_rules ? tree.sub_rules[tree.sub_rule_index] : '';
    return {
      stage: 'parse',
      ...at(tree.token, `unexpected ${got} in ${tree.rule_name}` +
            (typeof wanted === 'string' && wanted ? `, expected ${wanted}` : '')),
    };
  }
  if (countStatements(tree) <= given) {
    return { stage: 'empty', ...at(null, 'no statement in the answer') };
  }
  let result;
  try {
    result = backend.generateCode(tree, stream, code, false, null, false);
  } catch (error) {
    return { stage: 'semantic', ...at(error.token, error.message) };
  }
  if (!result.success) {
    const first = result.errors[0];
    // The message shows the source around the error. Its first line with words
    // is the error itself.
    const text = String(first.message || first).replace(/\u001b\[[0-9;]*m/g, '');
    const line = text.split('\n').map(s => s.trim()).find(s => /\w/.test(s));
    return { stage: 'semantic', ...at(firstToken(first.token), line || text) };
  }
  return {
    stage: 'ok', line: 0, column: 0, message: '',
    js: result.code, names: result.exportKeys,
  };
}

function check(code) {
  const text = code.replace(/\r\n/g, '\n').trim();
  const strict = compile(text);
  const inside = strict.stage === 'ok' ? strict
    : compile(`def _wrapped() {\n${text.replace(/^/gm, '  ')}\n}`, 1);
  const grammatical = stage => stage === 'ok' || stage === 'semantic';
  return {
    js: '',
    names: [],
    strict: strict.stage === 'ok',
    wrapped: inside.stage === 'ok',
    parses: grammatical(strict.stage) || grammatical(inside.stage),
    ...strict,
  };
}

readline.createInterface({ input: process.stdin }).on('line', (line) => {
  if (!line.trim()) return;
  const { id, code } = JSON.parse(line);
  let verdict;
  try {
    verdict = check(code);
  } catch (error) { // The parser is recursive: deep nesting overflows it.
    verdict = {
      js: '', names: [], strict: false, wrapped: false, parses: false,
      stage: 'parse',
      ...at(null, error.message),
    };
  }
  process.stdout.write(`${JSON.stringify({ id, ...verdict })}\n`);
});
