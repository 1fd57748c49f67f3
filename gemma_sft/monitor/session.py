"""The surroundings of a run: checks, other hosts, the lock of the workdir."""

import contextlib
from typing import Any
from typing import Iterator

from gemma_sft import config as config_lib
from gemma_sft.monitor import out_of_memory
from gemma_sft.monitor import tracking
from gemma_sft.run import hosts
from gemma_sft.run import workdir as workdir_lib


@contextlib.contextmanager
def entered(config: Any, workdir: str) -> Iterator[None]:
  """Validates a config, joins the other hosts and locks the workdir.

  Raises `UserError` for a mistake in the config, a missing login, hosts that do
  not join, a workdir in use or, from inside, a device that is out of memory.
  """
  config_lib.validate(config)
  tracking.check(config.track.wandb)
  with (hosts.joined(), workdir_lib.lock_workdir(workdir),
        out_of_memory.explained(config)):
    yield
