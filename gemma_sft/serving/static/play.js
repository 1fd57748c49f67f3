import {ask, askJson, byId, make, showError} from './common.js';

const NUMBERS = ['temperature', 'top_p', 'top_k', 'repetition_penalty',
                 'max_new_tokens', 'seed'];
const WAYS = {
  zero: () => 'none',
  few: (n) => `${n}, the same for every question (few-shot)`,
  rag: (n) => `${n}, the nearest to the question (retrieval)`,
};

let setup = null;
let running = null;  // The AbortController of the answers being generated.
let result = null;   // The form's last result, for saving.
let turns = [];      // The chat's turns: {said, answers}.

const label = (name) =>
  (name[0].toUpperCase() + name.slice(1)).replaceAll('_', ' ');

function draw() {
  byId('task-name').textContent = setup.task;
  byId('fields').replaceChildren(...setup.fields.map((field) => {
    const input = field.choices.length ?
        make('select', {}, make('option', {value: ''}, '(any)'),
             ...field.choices.map((c) => make('option', {value: c}, c))) :
        make('textarea', {rows: field.required ? 3 : 1});
    input.name = input.id = `field-${field.name}`;
    if (field.required) {
      input.required = true;
      if (field.choices.length) input.firstChild.remove();
    }
    return make('label', {class: 'field'}, make('span', {}, label(field.name) +
        (field.required || setup.fields.length === 1 ? '' : ' (optional)')),
      input);
  }));
  byId('sample').hidden = !setup.samples.length;
  byId('examples').replaceChildren(...setup.examples.map((way) => {
    const [kind, n] = way.split(':');
    return make('option', {value: way}, WAYS[kind](n));
  }));
  for (const name of NUMBERS) byId(name).value = setup.sampling[name];
  byId('stop-texts').value = setup.sampling.stop.join('\n');
  byId('models').replaceChildren(...setup.models.map((model) => make(
      'label', {class: 'check'},
      make('input', {type: 'checkbox', value: model.name, checked: true}),
      make('span', {}, model.name, make('small', {}, model.description)))));
  select('form');
}

function select(page) {
  for (const name of ['form', 'chat']) {
    byId(`tab-${name}`).setAttribute('aria-selected', String(name === page));
    byId(`${name}-page`).hidden = name !== page;
  }
  byId('layout').classList.toggle('chat', page === 'chat');
  byId('system-field').hidden = page !== 'chat';
  byId('answers').hidden = page !== 'form';
  byId('transcript').hidden = page !== 'chat';
  refresh();
}

const isChat = () => !byId('chat-page').hidden;

function refresh() {
  const busy = Boolean(running);
  for (const stop of document.querySelectorAll('.stop')) stop.hidden = !busy;
  for (const id of ['generate', 'send', 'new', 'sample', 'tab-form',
                    'tab-chat']) byId(id).disabled = busy;
  const shown = isChat() ? turns.length : result;
  byId('save').hidden = busy || !shown;
  byId('hint').hidden = Boolean(busy || shown);
  byId('hint').textContent = isChat() ?
      'Write a message. Each model continues its own conversation.' :
      'Fill in the form: the answers appear here, side by side.';
}

function sampling() {
  const values = {stop: byId('stop-texts').value.split('\n').filter(Boolean)};
  for (const name of NUMBERS) {
    const value = byId(name).valueAsNumber;
    if (Number.isNaN(value)) {
      byId('parameters').open = true;
      throw new Error(`${label(name)} is not a number.`);
    }
    values[name] = value;
  }
  return values;
}

function chosenModels() {
  const boxes = [...byId('models').querySelectorAll('input:checked')];
  if (!boxes.length) throw new Error('Choose a model.');
  return boxes.map((box) => setup.models.find((m) => m.name === box.value));
}

