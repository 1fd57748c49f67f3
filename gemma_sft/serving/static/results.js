import {askJson, byId, make, percent, showError} from './common.js';

const number = (value) => value === null ? '–' : value.toFixed(2);
const signed = (value) => (value < 0 ? '−' : '+') + Math.abs(value).toFixed(2);

const row = (tag, ...cells) => make('tr', {}, ...cells.map(
    (cell, i) => make(i && tag === 'td' ? 'td' : 'th', {}, cell)));

function show(all) {
  const [a, b] = all.runs;
  byId('win').hidden = all.win_rate === null;
  if (all.win_rate !== null) {
    const [low, high] = all.win_interval;
    byId('rate').textContent = percent(all.win_rate, 1);
    byId('claim').textContent = `win rate of ${a} over ${b}`;
    byId('range').style.left = percent(low).replace(' ', '');
    byId('range').style.width = percent(high - low).replace(' ', '');
    byId('point').style.left = percent(all.win_rate, 2).replace(' ', '');
    byId('end-b').textContent = `← ${b}`;
    byId('end-a').textContent = `${a} →`;
    byId('basis').textContent =
        `95 % interval ${percent(low)} to ${percent(high)} (Wilson); a tie ` +
        `counts half; ${all.n_rated} of ${all.n_items} pairs rated, each ` +
        'counted once with the mean of its ratings. ' + verdict(all);
  }
  byId('counts').replaceChildren(
      row('td', `${a} is better`, String(all.counts.a)),
      row('td', 'tie', String(all.counts.tie)),
      row('td', `${b} is better`, String(all.counts.b)));
  byId('marks-card').hidden = !all.marks.length;
  byId('marks').replaceChildren(
      make('thead', {}, row('th', '', a, b, 'difference', '95 %', 'pairs',
                            'alpha')),
      ...all.marks.map((m) => row(
          'td', m.criterion, m.a.toFixed(2), m.b.toFixed(2), signed(m.gain),
          m.gain_interval.map(signed).join(' to '), String(m.n),
          number(m.alpha))));
  byId('agreement').textContent = all.agreement === null ?
      'No pair has been rated by two people yet.' :
      `${percent(all.agreement, 1)} of choices are the same; Krippendorff's ` +
      `alpha (ordinal) ${number(all.alpha)}: 1 is full agreement, 0 is chance.`;
  byId('place').textContent = all.shown_first === null ? '' :
      `The answer shown first was chosen in ${percent(all.shown_first)} of ` +
      'the ratings without a tie. Far from 50 %, the position influences raters.';
  const raters = Object.entries(all.raters);
  byId('raters').replaceChildren(...raters.map(
      ([name, n]) => row('td', name, `${n} of ${all.n_items}`)));
  if (!raters.length) byId('raters').append(row('td', 'Nobody yet.', ''));
}

function verdict(all) {
  const [low, high] = all.win_interval;
  if (low > .5) return `${all.runs[0]} is better.`;
  if (high < .5) return `${all.runs[1]} is better.`;
  return 'The ratings show no clear difference.';
}

askJson('api/results').then(show).catch(showError);
