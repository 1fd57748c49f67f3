// Operates a caged Blop program and records what it does.
// world.js, inputs.js and trace.js together are the body of one function, which
// runs in the context of a caged program before it (see cage.js). The three pass
// only strings to the outside.
'use strict';

// ---- Operating a program. ----
let request = null;

const isClass = (f) => /^class\b/.test(String(f));
const kindOf = (value, name) => {
  if (typeof value !== 'function' || wilds.has(value)) return 'value';
  if (isComponentClass(value)) return 'component';
  if (isClass(value)) return 'class';
  return /^[A-Z]/.test(name) ? 'component' : 'function';
};
const attempt = (f) => {
  try {
    return { value: follow(f()) };
  } catch (error) {
    return { threw: true };
  }
};
const argumentsFor = (shapes, k) => shapes.map(
  (p, i) => make(p.shape, p.name, k, i, p.name));

// Starts a component on the k-th inputs. draw() returns its tree.
function start(what, shapes, k) {
  app = { instances: new Map(), dirty: false };
  current = null;
  const mine = app;
  const [attributes, children] = argumentsFor(shapes, k);
  return {
    mine,
    node: null,
    draw() {
      app = mine;
      current = null;
      mine.dirty = false;
      this.node = c(what, attributes, children, 'root');
      if (!(this.node instanceof Node)) return null;
      return tree(this.node);
    },
    mount() {
      app = mine;
      mine.instances.forEach((one) => {
        one.onMount();
        one.life.mount.forEach((f) => f());
        one.life.mount = [];
        one.mounted = true;
      });
    },
    unmount() {
      mine.instances.forEach((one) => {
        one.onUnmount();
        one.life.unmount.forEach((f) => f());
      });
    },
  };
}
const eventFor = (type, key, typed) => {
  const target = {
    value: typed, checked: true, name: 'field_1', files: [{ name: 'file_1' }],
    scrollTop: 40, id: 'id_1', dataset: {}, focus() {}, blur() {}, select() {},
  };
  target.elements = wild('elements', null);
  const event = {
    type, key, code: key, target, currentTarget: target, offsetX: 11, offsetY: 12,
    clientX: 13, clientY: 14, pageX: 15, pageY: 16, deltaY: 1, button: 0,
    preventDefault() { effect('prevent', 'default'); },
    stopPropagation() { effect('prevent', 'propagation'); },
  };
  const rest = wild('event', null);
  const open = (object, others) => new Proxy(object, {
    get: (o, name) => (name in o || typeof name === 'symbol' ? o[name] : others[name]),
    set: (o, name, value) => { effect('set', `event.${String(name)}`, show(value)); o[name] = value; return true; },
  });
  event.target = open(target, wild('target', null));
  event.currentTarget = event.target;
  const whole = open(event, rest);
  events.add(whole);
  events.add(event.target);
  return whole;
};
function fire(handler, event) {
  if (Array.isArray(handler)) return handler[0](...handler.slice(1), event);
  return handler(event);
}

