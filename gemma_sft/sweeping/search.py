"""A search over a space by Optuna, which ends hopeless trials early.

A trial is a run with config.seed. Its value is config.eval.metric on the
validation split, as found in training, never on the test split. Trials are
proposed by the tree-structured Parzen estimator (Bergstra et al., NeurIPS
2011). From the sixth on, a trial ends when it is below the median of the
earlier ones after as many updates (Golovin et al., KDD 2017, median stopping
rule). All trials are kept in W/search.db, so the same command continues.
"""

import os
from typing import Any
from typing import Mapping
from typing import Sequence
import warnings

from gemma_sft import errors
from gemma_sft import progress
from gemma_sft.monitor import metrics
from gemma_sft.run import workdir as workdir_lib
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import page
from gemma_sft.sweeping import pictures
from gemma_sft.sweeping import processes
from gemma_sft.sweeping import results as results_lib
from gemma_sft.sweeping import runs
from gemma_sft.sweeping import source as source_lib
from gemma_sft.sweeping import wording

_STARTUP_TRIALS = 5
_EXAMPLE = ("for example --search='optimizer.learning_rate=1e-5..1e-3:log;"
            "lora.rank=4,8,16'")
# Attributes of the study: what is searched; numbers of interrupted trials,
# which later trials repeat.
_ABOUT, _REPEATED = 'about', 'repeated'


def parse_space(text: str, config: Any) -> dict[str, Any]:
  """Returns {'lora.rank': Optuna's distribution, ...}.

  `low..high` is a range, with `:log` on a logarithmic scale; values between
  commas are a choice.

  Raises:
    UserError: for an unknown key, or values of the wrong type.
  """
  optuna = _import_optuna()
  space = {}
  for key, rest in grid.split_factors(text).items():
    bounds, colon, scale = rest.partition(':')
    low, dots, high = bounds.partition('..')
    got = f'--search: {key}={rest}'
    if not dots:
      values = [grid.parse_value(key, part, config)
                for part in grid.split_outside(rest, ',')]
      if len(values) < 2:
        raise errors.UserError(
            got, 'a range or at least two values', _EXAMPLE)
      # Optuna stores numbers, texts and booleans, so a tuple becomes a text.
      space[key] = optuna.distributions.CategoricalDistribution(
          [source_lib.as_text(v) if isinstance(v, tuple) else v
           for v in values])
      continue
    if colon and scale != 'log':
      raise errors.UserError(got, 'low..high or low..high:log', _EXAMPLE)
    low, high = (grid.parse_value(key, part, config) for part in (low, high))
    kinds = {int: optuna.distributions.IntDistribution,
             float: optuna.distributions.FloatDistribution}
    if type(low) not in kinds or low >= high or colon and low <= 0:
      raise errors.UserError(
          got, 'numbers, the lower one first'
          + (', above 0 for a logarithmic scale' if colon else ''), _EXAMPLE)
    space[key] = kinds[type(low)](low, high, log=bool(colon))
  return space


def _import_optuna() -> Any:
  try:
    import optuna
  except ImportError as error:
    raise errors.UserError(
        '--search: Optuna is not installed', 'the extra search',
        "pip install 'gemma_sft[search]', or pip install optuna") from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna


def run(
    source: source_lib.SweepSource, config: Any, text: str, *, trials: int,
    workdir: str, slots: Sequence[processes.Environment], dry_run: bool) -> int:
  """Searches until there are `trials`, with those of earlier calls.

  Returns the exit status. A dry run prints the space and the trials so far.
  """
  if trials < 1:
    raise errors.UserError(
        f'--trials={trials}', 'at least 1', 'leave it out for 20')
  space = parse_space(text, config)
  _check_values(source, config, space)
  if dry_run:
    for key, distribution in space.items():
      print(f'{key}: {distribution}')
    rows = []
    if os.path.exists(_database(workdir)):
      rows = Search(source, config, space, workdir).rows()
    for row in rows:
      print(f'trial {row["number"]} | {row["state"]} |'
            f' {wording.show(config.eval.metric, row["value"])} |'
            f' {row["folder"]}')
    print(f'{len(rows)} of {trials} trials are done; dry run: nothing was'
          ' started')
    return 0
  search = Search(source, config, space, workdir)
  with workdir_lib.lock_workdir(workdir), processes.Stop() as stop:
    failed = search.run(trials, slots, stop)
    search.write(trials)
  print(f'trials: {os.path.join(workdir, "sweep.html")}')
  return stop.exit_status(failed > 0)


