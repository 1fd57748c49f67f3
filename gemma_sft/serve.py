"""Serves a page where people rate answers, or a playground for a run.

    python -m gemma_sft.serve --mode=rate --runs=workdirs/a,workdirs/b
    python -m gemma_sft.serve --mode=rate --runs=workdirs/a,workdirs/a:base
    python -m gemma_sft.serve --mode=rate --runs=... --report
    python -m gemma_sft.serve --mode=play --workdir=workdirs/a

rate shows the answers of two evaluations (by `gemma_sft.evaluate`) in pairs, in
random order and without names. W is the tuned result of a workdir, W:base and
W:few:4 are others. Ratings are stored in ratings.sqlite of the first workdir,
or in --out. --report prints the result, which is also on the page /results.

play answers a form and a chat with the tuned model and its base side by side.

Only this machine can open the pages. --host=0.0.0.0 serves all networks, for
those who know the address with its token. The connection is not encrypted: on
a network that others can read, leave --host out and forward the port with
ssh -L.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.serve', cli.CONFIG, cli.WORKDIR, cli.BASE, cli.STEP,
      cli.split('test'),
      cli.choice(
          'mode', None, ['rate', 'play'], 'rate: people compare the answers of'
          ' --runs; play: a playground for the run of --workdir.'),
      cli.words(
          'runs', [], 'Two results to compare, separated by a comma: workdirs,'
          ' W:base for the untouched model of W.'),
      cli.switch(
          'report', False, 'Print what people said of --runs, and stop.'),
      cli.text('out', None, 'File of the ratings.'),
      cli.text(
          'host', '127.0.0.1', 'Address to serve on. Any other than this'
          " machine's own needs the token in the address that is printed."),
      cli.integer('port', 8000, 'Port to serve on; 0 takes any that is free.'))

import contextlib
import os
import socket
from typing import Any
from typing import Iterator
from typing import Sequence

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.serving import ratings


def main(
    mode: str | None, runs: Sequence[str], split: str, report: bool,
    out: str | None, config: Any, workdir: str, base: bool, step: int,
    host: str, port: int) -> int:
  """Serves until interrupted; see the module's docstring."""
  cli.require('mode', mode, '--mode=rate or --mode=play')
  if mode == 'play':
    if runs or report or out:
      raise errors.UserError(
          '--runs, --report or --out with --mode=play',
          'flags of --mode=rate', 'leave them out; --workdir names the run')
    return _play(config, workdir, base, step, host, port)
  if len(runs) != 2 or runs[0] == runs[1]:
    raise errors.UserError(
        f'--runs={",".join(runs)}', 'two results to compare',
        '--runs=workdirs/a,workdirs/b or --runs=workdirs/a,workdirs/a:base')
  return _rate((runs[0], runs[1]), split, report, out, host, port)


def _rate(runs, split, report, out, host, port) -> int:
  from gemma_sft.serving import pairs as pairs_lib
  from gemma_sft.serving import rating_page

  pairs = pairs_lib.read(runs, split)
  path = out or os.path.join(pairs_lib.parse_run(runs[0])[0], 'ratings.sqlite')
  if report and not os.path.exists(path):
    raise errors.UserError(
        f'no ratings in {path}', 'a file with ratings',
        'leave out --report, and rate')
  store = ratings.Store(path)
  if report:
    summary = ratings.summarise(store.ratings(), [p.item for p in pairs])
    print(ratings.report(summary, pairs_lib.labels(runs)))
    return 0
  with listen(host, port) as (sock, url, token):
    print(f'{url}\n{len(pairs)} pairs of {split}; ratings go to {path}; results'
          ' are on the page /results; Ctrl-C stops', flush=True)
    _serve(sock, rating_page.make_app(pairs, runs, store, token=token))
  return 0


def _play(config, workdir, base, step, host, port) -> int:
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  if config is None:
    config = cli.load_run_config(workdir)
  config_lib.validate(config)
  with listen(host, port) as (sock, url, token):
    print(f'{url}\nloading; the page opens once the weights are loaded; Ctrl-C'
          ' stops', flush=True)
    # Imported late: they take seconds, and a port in use is reported first.
    from gemma_sft import sample
    from gemma_sft.serving import playground

    served = playground.load_models(config, workdir, base_only=base, step=step)
    for name, model in served.items():
      print(f'{name}: {model.description}', flush=True)
    page = playground.Playground(
        served, _records(config.data, 'train'),
        _records(config.data, 'test') or _records(config.data, 'validation'))
    _serve(sock, playground.make_app(page, sample.answer, token=token))
  return 0


def _records(section, split):
  """Returns a split's records; none if its file is missing."""
  from gemma_sft.inputs import splits

  try:
    return splits.read_split(section, split) if section[split] else []
  except errors.UserError as error:
    print(f'without the {split} split: {error.got}', flush=True)
    return []


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[tuple[socket.socket, str, str]]:
  """Yields (listening socket, address for a browser, token or '').

  From now on a browser waits for the page instead of being refused. Raises
  `UserError` if the address is not available.
  """
  from gemma_sft.serving import guard

  if not 0 <= port < 2**16:  # The system would use the last 16 bits.
    raise errors.UserError(
        f'--port={port}', 'a port from 0 to 65535', 'choose another')
  try:
    family, *_, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.create_server(
        address, family=family, backlog=64, dualstack_ipv6=(
            family == socket.AF_INET6 and socket.has_dualstack_ipv6()))
  except OSError as error:
    raise errors.UserError(
        f'--host={host} --port={port}: {error}',
        'an address of this machine and a free port',
        'choose another --port; 0 takes any') from None
  with sock:
    bound, port = sock.getsockname()[:2]
    token = '' if guard.is_loopback(bound) else guard.make_token()
    name = _name_for_others(bound) if token else host
    name = f'[{name}]' if ':' in name else name
    query = f'?token={token}' if token else ''
    yield sock, f'http://{name}:{port}/{query}', token


def _name_for_others(address: str) -> str:
  """Returns the address by which other machines reach a bound address."""
  # Only compared with, not bound to.
  if address not in ('0.0.0.0', '::'):  # nosec B104
    return address
  # Finds the interface of the default route, without sending anything, by an
  # address that is reserved for documentation (RFC 5737).
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(('192.0.2.1', 9))
      return probe.getsockname()[0]
    except OSError:
      return socket.gethostname()


def _serve(sock: socket.socket, app: Any) -> None:
  """Runs a server until Ctrl-C."""
  import uvicorn

  server = uvicorn.Server(uvicorn.Config(
      app, log_level='warning', access_log=False, server_header=False,
      limit_concurrency=64, timeout_graceful_shutdown=2))
  try:
    server.run(sockets=[sock])
  except KeyboardInterrupt:  # The server raises it once it has ended.
    pass
  print('stopped', flush=True)
