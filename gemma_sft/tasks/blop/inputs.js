// Makes up inputs for a caged Blop program: finds their shapes by watching what
// the reference does with inputs that accept any use, and builds values from these.
// world.js, inputs.js and trace.js together are the body of one function, which
// runs in the context of a caged program before it (see cage.js). The three pass
// only strings to the outside.
'use strict';

// ---- Made-up inputs. ----
// {t: text|number|flag|list|map|object|function|date|children, of, fields}
function shape(note, name, shown) {
  const { uses, kids } = note;
  const fieldNames = Object.keys(kids).filter((k) => !['[]', '()', '{}', 'new'].includes(k));
  if (uses.date) return { t: 'date' };
  if (uses.called && !fieldNames.length) {
    return { t: 'function', of: kids['()'] ? shape(kids['()'], 'result', shown) : { t: 'flag' } };
  }
  const element = () => shape(kids['[]'] || newNote(), name.replace(/s$/, ''), shown);
  if (uses.written || (uses.keys && fieldNames.length)) {
    const fields = {};
    fieldNames.forEach((k) => { fields[k] = shape(kids[k], k, shown); });
    return { t: 'object', fields };
  }
  if (uses.list) return { t: 'list', of: element() };
  if (uses.keys) {
    return { t: shown.includes(`${note.path}~key`) ? 'map' : 'list', of: element() };
  }
  if (uses.text) return { t: 'text' };
  if (uses.includes && !uses.string) {
    return note.path.endsWith('[]') ? { t: 'text' } : { t: 'list', of: { t: 'text' } };
  }
  if (uses.number && !fieldNames.length) return { t: 'number' };
  if ((uses['looked up'] || kids['{}']) && !fieldNames.length) {
    return { t: 'map', of: shape(kids['{}'] || newNote(), 'value', shown) };
  }
  if (fieldNames.length) {
    const fields = {};
    fieldNames.forEach((k) => { fields[k] = shape(kids[k], k, shown); });
    return { t: 'object', fields };
  }
  if (kids['[]'] && !uses.string) return { t: 'list', of: element() };
  if (uses.length || uses.sliced) {
    const plural = /s$/.test(name) && !/ss$/.test(name);
    return plural && !uses.string ? { t: 'list', of: { t: 'text' } } : { t: 'text' };
  }
  if (uses.default && !uses.string) return { t: 'number' };
  if (uses.flag && !uses.string) return { t: 'flag' };
  if (uses.string || shown.includes(note.path)) return { t: 'text' };
  return { t: 'flag' };
}
const label = (note, path) => {
  note.path = path;
  Object.keys(note.kids).forEach((k) => {
    label(note.kids[k], ['[]', '()', '{}'].includes(k) ? path + k
      : k === 'new' ? `new ${path}` : `${path}.${k}`);
  });
};

const TEXT_POOL = ['the Quick brown-fox', 'Anna', '42', '  two  words ', 'a,b;c',
  '2024-05-17', 'x@example.org', '', 'racecar', '12:30', '#ff8800', 'B', '101A',
  'one\ntwo', 'https://example.org/a?b=1'];
