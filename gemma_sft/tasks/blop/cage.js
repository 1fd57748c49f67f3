// Runs compiled Blop in a cage: one JSON document in, JSON lines out.
//
//   node --permission -e "$(cat cage.js)" < job.json     (see run_js.py)
//
// in   {"inside": code that surrounds a program, "reference": {"js", "names"},
//       "answer": {"js", "names"} or null, "aliases": {...}, "seconds": 3}
// out  {"cage": "ready"}, the plan (inputs for each name), the reference's trace,
//      the answer's trace; {"problem": "..."} instead of a trace that failed.
//
// The process has no file system, no child processes and no workers
// (--permission without exceptions). Node limits its heap, and the shell that
// starts it limits the rest. Each program runs in a context of its own, without
// require, process, network or timers. No string can become code, in this file or
// in a context, and promises are drained within the time limit. A context passes
// only strings to this file, which never reads, calls or converts its values.
'use strict';

(() => {
  const vm = require('vm');
  const fs = require('fs');

  // Wall-clock limits, generous because the machine may be busy: a step takes a
  // millisecond. After the first step that exceeds its limit, they shrink.
  const PATIENCE = [1500, 400];
  const STEPS = 4000;
  const MAX_CHARACTERS = 1 << 20;

  const read = () => {
    const chunks = [];
    const buffer = Buffer.alloc(1 << 16);
    for (;;) {
      let n = 0;
      try {
        n = fs.readSync(0, buffer, 0, buffer.length, null);
      } catch (error) {
        if (error.code === 'EAGAIN') continue;
        if (error.code !== 'EOF') throw error;
      }
      if (!n) return JSON.parse(Buffer.concat(chunks).toString('utf8'));
      chunks.push(Buffer.from(buffer.subarray(0, n)));
    }
  };
  const job = read();
  const { cpuUsage } = process;
  const late = () => cpuUsage().user > job.seconds * 1e6;
  const exit = process.exit.bind(process);
  const write = (text) => {
    const bytes = Buffer.from(`${text}\n`, 'utf8');
    for (let at = 0; at < bytes.length;) {
      try {
        at += fs.writeSync(1, bytes, at);
      } catch (error) {
        if (error.code !== 'EAGAIN') throw error;
      }
    }
  };

  // If a program reaches this realm, it finds nothing useful here.
  const keep = new Set(['nextTick', 'emitWarning', 'stdout', 'stderr', 'versions',
    'version', 'argv', 'execArgv', 'env', 'emit', 'on', 'listenerCount',
    '_tickCallback', '_fatalException', 'reallyExit', 'hrtime']);
  for (const name of Object.getOwnPropertyNames(process)) {
    if (!keep.has(name)) {
      try { delete process[name]; } catch (error) { /* stays */ }
    }
  }
  for (const name of Object.getOwnPropertyNames(globalThis)) {
    if (!(name in { Object, Function, Array, String, Number, Boolean, Symbol, Error,
      TypeError, RangeError, SyntaxError, ReferenceError, JSON, Math, Promise, Map,
      Set, WeakMap, WeakSet, Reflect, Proxy, Buffer, Uint8Array, globalThis })) {
      try { delete globalThis[name]; } catch (error) { /* stays */ }
    }
  }

  // Runs one program. Returns a JSON text, or null with `problem` set.
  let problem = '';
  const run = (program, request) => {
    problem = '';
    const context = vm.createContext(Object.create(null), {
      codeGeneration: { strings: false, wasm: false },
      microtaskMode: 'afterEvaluate',
    });
    let patience = PATIENCE[0];
    const evaluate = (source) => new vm.Script(source)
      .runInContext(context, { timeout: patience, displayErrors: false });
    new vm.Script(job.inside).runInContext(context);
    evaluate(`blopCage__.setUp(${JSON.stringify(JSON.stringify(request))});`);
    try {
      evaluate(program.js);
    } catch (error) { // `error` belongs to the program: not to be touched.
      problem = 'the program does not load';
    }
    if (problem) return null;
    for (let i = 0; i < STEPS; i++) {
      let state;
      try {
        state = evaluate('blopCage__.step();');
      } catch (error) {
        // It ran out of time, or its promises never ended.
        [, patience] = PATIENCE;
        try {
          state = evaluate('blopCage__.stepFailed();');
        } catch (again) {
          problem = 'the program breaks its harness';
          return null;
        }
      }
      if (state === 'done') break;
      if (late() || state !== 'more') {
        problem = late() ? 'out of time' : 'the program breaks its harness';
        return null;
      }
    }
    let text;
    try {
      text = evaluate('blopCage__.report();');
    } catch (error) {
      problem = 'the program breaks its harness';
      return null;
    }
    if (typeof text !== 'string' || text.length > MAX_CHARACTERS) {
      problem = 'too large a result';
      return null;
    }
    return text.replace(/[\n\u2028\u2029]/g, ' ');
  };
  run({ js: 'module.exports = {};' }, { mode: 'plan', names: [], literals: {} });
  write('{"cage": "ready"}');
  const emit = (text) => write(
    text === null ? JSON.stringify({ problem }) : text);

  const text = run(job.reference, {
    mode: 'plan', names: job.reference.names, literals: job.literals,
  });
  emit(text);
  if (text === null) exit(0);
  const plan = JSON.parse(text);
  emit(run(job.reference, { mode: 'trace', plan, names: {}, aliases: {} }));
  if (job.answer) {
    emit(run(job.answer, {
      mode: 'trace', plan, names: job.answer.names, aliases: job.aliases,
    }));
  }
  exit(0);
})();
