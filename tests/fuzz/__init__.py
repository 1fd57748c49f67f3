"""Drills with bad input: what comes of it is an answer or a `UserError`.

    python tests/fuzz/run.py --cases=100000

A target of `targets` is a module with

  SHARE       of a drill's cases
  GUIDED      whether new cases follow the coverage that old ones had; else the
              property-based strategy makes all of them (what is tried runs in
              another process, or another language)
  AS_JSON     whether a case is a JSON document, changed as a tree
  INCLUDE     instrumented packages
  STRATEGY    of hypothesis, makes cases
  seeds()     good cases, to begin with
  check(case, folder)   tries one; may write into the folder

A case is bytes. `check` returns where the project has kept its word: with a
good result or a `UserError` that says where. It raises `Loss` where something
of the input is gone or changed without a word; what else it raises is a crash.
"""
