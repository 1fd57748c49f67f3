// The environment of a caged Blop program: a runtime without a DOM, a record of
// its effects, values that accept any use, and a clock that stands still.
// world.js, inputs.js and trace.js together are the body of one function, which
// runs in the context of a caged program before it (see cage.js). The three pass
// only strings to the outside.
'use strict';

// A program may define its own Map, and a hostile one may change the built-in one.
const {
  Array, Boolean, Date, Error, Function, JSON, Map, Math, Number, Object, Promise,
  Proxy, Reflect, RegExp, Set, String, Symbol, TypeError, WeakMap, WeakSet,
} = globalThis;
[Object, Array, String, Number, Boolean, Function, Promise, RegExp, Map, Set,
  WeakMap, WeakSet, Symbol, Proxy].forEach((one) => {
  Object.freeze(one);
  if (one.prototype) Object.freeze(one.prototype);
});
[JSON, Reflect, Object.getPrototypeOf(function* f() {}),
  Object.getPrototypeOf(function* f() {}).prototype,
  Object.getPrototypeOf([][Symbol.iterator]()),
  Object.getPrototypeOf(Object.getPrototypeOf([][Symbol.iterator]()))].forEach(
  (one) => Object.freeze(one));
const { stringify, parse } = JSON;
const LISTS = new Set(['map', 'filter', 'forEach', 'reduce', 'some', 'every',
  'find', 'findIndex', 'join', 'sort', 'push', 'pop', 'shift', 'unshift',
  'reverse', 'flat', 'flatMap', 'splice', 'fill', 'entries', 'keys', 'values']);
const TEXTS = new Set(['toUpperCase', 'toLowerCase', 'trim', 'split', 'charAt',
  'startsWith', 'endsWith', 'replace', 'padStart', 'padEnd', 'repeat', 'match',
  'substring', 'substr', 'charCodeAt', 'localeCompare', 'replaceAll', 'search',
  'trimStart', 'trimEnd', 'codePointAt', 'normalize']);
const NUMBERS = new Set(['toFixed', 'toPrecision']);
const DATES = new Set(['getTime', 'getFullYear', 'getMonth', 'getDate', 'getDay',
  'getHours', 'getMinutes', 'getSeconds', 'toISOString', 'toLocaleDateString',
  'toLocaleTimeString', 'toDateString', 'setDate', 'getUTCDay']);
const EITHER = new Set(['slice', 'concat']);
const MAX = { effects: 300, depth: 7, items: 60, text: 600, nodes: 1500 };

// ---- A record of what the program does. ----
let effects = [];
const effect = (...entry) => {
  if (effects.length >= MAX.effects) throw new Error('too many effects');
  effects.push(entry);
};
const takeEffects = () => { const taken = effects; effects = []; return taken; };