// Makes one run of a trace: fills `entry`, and yields to let promises continue.
const reset = () => {
  seed = 1; now = NOW; timers = []; app = null; current = null;
  takeEffects();
};
function* traceComponent(what, plan, entry) {
  const { k } = entry;
  const page = start(what, plan.shapes, k);
  entry.tree = page.draw();
  takeEffects();
  if (!entry.tree) { entry.failed = true; return; }
  yield;
  page.mount();
  yield;
  attempt(runTimers);
  yield;
  entry.mounted = takeEffects();
  entry.later = page.draw();
  page.unmount();
  yield;
  entry.unmounted = takeEffects();
  entry.events = [];
  if (k > 1 && k !== big) return;
  const found = handlers(page.node).slice(0, 12);
  for (let i = 0; i < found.length; i++) {
    const type = found[i][1];
    for (const key of /^key/.test(type) ? literals.keyNames : ['']) {
      const one = { type, key, turns: [] };
      entry.events.push(one);
      reset();
      const fresh = start(what, plan.shapes, k);
      fresh.draw();
      takeEffects();
      for (let turn = 0; turn < 2; turn++) {
        const same = fresh.node instanceof Node ? handlers(fresh.node)[i] : null;
        if (!same || same[1] !== type) break;
        const done = attempt(
          () => fire(same[2], eventFor(type, key, turn ? '8' : 'typed_1')));
        yield;
        attempt(runTimers);
        yield;
        const effects_ = takeEffects();
        const drawn = attempt(() => fresh.draw());
        one.turns.push({
          threw: !!(done.threw || drawn.threw), effects: effects_,
          tree: drawn.value || null,
        });
        takeEffects();
      }
    }
  }
}
function* traceFunction(f, plan, entry) {
  const { k } = entry;
  let args = argumentsFor(plan.shapes, k);
  // Some runs leave out parameters that have a default.
  if (k % 3 === 1) args = args.slice(0, plan.needed);
  const result = attempt(() => f(...args));
  yield;
  if (timers.length) { attempt(runTimers); yield; }
  entry.threw = !!result.threw;
  if (result.value instanceof Promise) {
    const end = settled.get(result.value);
    entry.threw = !end || end.kind === 'rejected';
  }
  entry.result = result.threw ? null : show(result.value);
  if (typeof result.value === 'function' && !wilds.has(result.value)) {
    entry.calls = [];
    for (let turn = 0; turn < 3; turn++) {
      const given = argumentsFor(plan.inner || [], turn === 2 ? k : k + turn);
      const called = attempt(() => result.value(...given));
      yield;
      if (timers.length) { attempt(runTimers); yield; }
      entry.calls.push(called.threw ? 'threw' : show(called.value));
    }
  }
  entry.args = args.map((a) => show(a));
  entry.effects = takeEffects();
}
function* traceClass(what, plan, entry) {
  const { k } = entry;
  entry.methods = {};
  const made = attempt(() => new what(...argumentsFor(plan.shapes, k)));
  entry.threw = !!made.threw;
  if (made.threw) return;
  for (const name of Object.keys(plan.methods)) {
    entry.methods[name] = [];
    for (let turn = 0; turn < 2; turn++) {
      const given = argumentsFor(plan.methods[name], k + turn);
      const done = attempt(() => made.value[name](...given));
      yield;
      entry.methods[name].push(done.threw ? 'threw'
        : done.value === made.value ? { $: 'this' } : show(done.value));
      now += 1500;
    }
  }
  entry.effects = takeEffects();
}

// The tasks left to do: a generator each, with the place to note a failure. A
// task that throws or runs out of time does not stop the others.
const tasks = [];
let task = null;
let report = {};
let timeouts = 0;
const tracers = {
  component: traceComponent, class: traceClass, function: traceFunction,
};
function planAll() {
  report = { literals, load: takeEffects(), plan: {} };
  request.names.forEach((name) => {
    const value = moduleObject.exports[name];
    const plan = { kind: kindOf(value, name), runs: 0, shapes: [] };
    report.plan[name] = plan;
    if (plan.kind === 'value') return;
    const begin = (what) => [() => {
      rich = plan.kind !== 'component';
      reset();
      return what();
    }, plan];
    tasks.push(begin(() => makePlan(value, name, plan)));
    for (let turn = 0; turn < 4; turn++) {
      tasks.push(begin(() => discover(value, plan, { k: turn % 2 })));
    }
    tasks.push(begin(() => unify(plan)));
  });
}
function traceAll() {
  const exported = moduleObject.exports;
  report = { load: takeEffects(), traces: {}, reads: {} };
  reads = report.reads;
  Object.keys(request.plan.plan).forEach((name) => {
    const plan = request.plan.plan[name];
    const mine = request.names[name] || name;
    if (!Object.prototype.hasOwnProperty.call(exported, mine)) return;
    const value = exported[mine];
    const trace = { kind: kindOf(value, mine), runs: [] };
    report.traces[name] = trace;
    if (plan.kind === 'value') trace.value = show(value);
    if (plan.kind === 'value' || typeof value !== 'function') return;
    const tracer = tracers[plan.kind];
    for (let k = 0; k < plan.runs; k++) {
      const entry = { k };
      trace.runs.push(entry);
      tasks.push([() => {
        rich = plan.kind !== 'component';
        big = rich ? -1 : plan.runs - 1;
        reset();
        return tracer(value, plan, entry);
      }, entry]);
    }
  });
}
const setUp = (text) => {
  request = parse(text);
  aliases = request.aliases || {};
  literals = request.plan ? request.plan.literals : request.literals;
};
let begun = false;
const step = () => {
  if (!begun) {
    begun = true;
    if (request.mode === 'plan') planAll(); else traceAll();
    return 'more';
  }
  if (!task) {
    if (!tasks.length) return 'done';
    const [begin, entry] = tasks.shift();
    task = { generator: begin(), entry };
  }
  try {
    if (task.generator.next().done) task = null;
  } catch (error) {
    task.entry.failed = true;
    task = null;
  }
  return 'more';
};
const stepFailed = () => {
  if (task) task.entry.failed = true;
  task = null;
  timeouts += 1;
  if (timeouts > 2) {
    tasks.splice(0).forEach(([, entry]) => { entry.failed = true; });
  }
  return 'more';
};

// The functions that the outside calls.
const blopCage = Object.freeze({
  setUp, step, stepFailed, report: () => stringify(report),
});