// Asks the models one after the other and shows each answer in a card of
// `place`. A refused question leaves no cards.
async function answerAll(place, questionOf, examples, settings, models) {
  const cards = models.map((model) => card(model));
  place.append(make('div', {class: 'columns'}, ...cards.map((c) => c.root)));
  if (matchMedia('(max-width: 899px)').matches) {
    place.lastChild.scrollIntoView({behavior: 'smooth', block: 'start'});
  }
  running = new AbortController();
  refresh();
  const answers = [];
  for (const [i, model] of models.entries()) {
    if (running.signal.aborted) {
      cards[i].finish('stopped');
      continue;
    }
    try {
      const answer = await stream(cards[i], {
        model: model.name, ...questionOf(model), examples, sampling: settings,
      });
      answers.push({model: model.name, weights: model.description, ...answer});
    } catch (error) {
      place.lastChild.remove();
      throw error;
    }
  }
  return answers;
}

function card(model) {
  const text = make('div', {class: 'text', dir: 'auto'});
  const foot = make('p', {class: 'foot'}, 'waiting');
  const asked = make('div');
  const root = make('article', {class: 'card answer', 'data-model': model.name},
                    make('h2', {}, model.name), text, foot, asked);
  return {
    root, text, foot, asked,
    finish(...what) {
      root.classList.remove('running');
      foot.replaceChildren(...what);
    },
  };
}

async function stream(card, question) {
  const answer = {text: '', verdict: {}, stopped: false};
  let response = null;
  try {
    response = await ask('api/answer', question, running.signal);
    for await (const event of lines(response)) {
      if (event.prompt) {
        answer.prompt = event.prompt;
        card.asked.replaceChildren(asked(event.prompt));
      } else if (event.started) {
        card.root.classList.add('running');
        card.foot.textContent = 'reading the prompt';
      } else if (event.text !== undefined) {
        answer.text += event.text;
        card.text.textContent = answer.text;
        card.foot.textContent = 'writing';
      } else if (event.answer !== undefined) {
        answer.text = event.answer;
        answer.seconds = event.seconds;
        card.text.textContent = answer.text.trim() || '(an empty answer)';
        card.finish('judging');
      } else if (event.verdict) {
        Object.assign(answer, event);
      } else if (event.error) {
        throw new Error(event.error);
      }
    }
    if (answer.seconds === undefined) throw new Error('The answer broke off.');
    card.finish(...chips(answer));
  } catch (error) {
    answer.stopped = error.name === 'AbortError';
    if (!response && !answer.stopped) throw error;
    if (!answer.stopped) answer.error = error.message;
    card.finish(answer.stopped ? 'stopped' :
        make('span', {class: 'failed'}, error.message));
  }
  return answer;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split('\n');
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

// The exact prompt that the model read.
function asked(prompt) {
  return make('details', {class: 'asked'}, make('summary', {}, 'Prompt'),
              ...prompt.flatMap((message) => [
                make('p', {class: 'who'}, message.role),
                make('div', {class: 'text', dir: 'auto'}, message.content)]));
}

function chips(answer) {
  const all = Object.entries(answer.verdict).map(([name, value]) => {
    const shown = value === true ? 'yes' : value === false ? 'no' :
        typeof value === 'number' && !Number.isInteger(value) ?
        value.toFixed(3) : String(value);
    const lower = setup.lower_is_better.includes(name);
    const kind = typeof value !== 'boolean' ? '' :
        value !== lower ? ' yes' : ' no';
    return make('span', {class: `chip${kind}`},
                `${name.replaceAll('_', ' ')}: ${shown}`);
  });
  if (answer.note) all.push(make('span', {}, answer.note));
  return [...all, make('span', {}, `${answer.seconds.toFixed(1)} s`)];
}

// Shows the error of whatever fails, and clears the previous one.
async function guarded(work) {
  showError(null);
  try {
    await work();
  } catch (error) {
    showError(error);
  } finally {
    running = null;
    refresh();
  }
}

const now = () => new Date().toISOString();

byId('form-page').addEventListener('submit', (event) => {
  event.preventDefault();
  if (running) return;
  guarded(async () => {
    const fields = {};
    for (const {name} of setup.fields) {
      const value = byId(`field-${name}`).value.trim();
      if (value) fields[name] = value;
    }
    const [settings, models] = [sampling(), chosenModels()];
    const examples = byId('examples').value;
    byId('answers').replaceChildren();
    result = null;
    const answers = await answerAll(
        byId('answers'), () => ({fields}), examples, settings, models);
    result = {time: now(), task: setup.task, fields, examples,
              sampling: settings, answers};
  });
});

function send() {
  if (running) return;
  guarded(async () => {
    const said = byId('message').value.trim();
    if (!said) throw new Error('The message is empty.');
    const system = byId('system').value.trim();
    const [settings, models] = [sampling(), chosenModels()];
    const place = make('div', {class: 'stack'},
                       make('div', {class: 'said text', dir: 'auto'}, said));
    byId('transcript').append(place);
    const turn = {time: now(), said, answers: []};
    const before = [...turns];
    turns.push(turn);
    byId('message').value = '';
    try {
      turn.answers = await answerAll(place, (model) => ({messages: [
        ...(system ? [{role: 'system', content: system}] : []),
        ...history(before, model.name), {role: 'user', content: said},
      ]}), byId('examples').value, settings, models);
    } catch (error) {
      turns.pop();
      place.remove();
      byId('message').value = said;
      throw error;
    }
  });
}

// A model's own conversation, without the turns that it has not answered.
const history = (before, model) => before.flatMap((turn) => {
  const answer = turn.answers.find((a) => a.model === model);
  return answer && answer.text.trim() && !answer.error ? [
    {role: 'user', content: turn.said},
    {role: 'model', content: answer.text.trim()}] : [];
});

byId('chat-page').addEventListener('submit', (event) => {
  event.preventDefault();
  send();
});
byId('message').addEventListener('keydown', (event) => {
  // While an input method composes, Enter belongs to it.
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId('fields').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    byId('form-page').requestSubmit();
  }
});
byId('new').addEventListener('click', () => {
  turns = [];
  byId('transcript').replaceChildren();
  refresh();
});
byId('tab-form').addEventListener('click', () => select('form'));
byId('tab-chat').addEventListener('click', () => select('chat'));
byId('sample').addEventListener('click', () => {
  const sample = setup.samples.shift();
  setup.samples.push(sample);
  for (const {name} of setup.fields) {
    byId(`field-${name}`).value = sample[name] || '';
  }
});
for (const stop of document.querySelectorAll('.stop')) {
  stop.addEventListener('click', () => running && running.abort());
}

