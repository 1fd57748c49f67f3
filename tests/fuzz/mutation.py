"""Mutates good cases: JSON documents as trees, others as bytes."""

import json
import random
import struct
from typing import Any
from typing import Callable

from hypothesis import strategies as st

_NUMBERS = (0, 1, 2, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1,
            2**32, 2**40, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES = (
    None, True, False, 0, -1, 1, 3, 8, 2**31, 2**63, -2**63, 10**40, 0.5, 1e308,
    float('nan'), float('inf'), '', ' ', 'a', '\n', '0', '\u2581', '\x00',
    '\ud800', '\udcff', 'é', '漢字', '👩‍👩‍👧', '\u202e', '<end_of_turn>',
    '<start_of_turn>model\n', '<bos>', '<|turn>', '<unused7>', '../../etc',
    '<script>alert(1)</script>', "'; DROP TABLE ratings; --", 'x' * 5000,
    [], {}, [[]], {'a': 1})


def mutate(case: bytes, max_size: int, seed: int) -> bytes:
  """Returns a mutated JSON document, or the bytes if they are not JSON."""
  rng = random.Random(seed)
  try:
    tree = json.loads(case)
  except ValueError:
    return case[:max_size]
  for _ in range(rng.randint(1, 3)):
    tree = _changed(tree, rng)
  text = json.dumps(tree).encode()
  return text if len(text) <= max_size else case[:max_size]


def mutate_bytes(case: bytes, max_size: int, seed: int) -> bytes:
  """Returns mutated bytes; in a guided drill libFuzzer does it better."""
  rng = random.Random(seed)
  data = bytearray(case)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(min(len(data), rng.choice((100, 1 << 20))) + 1)
    n, number = rng.randint(1, 20), rng.choice(_NUMBERS)
    replaced, new = rng.choice((
        (1, bytes([rng.randrange(256)])), (n, b''), (0, data[at:at + n]),
        (8, struct.pack('<Q', number)), (4, struct.pack('<I', number % 2**32)),
        (4, struct.pack('>I', number % 2**32)),
        (0, rng.choice((b'"', b'\0', b'\r', b'{', b'\xff', b',', b'\n'))),
        (len(data), b'')))
    data[at:at + replaced] = new
  return bytes(data[:max_size])


def strategy(cases: Callable[[], list[bytes]], change=mutate_bytes):
  """Returns a strategy of mutated copies of cases."""
  return st.builds(
      lambda case, seed: change(case, 1 << 16, seed),
      st.deferred(lambda: st.sampled_from(cases())), st.integers(0, 2**32))


def _changed(node: Any, rng: random.Random, depth: int = 0) -> Any:
  """Returns a node with one change somewhere in it."""
  if isinstance(node, (list, dict)) and node and (
      depth < 2 or rng.random() < 0.8):
    key = rng.choice(list(node) if isinstance(node, dict)
                     else range(len(node)))
    choice = rng.random()
    node = node.copy()
    if choice < 0.8:
      node[key] = _changed(node[key], rng, depth + 1)
    elif choice < 0.87:
      del node[key]
    elif isinstance(node, list):
      node.insert(rng.randrange(len(node) + 1), node[rng.randrange(len(node))])
    else:
      node[rng.choice(('x', '', '\ud800', str(key) + 'x'))] = node[key]
    return node
  if isinstance(node, str) and rng.random() < 0.7:
    return _changed_text(node, rng)
  if isinstance(node, int) and rng.random() < 0.5:
    return node + rng.choice((-1, 1, 10, -node, node))
  return rng.choice(_VALUES)


def _changed_text(text, rng):
  at = rng.randrange(len(text) + 1)
  end = at + rng.randint(1, 12)
  new, rest = rng.choice((
      (chr(rng.choice((rng.randrange(128), rng.randrange(0x3000),
                       rng.randrange(0x110000)))), at),
      ('', at + rng.randint(1, 4)), (text[at:end], at),
      (str(rng.choice(_VALUES)), at)))
  return text[:at] + new + text[rest:]
