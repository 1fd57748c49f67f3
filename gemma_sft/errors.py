"""The exception for mistakes that a user can correct."""


class UserError(ValueError):
  """A mistake in the config, the data or the environment.

  `cli.run` prints the message without a traceback and exits with status 2, so
  the message has to be enough to correct the mistake: `got` says what was found
  and where (file and line, or config key), `expected` what is valid there, and
  `fix` what to type or change.
  """

  def __init__(self, got: str, expected: str, fix: str):
    super().__init__(f'{got}\n  expected: {expected}\n  fix: {fix}')
    self.got, self.expected, self.fix = got, expected, fix


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
  """Returns 'Did you mean ...? ' for the closest known name, or ''."""
  import difflib  # Only error messages need it.

  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'Did you mean {close[0]!r}? ' if close else ''
