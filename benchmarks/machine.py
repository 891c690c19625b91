"""What a result was measured on."""

import importlib.metadata
import os
import pathlib
import platform

import jax


def describe() -> dict:
  """Processor, cores, devices and versions, as JSON takes them."""
  packages = ('jax', 'jaxlib', 'optax', 'flax', 'numpy')
  return {
    'processor': _processor(),
    'cores': os.cpu_count(),
    'devices': [device.device_kind for device in jax.devices()],
    'system': platform.platform(),
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _processor() -> str:
  """The processor's name, where the system tells it."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [
    line.split(':', 1)[1].strip() for line in lines if 'model name' in line
  ]
  return names[0] if names else platform.processor()
