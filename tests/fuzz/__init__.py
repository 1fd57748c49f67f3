"""Drills with bad input: the result must be an answer or a `UserError`.

    python tests/fuzz/run.py --cases=100000

A target of `targets` is a module with

  STRATEGY              a strategy of hypothesis that makes cases
  seeds()               good cases, to start from
  check(case, folder)   tries a case; may write into the folder

and a row in `targets.DRILLS`.
A case is bytes. `check` returns if the project gave a good result or a
`UserError` that names the place. It raises `Loss` if a part of the input was
silently lost or changed. Any other exception is a crash.
"""