// ---- Values that accept any use: imports, window, and, while shapes are being
// found, the inputs themselves. A note collects how they are used. ----
let probes = 0;
const wilds = new WeakMap();
const notes = new WeakMap();
const newNote = () => ({ kids: {}, uses: {} });
function wild(path, note, loud = false) {
  const use = (what) => { if (note) note.uses[what] = true; };
  const kids = new Map();
  const kid = (name, label) => {
    if (!kids.has(name)) {
      if (note && !note.kids[name]) note.kids[name] = newNote();
      kids.set(name, wild(label, note && note.kids[name], loud));
    }
    return kids.get(name);
  };
  const element = () => kid('[]', `${path}[]`);
  // A function that works with `new` and has no property that traps must report.
  const target = (function any() {}).bind(null);
  delete target.name;
  delete target.length;
  const key = `${path}~key`;
  const proxy = new Proxy(target, {
    get(_, name) {
      if (name === Symbol.toPrimitive) {
        return (hint) => {
          use(hint);
          return note && hint === 'number' ? pick([1, 50, 0], probes++) : path;
        };
      }
      if (name === Symbol.iterator) {
        use('list');
        return () => [element()][Symbol.iterator]();
      }
      if (typeof name === 'symbol' || name === 'then' || name === 'constructor') {
        return undefined;
      }
      if (!note) {
        return name === 'length' ? 1 : kid(name, `${path}.${name}`);
      }
      if (name === key || /^\d+$/.test(name)) return element();
      if (path === '‹attributes›') return kid(name, `${path}.${name}`);
      if (LISTS.has(name)) { use('list'); return [][name].bind([element(), element()]); }
      if (TEXTS.has(name)) { use('text'); return 'some text'[name].bind('some text'); }
      if (NUMBERS.has(name)) { use('number'); return (1)[name].bind(1); }
      if (DATES.has(name)) {
        use('date');
        const day = new Date(0);
        return day[name].bind(day);
      }
      if (EITHER.has(name)) { use('sliced'); return () => proxy; }
      if (name === 'includes' || name === 'indexOf') {
        return (sought) => {
          use(wilds.has(sought) ? 'includes' : 'text');
          return name === 'includes' ? probes++ % 2 === 0 : 0;
        };
      }
      if (name === 'length') { use('length'); return 7; }
      if (name[0] === '‹') { use('looked up'); return kid('{}', `${path}{}`); }
      return kid(name, `${path}.${name}`);
    },
    set(_, name, value) {
      if (loud) effect('set', `${path}.${String(name)}`, show(value));
      kids.set(name, value);
      if (note) use('written');
      return true;
    },
    has() { return true; },
    deleteProperty() { return true; },
    ownKeys() { use('keys'); element(); return [key]; },
    getOwnPropertyDescriptor(_, name) {
      return { configurable: true, enumerable: true, value: this.get(_, name) };
    },
    getPrototypeOf() { return Function.prototype; },
    apply(_, _this, args) {
      use('called');
      if (loud) effect('call', path, args.map((a) => show(a)));
      if (path.endsWith('.getItem')) return null;
      args.forEach((a) => typeof a === 'function' && !wilds.has(a) && note && a(element()));
      return note ? kid('()', `${path}()`)
        : wild(`${path}(${args.map((a) => plain(a)).join(', ')})`.slice(0, 200), null, loud);
    },
    construct(_, args) {
      use('called');
      if (loud) effect('new', path, args.map((a) => show(a)));
      return kid('new', `new ${path}`);
    },
  });
  wilds.set(proxy, path);
  if (note) notes.set(proxy, note);
  return proxy;
}
const plain = (value) => {
  const shown = show(value);
  return typeof shown === 'string' ? shown : stringify(shown);
};

// ---- Converts any value to JSON, whatever its proxy traps do. ----
const settled = new WeakMap();
const events = new WeakSet();
function show(value, depth = 0, seen = []) {
  try {
    if (value === undefined) return { $: 'undefined' };
    if (value === null || typeof value === 'boolean') return value;
    if (typeof value === 'string') return value.slice(0, MAX.text);
    if (typeof value === 'number') {
      if (!Number.isFinite(value)) return { $: String(value) };
      return Number(value.toPrecision(12));
    }
    if (typeof value === 'symbol' || typeof value === 'bigint') return { $: String(value) };
    if (events.has(value)) return { $: 'event' };
    if (wilds.has(value)) return { $: wilds.get(value) };
    if (value instanceof Node) return { $: 'node', tree: tree(value) };
    if (typeof value === 'function') return { $: 'function' };
    if (value instanceof Date) return { $: `date ${value.getTime()}` };
    if (value instanceof Error) return { $: 'error' };
    if (value instanceof RegExp) return { $: String(value) };
    if (value instanceof Promise) {
      const end = settled.get(value);
      return end ? { $: end.kind, value: show(end.value, depth + 1, seen) } : { $: 'pending' };
    }
    if (depth > MAX.depth || seen.includes(value)) return { $: 'deep' };
    const inner = [...seen, value];
    if (value instanceof Map) {
      return { $: 'map', value: show([...value], depth + 1, inner) };
    }
    if (value instanceof Set) {
      return { $: 'set', value: show([...value], depth + 1, inner) };
    }
    if (Array.isArray(value)) {
      if (value.length > MAX.items * 10) return { $: 'long' };
      return value.slice(0, MAX.items).map((v) => show(v, depth + 1, inner));
    }
    const fields = {};
    Object.keys(value).sort().slice(0, MAX.items).forEach((name) => {
      fields[name] = show(value[name], depth + 1, inner);
    });
    return fields;
  } catch (error) {
    return { $: 'throws' };
  }
}
const follow = (value) => {
  if (value instanceof Promise && !settled.has(value)) {
    value.then((v) => settled.set(value, { kind: 'resolved', value: v }),
      () => settled.set(value, { kind: 'rejected' }));
  }
  return value;
};