const NUMBER_POOL = [3, 7, 0, 12, 1, 40, 5, 100, 2, 60, 18, 365];
const pick = (pool, k) => pool[((k % pool.length) + pool.length) % pool.length];
// Returns the k-th inputs of a shape; `i` numbers siblings.
let literals = { texts: [], numbers: [], examples: [], keyNames: [''] };
let rich = false;
let big = -1;
let reads = null;
let aliases = {};
function make(s, name, k, i, path) {
  const last = name.replace(/\W/g, '');
  switch (s.t) {
    case 'text': {
      if (k === big) return `${last}_${i + 1} `.repeat(12);
      if (k === 2 && !rich) return `same_${i % 3}`;
      if (k === 3 && !rich) return i % 2 ? `${last}_${i}` : '';
      const pool = rich ? [...literals.texts, ...literals.examples, ...TEXT_POOL]
        : literals.texts;
      if (rich || (k >= 4 && pool.length)) return pick(pool, k + i * (rich ? 3 : 1));
      return `${last}_${i + 1}`;
    }
    case 'number': {
      const pool = [...literals.numbers, ...NUMBER_POOL];
      if (!rich && k === 0) return 3 + i * 4;
      // Values that the program compares with come first.
      return pick(pool, k - (rich ? 0 : 1) + i * 5);
    }
    case 'flag': {
      if (k < 2) return k === 0;
      const pool = [...literals.texts, ...literals.numbers];
      return pool.length && (k + i) % 4 ? pick(pool, k + i) : (k + i) % 2 === 0;
    }
    case 'date': return new FixedDate(NOW + (k * 31 - 40 + i) * 86400000);
    case 'list': {
      // In the last run of a component lists are longer than a page.
      const length = k === big && !path.includes('[]') ? 13
        : k === 3 ? 0 : k === 1 ? 1 : k === 0 ? 2 : 2 + (k % 3);
      return Array.from({ length }, (_, n) => make(s.of, last, k, i * 2 + n, `${path}[]`));
    }
    case 'map': {
      const value = {};
      const names = k === 3 ? [] : [`${last}key_1`, `${last}key_2`];
      names.forEach((n, at) => { value[n] = make(s.of, last, k, i * 2 + at, `${path}[]`); });
      return value;
    }
    case 'object': {
      const value = {};
      Object.keys(s.fields).forEach((f, at) => {
        value[f] = make(s.fields[f], f, k, i + (s.fields[f].t === 'text' ? 0 : at), `${path}.${f}`);
      });
      return watched(value, path, s);
    }
    case 'children': return [h('span', {}, ['child_1']), 'child_2'];
    default: {
      const returned = (...args) => {
        effect('call', path, args.map((a) => show(a)));
        const text = stringify(args.map((a) => show(a)));
        let hash = 0;
        for (let n = 0; n < text.length; n++) hash = (hash * 31 + text.charCodeAt(n)) % 9973;
        return make(s.of, `${last}Result`, k, hash % 4, `${path}()`);
      };
      return returned;
    }
  }
}
// Returns an object that notes which fields it lacks, and knows aliases of some.
// While shapes are being found, a missing field accepts any use.
let found = null;
function watched(value, path, s) {
  const other = aliases[path] || {};
  return new Proxy(value, {
    get(target, name, receiver) {
      if (found && typeof name === 'string' && !(name in target)
          && name !== 'then' && name !== 'toJSON') {
        let one = found.find((f) => f.s === s && f.name === name);
        if (!one) {
          const note = newNote();
          one = { s, name, note, at: `‹${path}.${name}›`, value: null };
          one.value = wild(one.at, note);
          found.push(one);
        }
        return one.value;
      }
      if (typeof name === 'string' && reads) {
        const known = Object.prototype.hasOwnProperty.call(target, name);
        const seen = reads[path] || (reads[path] = { read: [], missing: [] });
        if (known) {
          if (!seen.read.includes(name)) seen.read.push(name);
        } else if (Object.prototype.hasOwnProperty.call(other, name)) {
          return target[other[name]];
        } else if (!(name in target) && name !== 'then' && name !== 'toJSON'
                   && !seen.missing.includes(name) && seen.missing.length < 20) {
          seen.missing.push(name);
        }
      }
      return Reflect.get(target, name, receiver);
    },
  });
}

const parameters = (f) => {
  const text = String(f);
  const open = text.indexOf('(');
  const arrow = text.indexOf('=>');
  if (arrow >= 0 && (open < 0 || arrow < open)) return [text.slice(0, arrow).trim()];
  let depth = 0;
  let word = '';
  const found = [];
  for (let i = open; i < text.length; i++) {
    const ch = text[i];
    if ('([{'.includes(ch)) { depth += 1; if (depth === 1) continue; }
    if (')]}'.includes(ch)) depth -= 1;
    if (depth === 0 || (depth === 1 && ch === ',')) {
      if (word.trim()) found.push(word.trim());
      word = '';
      if (depth === 0) break;
    } else {
      word += ch;
    }
  }
  return found;
};

