"""Mutates good cases: JSON documents as trees, others as bytes."""

import json
import random
import struct
from typing import Any

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
    choice = rng.randrange(5)
    if choice == 0:
      data[at:at + 1] = bytes([rng.randrange(256)])
    elif choice == 1:
      del data[at:at + rng.randint(1, 20)]
    elif choice == 2:
      data[at:at] = data[at:at + rng.randint(1, 20)]
    elif choice == 3:
      number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1))
      data[at:at + 8] = struct.pack('<Q', number)
    else:
      data[at:at] = rng.choice((b'"', b'\0', b'\r', b'{', b'\xff', b',', b'\n'))
  return bytes(data[:max_size])


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
  choice = rng.randrange(4)
  if choice == 0:
    return text[:at] + chr(rng.choice((
        rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000),
    ))) + text[at:]
  if choice == 1:
    return text[:at] + text[at + rng.randint(1, 4):]
  if choice == 2:
    end = at + rng.randint(1, 12)
    return text[:at] + text[at:end] * 2 + text[end:]
  value = rng.choice(_VALUES)
  return text[:at] + (value if isinstance(value, str) else str(value)
                      ) + text[at:]
