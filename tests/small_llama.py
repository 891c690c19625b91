"""A `llama_test` of few matrices, and trainers that trace a program once.

With bases of rank `RANK`, queries and outputs of attention are projected; what
is beside them is too narrow to be worth it. A trainer is about none of that.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
from typing import Any

import pytest

import llama
import pretrain

RANK = 8


def small(**changes: Any) -> llama.LlamaConfig:
  sizes = {'mlp_width': 8, 'kv_heads': 1} | changes
  return dataclasses.replace(llama.NAMED['llama_test'], **sizes)


def install() -> None:
  """Puts it in place of `llama_test`, for as long as this process lives."""
  llama.NAMED['llama_test'] = small()


def install_in(patch: pytest.MonkeyPatch, **changes: Any) -> None:
  patch.setitem(llama.NAMED, 'llama_test', small(**changes))


@contextlib.contextmanager
def installed() -> Iterator[None]:
  """In its place, and runs of one configuration share what is compiled."""
  plan, compiled, plans, programs = pretrain.plan, pretrain.compiled, {}, {}

  def plan_once(c, vocab, devices):
    key = dataclasses.replace(c, out='', resume=False)
    key = key, llama.NAMED[c.model], vocab, devices
    if key not in plans:
      plans[key] = plan(c, vocab, devices)
    return plans[key]

  def compile_once(run, devices, example):
    if run.init not in programs:
      programs[run.init] = compiled(run, devices, example)
    return programs[run.init]

  with pytest.MonkeyPatch.context() as patch:
    install_in(patch)
    patch.setattr(pretrain, 'plan', plan_once)
    patch.setattr(pretrain, 'compiled', compile_once)
    yield