// Saving ----------------------------------------------------------------------

const saved = () => isChat() ?
    {time: now(), task: setup.task, system: byId('system').value.trim(),
     sampling: sampling(), turns} : result;

function asText(data) {
  const parts = [`${data.task}, ${data.time}`];
  const add = (answers) => {
    for (const answer of answers) {
      parts.push(`## ${answer.model} (${answer.weights})`, answer.text.trim());
      const verdict = Object.entries(answer.verdict);
      if (verdict.length) {
        parts.push(verdict.map(([k, v]) => `${k}: ${v}`).join('\n'));
      }
    }
  };
  if (data.turns) {
    if (data.system) parts.push('# system', data.system);
    for (const turn of data.turns) {
      parts.push('# user', turn.said);
      add(turn.answers);
    }
  } else {
    parts.push(Object.entries(data.fields).map(
        ([k, v]) => `${k}: ${v}`).join('\n'));
    add(data.answers);
  }
  return parts.join('\n\n') + '\n';
}

function download(text, type, ending) {
  const url = URL.createObjectURL(new Blob([text], {type}));
  const stamp = now().replace(/\..*/, '').replace(/[-:]/g, '').replace('T', '-');
  make('a', {href: url, download: `${setup.task}-${stamp}.${ending}`}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

byId('save-json').addEventListener('click', () => guarded(() => download(
    JSON.stringify(saved(), null, 1) + '\n', 'application/json', 'json')));
byId('save-txt').addEventListener('click', () => guarded(() => download(
    asText(saved()), 'text/plain;charset=utf-8', 'txt')));

askJson('api/setup').then((answer) => {
  setup = answer;
  draw();
}).catch(showError);