// ---- The runtime: h, c, Component and mount as in
// blop-language/src/runtime.js, without a DOM. ----
class Node {
  constructor(tag, attributes, children) {
    this.tag = String(tag);
    this.attributes = attributes;
    this.children = children;
  }
}
let app = null;
let current = null;
class Component {
  constructor(render, attributes, children, name) {
    this.componentFct = render || this.render;
    if (!this.componentFct) throw new Error('no render method');
    this.attributes = attributes || {};
    this.children = children || [];
    this.name = name;
    this.life = { mount: [], unmount: [] };
    this.state = {};
    this.context = {};
    this.parent = current;
    this.mounted = false;
    this.__drawn = 0;
  }
  refresh() { if (app) app.dirty = true; }
  onMount() { return this; }
  onUnmount() { return this; }
  mount(f) { if (!this.mounted) this.life.mount.push(f); return this; }
  unmount(f) { if (!this.mounted) this.life.unmount.push(f); return this; }
  useState(name, initial) {
    this.state[name] = this.state[name] || initial;
    return {
      value: this.state[name],
      setState: (next) => { this.state[name] = next; this.refresh(); },
      getState: () => this.state[name],
    };
  }
  useContext(name, initial) {
    if (initial && this.context[name] === undefined) this.context[name] = initial;
    const getContext = () => {
      for (let node = this; node; node = node.parent) {
        if (node.context[name] !== undefined) return node.context[name];
      }
      return wild(`context_${String(name)}`, null, true);
    };
    return {
      setContext: (value) => { this.context[name] = value; this.refresh(); },
      getContext,
      value: initial || getContext(),
    };
  }
}
const isComponentClass = (f) => f && f.prototype && f.prototype.render
  && f.prototype instanceof Component;
function h(tag, attributes, children) {
  return new Node(tag, attributes || {}, children || []);
}
function c(what, attributes, children, name) {
  if (wilds.has(what)) return new Node(wilds.get(what).split('.').pop(), attributes, children);
  if (typeof what !== 'function') throw new TypeError('not a component');
  const path = current ? `${current.path}.${current.__drawn++}` : 'root';
  let instance = app && app.instances.get(path);
  if (!instance || instance.__what !== what) {
    instance = isComponentClass(what) ? new what(null, attributes, children, name)
      : new Component(what, attributes, children, name);
    instance.__what = what;
    instance.path = path;
    if (app) app.instances.set(path, instance);
  }
  instance.attributes = attributes;
  instance.children = children;
  instance.__drawn = 0;
  const parent = current;
  current = instance;
  try {
    return instance.componentFct(attributes, children, instance);
  } finally {
    current = parent;
  }
}
const mount = (_dom, render) => ({
  init: () => { effect('mount', show(render())); },
  refresh: () => { effect('refresh'); },
});
const blop = { h, c, Component, mount };

const FLAGS = new Set(['disabled', 'checked', 'selected', 'hidden', 'required',
  'readonly', 'multiple', 'open', 'controls', 'autofocus']);
function attribute(name, value) {
  const flag = (v) => {
    if (v && notes.has(v)) notes.get(v).uses.flag = true;
    return Boolean(v);
  };
  if (FLAGS.has(name)) return flag(value);
  if (name === 'class' && value && typeof value === 'object' && !wilds.has(value)) {
    return Object.keys(value).filter((k) => flag(value[k])).join(' ');
  }
  return show(value);
}