// Finds the shapes of the reference's inputs.
function* makePlan(value, name, plan) {
  const { kind } = plan;
  const asked = [];
  const inputs = (names) => names.map((parameter) => {
    const note = newNote();
    const word = parameter.split('=')[0].replace(/^\.\.\./, '').trim();
    asked.push([`‹${word}›`, note, word]);
    return wild(`‹${word}›`, note);
  });
  let shown = '';
  const shapesOf = () => {
    const found = asked.splice(0).map(([path, note, word]) => {
      label(note, path);
      return { name: word, shape: shape(note, word, shown) };
    });
    return found;
  };
  const given = parameters(value);
  if (kind === 'component') {
    const [attributes] = inputs(['attributes']);
    app = { instances: new Map(), dirty: false };
    current = null;
    const children = [h('span', {}, ['child_1'])];
    const drawn = attempt(() => c(value, attributes, children, 'root'));
    if (drawn.value instanceof Node) {
      shown = stringify(tree(drawn.value));
      handlers(drawn.value).slice(0, 20).forEach(([, type, f]) => {
        literals.keyNames.forEach((key) => {
          attempt(() => fire(f, eventFor(type, key, '5')));
        });
      });
      attempt(() => app.instances.forEach((one) => { one.onMount(); one.life.mount.forEach((f) => f()); }));
      attempt(runTimers);
    }
    yield;
    plan.shapes = shapesOf();
    if (plan.shapes[0].shape.t !== 'object') plan.shapes[0].shape = { t: 'object', fields: {} };
    plan.shapes.push({ name: 'children', shape: { t: 'children' } });
    plan.runs = Math.min(10, 5 + literals.texts.length + literals.numbers.length);
    return;
  }
  if (kind === 'class') {
    const names = isClass(value) ? constructorOf(value) : [];
    const args = inputs(names);
    const made = attempt(() => new value(...args));
    const methods = Object.getOwnPropertyNames(value.prototype)
      .filter((m) => m !== 'constructor' && typeof value.prototype[m] === 'function');
    const used = asked.splice(0);
    const methodNotes = {};
    methods.forEach((m) => {
      const given_ = inputs(parameters(value.prototype[m]));
      if (!made.threw) {
        const done = attempt(() => made.value[m](...given_));
        shown += stringify(show(done.value)) || '';
      }
      methodNotes[m] = asked.splice(0);
    });
    yield;
    asked.push(...used);
    plan.shapes = shapesOf();
    plan.methods = {};
    methods.forEach((m) => { asked.push(...methodNotes[m]); plan.methods[m] = shapesOf(); });
    plan.runs = 6;
    return;
  }
  const args = inputs(given);
  app = null; current = null;
  const result = attempt(() => value(...args));
  const outer = asked.splice(0);
  if (typeof result.value === 'function' && !wilds.has(result.value)) {
    const inner = inputs(parameters(result.value));
    const called = attempt(() => result.value(...inner));
    yield;
    if (timers.length) attempt(runTimers);
    shown += stringify(show(called.value)) || '';
    plan.inner = shapesOf();
  }
  yield;
  shown += stringify(show(result.value)) + stringify(takeEffects());
  asked.push(...outer);
  plan.shapes = shapesOf();
  plan.needed = given.filter((p) => !p.includes('=') && !p.startsWith('...')).length;
  plan.runs = 16;
}
// Runs the reference on the inputs found so far, to find fields not read before.
function* discover(value, plan, entry) {
  found = [];
  const mine = found;
  plan.failed = false;
  let shown = '';
  try {
    yield* tracers[plan.kind](value, plan, entry);
  } catch (error) {
    plan.trouble = true;
  }
  found = null;
  shown = stringify(entry);
  mine.forEach(({ s, name, note, at }) => {
    label(note, at);
    s.fields[name] = shape(note, name, shown);
  });
}
// Fields of one name get one type, as `user.id == chosen.id` reveals neither.
function* unify(plan) {
  const types = {};
  const visit = (name, s, act) => {
    act(name, s);
    if (s.of) visit(s.t === 'list' ? name.replace(/s$/, '') : name, s.of, act);
    Object.keys(s.fields || {}).forEach((f) => visit(f, s.fields[f], act));
  };
  const all = (act) => [plan.shapes, plan.inner || [], ...Object.values(plan.methods || {})]
    .forEach((group) => group.forEach((p) => visit(p.name, p.shape, act)));
  all((name, s) => { if (s.t === 'text' || s.t === 'number') types[name] = s.t; });
  all((name, s) => { if (s.t === 'flag' && types[name]) s.t = types[name]; });
  yield;
}
const constructorOf = (what) => {
  const text = String(what);
  const at = text.search(/\bconstructor\s*\(/);
  return at < 0 ? [] : parameters(text.slice(at));
};
