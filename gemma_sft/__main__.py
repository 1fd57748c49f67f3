"""Lists the commands, and runs one: `gemma-sft train --config=...`."""

import runpy
import sys

from gemma_sft import errors

_COMMANDS = {
    'train': 'fine-tune a Gemma',
    'evaluate': 'score a run, or the untouched base, on held-out data',
    'sample': 'talk to a run',
    'preview': 'show what is trained of each example',
    'curate': 'clean and split a raw collection of text',
    'export': 'write a run as safetensors or GGUF, and prove each file',
    'serve': 'rate answers, or try a run, in a browser',
    'sweep': 'train a grid of configs, or search one',
    'compare': 'compare finished runs on one page',
    'plan': 'predict whether a run fits, and how long it takes',
}


def main() -> None:
  """Runs the command that the first argument names."""
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in _COMMANDS:
    # As `python -m gemma_sft.NAME` does it: the module sees itself as the
    # program, and its own arguments.
    del sys.argv[1]
    runpy.run_module(f'gemma_sft.{name}', run_name='__main__', alter_sys=True)
    return
  if name in ('--help', '-h', 'help'):
    print('Fine-tune Gemma on a domain of your own.\n')
    for command, purpose in _COMMANDS.items():
      print(f'  gemma-sft {command:10}{purpose}')
    print('\ngemma-sft COMMAND --help lists the flags of one.')
    return
  error = errors.UserError(
      f'no command {name!r}', f'one of {", ".join(_COMMANDS)}',
      errors.nearest(name, list(_COMMANDS)).strip() or 'gemma-sft lists them')
  sys.stderr.write(f'error: {error}\n')
  sys.exit(2)


if __name__ == '__main__':
  main()