def _database(workdir):
  return os.path.join(os.path.abspath(workdir), 'search.db')


def _check_values(source, config, space):
  """Refuses a space with an invalid value before any run."""
  ends = {key: getattr(d, 'choices', None) or (d.low, d.high)
          for key, d in space.items()}
  for key, values in ends.items():
    for value in values:
      changes = {k: vs[0] for k, vs in ends.items()} | {key: value}
      grid.load_cell(source, _cell(changes, config))


def _cell(parameters, config):
  """Returns the cell of a trial; Optuna stores tuples as texts."""
  return grid.make_cell({
      key: grid.parse_value(key, value, config)
      if isinstance(value, str) else value
      for key, value in parameters.items()})


class Search:
  """The trials, in Optuna's storage: `study`."""

  def __init__(
      self, source: source_lib.SweepSource, config: Any,
      space: Mapping[str, Any], workdir: str):
    """Opens the storage; refuses one of another space, metric or mode."""
    optuna = _import_optuna()
    self._source, self._config, self._space = source, config, space
    self._workdir = workdir
    self.metric, mode = config.eval.metric, config.eval.mode
    self.lower = mode == 'min'
    self._planner = runs.Planner(source, workdir, 'none')
    runs.choose_split(config, 'none')
    os.makedirs(workdir, exist_ok=True)
    path = _database(workdir)
    self.study = optuna.create_study(
        storage=f'sqlite:///{path}', study_name='search', load_if_exists=True,
        direction='minimize' if self.lower else 'maximize')
    about = {'metric': self.metric, 'mode': mode,
             'space': {k: str(d) for k, d in space.items()}}
    seen = self.study.user_attrs.setdefault(_ABOUT, about)
    if seen != about:
      raise errors.UserError(
          f'{path} holds trials of {seen}', f'those of this search: {about}',
          'continue with the same --search, or choose another --workdir')
    self.study.set_user_attr(_ABOUT, about)
    with warnings.catch_warnings():
      # Optuna warns in each process that constant_liar is experimental.
      warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
      self.study.sampler = optuna.samplers.TPESampler(
          # Another seed each call; the same would propose the same trials.
          seed=config.seed + len(self.study.trials),
          n_startup_trials=_STARTUP_TRIALS, constant_liar=True)
    self.study.pruner = optuna.pruners.MedianPruner(
        n_startup_trials=_STARTUP_TRIALS)
    self._states = optuna.trial.TrialState

  def rows(self) -> list[dict[str, Any]]:
    """Returns number, state, parameters, value and folder of each trial."""
    rows, repeated = [], self.study.user_attrs.get(_REPEATED, [])
    for trial in self.study.get_trials(deepcopy=False):
      if trial.number in repeated or trial.state == self._states.WAITING:
        continue
      reported = trial.intermediate_values
      value = trial.value if trial.state.name == 'COMPLETE' else (
          reported[max(reported)] if reported else None)
      rows.append({
          'number': trial.number, 'state': trial.state.name.lower(),
          'parameters': dict(trial.params), 'value': value,
          'updates': max(reported, default=0),
          'seconds': trial.duration.total_seconds() if trial.duration else 0.0,
          'folder': trial.user_attrs.get('folder', ''),
          'message': trial.user_attrs.get('message', '')})
    return rows

  def run(
      self, trials: int, slots: Sequence[processes.Environment],
      stop: processes.Stop) -> int:
    """Runs trials up to this number; returns how many failed in this call."""
    for trial in self.study.get_trials(deepcopy=False):
      if trial.state == self._states.RUNNING:  # When the search was killed.
        self._requeue(trial)
    running, self._n_failed = {}, 0

    def start(environment):
      while not stop.signal and len(self.rows()) < trials:
        trial = self.study.ask(self._space)
        cell = _cell(trial.params, self._config)
        try:
          planned = self._planner.run(
              cell, grid.load_cell(self._source, cell), self._config.seed)
        except errors.UserError as error:
          self._fail(trial, error.got)
          continue
        trial.set_user_attr(
            'folder', os.path.relpath(planned.workdir, self._workdir))
        print(f'trial {trial.number} | {cell.name} | {planned.state()}',
              flush=True)
        process = processes.Process(planned, environment)
        running[process] = trial, set()
        return process
      return None

    def watch(process):
      self._report(process, *running[process])

    def on_end(process, outcome):
      watch(process)
      trial, _ = running.pop(process)
      if message := self._end(trial, process, outcome, stop):
        self._fail(trial, f'{message} ({process.log})')

    processes.run_all(slots, stop, start=start, on_end=on_end, watch=watch)
    return self._n_failed

  def _requeue(self, trial):
    """Queues the parameters of a trial again, which continues its run."""
    self.study.set_user_attr(_REPEATED, [
        *self.study.user_attrs.get(_REPEATED, []), trial.number])
    self.study.tell(trial.number, state=self._states.FAIL)
    self.study.enqueue_trial(trial.params)

  def _fail(self, trial, message):
    self._n_failed += 1
    trial.set_user_attr('message', message)
    self.study.tell(trial, state=self._states.FAIL)
    print(f'trial {trial.number} | failed: {message}', flush=True)

  def _report(self, process, trial, seen):
    """Reports new evaluations to Optuna, and prunes a hopeless run."""
    lines = metrics.read_jsonl(
        os.path.join(process.run.workdir, 'metrics.jsonl'))
    for step, value in results_lib.evaluations(lines, self.metric):
      # Evaluation 0 is of the untouched weights, the same for all trials.
      if step and step not in seen:
        seen.add(step)
        trial.report(value, step)
        if trial.should_prune():
          process.stop(f'pruned after {step} updates')

  def _end(self, trial, process, outcome, stop):
    """Tells Optuna how a trial ended; returns why it failed, or ''."""
    result = results_lib.read(process.run)
    text = outcome.message
    if result is not None and self.metric in result.scores:
      value = result.scores[self.metric]
      self.study.tell(trial, value)
      text = (f'{wording.label(self.metric)}'
              f' {wording.show(self.metric, value)} after'
              f' {progress.duration(outcome.seconds)}')
    elif outcome.message.startswith('pruned'):
      self.study.tell(trial, state=self._states.PRUNED)
    elif stop.signal:
      self._requeue(trial)
    else:
      return text or f'no {self.metric} among its scores'
    print(f'trial {trial.number} | {process.run.cell.name} | {text}',
          flush=True)
    return ''

  def write(self, trials: int) -> None:
    """Writes the page of the search, and prints its sentences."""
    rows = self.rows()
    done = [r for r in rows if r['state'] == 'complete']
    best = (min if self.lower else max)(
        done, key=lambda r: r['value'], default=None)
    sentences = ['No trial is complete.'] if best is None else [
        f'The best of {len(done)} complete trials is number {best["number"]},'
        + ''.join(f' {k}={grid.show_value(v)}'
                  for k, v in best['parameters'].items())
        + f', with {wording.label(self.metric)}'
        f' {wording.show(self.metric, best["value"])} on the validation split.',
        'As the best of several it is too optimistic, and it is from one seed:'
        ' compare it with your present setting by --grid and --seeds=3.']
    ranked = sorted(rows, key=lambda r: (
        r['state'] != 'complete',
        (1 if self.lower else -1) * (r['value'] or 0)))
    table = page.Block(
        'Trials', ['trial', 'state', wording.label(self.metric), *self._space,
                   'updates', 'time', 'folder', ''],
        [[str(r['number']), r['state'], wording.show(self.metric, r['value']),
          *(grid.show_value(r['parameters'].get(k, '-')) for k in self._space),
          str(r['updates']), progress.duration(r['seconds']), r['folder'],
          r['message']] for r in ranked],
        marks={0: 'best'} if best else {},
        note='Pruned: ended early because it was below the median of earlier'
        ' trials after as many updates; its value is from its last evaluation.')
    values = page.Block('Values', pictures=[
        *pictures.trials(rows, self.metric, self.lower),
        *pictures.factors([(r['parameters'], r['value']) for r in done],
                          list(self._space), self.metric)])
    page.write_files(
        self._workdir,
        subtitle=f'{self._source.path}: search, {len(rows)} of {trials} trials,'
        ' scored on the validation split', blocks=[table, values],
        summary={'sentences': sentences, 'metric': self.metric,
                 'lower_is_better': self.lower, 'trials': rows, 'best': best,
                 'complete': len(rows) >= trials})
