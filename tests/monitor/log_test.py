"""A step that compiles twice, or waits for the host, stops the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft.monitor import meter


def test_a_second_compilation_of_a_shape_is_an_error():
  step = jax.jit(lambda x: x + 1)
  programs = meter.Programs(step)
  narrow, wide = jnp.ones(3), jnp.ones(4)
  for array in (narrow, wide, narrow, wide):  # A program for each shape.
    with programs.watched(array.shape):
      step(array)
  other = narrow.astype(jnp.int32)  # The same shape, another program.
  with pytest.raises(RuntimeError, match='compiled a second time'):
    with programs.watched(other.shape):
      step(other)
  # So is an array from the host.
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    with programs.watched(3):
      step(np.ones(3))
