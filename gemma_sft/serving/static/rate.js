import {askJson, byId, make, showError} from './common.js';

const SIDES = ['first', 'second'];
const NAME = 'gemma_sft rater';

let rater = '';
let pair = null;
let criteria = [];
let marks = {first: {}, second: {}};
let armed = null;  // The [side, criterion] that the next digit marks.
let busy = false;

function begin() {
  rater = localStorage.getItem(NAME) || '';
  byId('sign-in').hidden = Boolean(rater);
  if (rater) load(() => askJson(`api/next?rater=${encodeURIComponent(rater)}`));
  else {
    for (const id of ['task', 'end', 'progress', 'who']) byId(id).hidden = true;
    byId('name').focus();
  }
}

// One request at a time, so that a key hit twice is one choice.
async function load(request) {
  if (busy) return;
  busy = true;
  try {
    show(await request());
    showError(null);
  } catch (error) {
    showError(error);
    if (!pair) byId('sign-in').hidden = false;
  } finally {
    busy = false;
  }
}

function show(state) {
  pair = state.pair;
  criteria = state.criteria;
  byId('sign-in').hidden = true;
  byId('who').hidden = byId('progress').hidden = false;
  byId('who').textContent = `${rater} (change)`;
  byId('progress-bar').value = state.total ? state.done / state.total : 1;
  byId('progress-text').textContent = `${state.done} of ${state.total}`;
  byId('task').hidden = !pair;
  byId('end').hidden = Boolean(pair);
  byId('undo').disabled = byId('undo-last').disabled = !state.done;
  if (!pair) return;
  byId('prompt').textContent = pair.prompt;
  const before = pair.before || {first: {}, second: {}};
  marks = {first: {...before.first}, second: {...before.second}};
  for (const side of SIDES) {
    byId(side).querySelector('.text').textContent = pair[side].trim();
  }
  for (const button of byId('task').querySelectorAll('[data-choice]')) {
    button.classList.toggle('before', button.dataset.choice === before.choice);
  }
  armed = null;
  showMarks();
  scrollTo({top: 0});
}

function showMarks() {
  for (const side of SIDES) {
    byId(side).querySelector('.marks').replaceChildren(
        ...criteria.map((criterion) => make(
            'div', {
              class: 'mark' + (armed && armed[0] === side &&
                               armed[1] === criterion ? ' armed' : ''),
              role: 'group', 'aria-label': criterion,
            },
            make('span', {}, criterion),
            make('div', {class: 'scale'}, ...[1, 2, 3, 4, 5].map(
                (mark) => make('button', {
                  type: 'button',
                  'aria-pressed': String(marks[side][criterion] === mark),
                  'aria-label': `${criterion} ${mark}`,
                  onclick: () => setMark(side, criterion, mark),
                }, String(mark)))))));
  }
}

// Choosing the same mark again removes it.
function setMark(side, criterion, mark) {
  if (marks[side][criterion] === mark) delete marks[side][criterion];
  else marks[side][criterion] = mark;
  armed = null;
  showMarks();
}

const vote = (choice) => pair && load(() => askJson('api/rate', {
  rater, item: pair.item, choice, first: marks.first, second: marks.second,
}));

const undo = () => rater && load(() => askJson('api/undo', {rater}));

byId('sign-in').addEventListener('submit', (event) => {
  event.preventDefault();
  rater = byId('name').value.trim().replace(/\s+/g, ' ');
  load(async () => {
    const state = await askJson(`api/next?rater=${encodeURIComponent(rater)}`);
    localStorage.setItem(NAME, rater);
    return state;
  });
});

byId('who').addEventListener('click', () => {
  localStorage.removeItem(NAME);
  pair = null;
  byId('name').value = rater;
  begin();
});

for (const button of byId('task').querySelectorAll('[data-choice]')) {
  button.addEventListener('click', () => vote(button.dataset.choice));
}
byId('undo').addEventListener('click', undo);
byId('undo-last').addEventListener('click', undo);

addEventListener('keydown', (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey ||
      event.target.tagName === 'INPUT' || !rater) return;
  const key = event.key;
  if (key.toLowerCase() === 'u' || key === 'Backspace') {
    event.preventDefault();
    undo();
    return;
  }
  if (!pair) return;
  if (armed && '12345'.includes(key)) {
    setMark(...armed, Number(key));
    return;
  }
  const choice = {
    1: 'first', ArrowLeft: 'first', 2: 'second', ArrowRight: 'second',
    0: 'tie',
  }[key];
  const criterion = key.length === 1 &&
      criteria.find((name) => name[0] === key.toLowerCase());
  if (criterion) {
    armed = [key === key.toLowerCase() ? 'first' : 'second', criterion];
    showMarks();
  } else if (key === 'Escape') {
    armed = null;
    showMarks();
  } else if (choice) {
    event.preventDefault();
    vote(choice);
  }
});

begin();