// Returns a virtual node as [tag, attributes, events, children], texts joined.
function tree(node) {
  let left = MAX.nodes;
  const visit = (n) => {
    if (--left < 0) throw new Error('too many nodes');
    const attributes = {};
    let events = [];
    Object.keys(n.attributes).forEach((name) => {
      const value = n.attributes[name];
      if (name === 'on') {
        events = value ? Object.keys(value).filter((e) => value[e]) : [];
      } else if (name !== 'key' && name !== 'hooks' && name !== 'needRender') {
        attributes[name] = attribute(name, value);
      }
    });
    const children = [];
    (Array.isArray(n.children) ? n.children : [n.children]).forEach((child) => {
      if (child === null || child === undefined || child === false || child === true) return;
      if (child instanceof Node) { children.push(visit(child)); return; }
      const text = typeof child === 'string' || typeof child === 'number'
        ? String(child).slice(0, MAX.text)
        // As snabbdom converts an object.
        : (wilds.has(child) ? wilds.get(child) : 'undefined');
      if (typeof children[children.length - 1] === 'string') {
        children[children.length - 1] += text;
      } else {
        children.push(text);
      }
      if (--left < 0) throw new Error('too many nodes');
    });
    return [n.tag, attributes, events, children];
  };
  return visit(node);
}
function handlers(node, found = []) {
  const on = node.attributes.on;
  if (on && typeof on === 'object') {
    Object.keys(on).forEach((name) => on[name] && found.push([node, name, on[name]]));
  }
  (Array.isArray(node.children) ? node.children : []).forEach(
    (child) => child instanceof Node && handlers(child, found));
  return found;
}

// ---- Time and random numbers are the same in every run. ----
const RealDate = Date;
const NOW = RealDate.UTC(2024, 4, 17, 9, 30, 5);
let now = NOW;
class FixedDate extends RealDate {
  constructor(...args) { super(...(args.length ? args : [now])); }
  static now() { return now; }
}
let seed = 1;
const random = () => { seed = (seed * 16807) % 2147483647; return seed / 2147483647; };
let timers = [];
let timerId = 0;
const addTimer = (repeat) => (f, wait = 0, ...args) => {
  timerId += 1;
  effect(repeat ? 'interval' : 'timeout', show(wait));
  if (typeof f === 'function') timers.push({ id: timerId, f, args, at: now + (Number(wait) || 0), repeat });
  return timerId;
};
const clearTimer = (id) => {
  effect('clear timer');
  timers = timers.filter((t) => t.id !== id);
};
const runTimers = () => {
  const due = timers.slice(0, 5);
  timers = timers.filter((t) => t.repeat && !due.includes(t));
  due.sort((a, b) => a.at - b.at).forEach((t) => { now = Math.max(now, t.at); t.f(...t.args); });
};
const fetch = (...args) => {
  effect('fetch', args.map((a) => show(a)));
  return Promise.resolve({
    ok: true,
    status: 200,
    json: () => Promise.resolve(wild('response', null)),
    text: () => Promise.resolve('response text'),
  });
};
const logger = (level) => (...args) => effect('log', level, args.map((a) => plain(a)).join(' '));

const moduleObject = { exports: {} };
Object.assign(globalThis, {
  module: moduleObject,
  blop,
  require: (name) => wild(String(name).replace(/^.*\//, '').replace(/\.\w+$/, ''), null, true),
  console: { log: logger('log'), error: logger('error'), warn: logger('warn'), info: logger('log') },
  window: wild('window', null, true),
  document: wild('document', null, true),
  history: wild('history', null, true),
  fetch,
  alert: (...args) => effect('call', 'alert', args.map((a) => show(a))),
  prompt: (...args) => { effect('call', 'prompt', args.map((a) => show(a))); return 'answer_1'; },
  setTimeout: addTimer(false),
  setInterval: addTimer(true),
  clearTimeout: clearTimer,
  clearInterval: clearTimer,
  Date: FixedDate,
  test: (_name, f) => { attempt(f); },
  expect: (value) => new Proxy({}, {
    get: (_, matcher) => (...args) => effect('expect', String(matcher), show(value), args.map((a) => show(a))),
  }),
});
Math.random = random;
// Globals with memory outside the heap, that wait, or that watch the collector.
Object.getOwnPropertyNames(globalThis)
  .filter((name) => /Array$|Buffer$|^WebAssembly$|^Atomics$|^DataView$|^Weak.*Ref|Registry$/
    .test(name) && name !== 'Array')
  .forEach((name) => { delete globalThis[name]; });
