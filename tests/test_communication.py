"""`benchmarks`: collectives read from a program, and units of predictions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

import cases
import subspace_optax as so
from subspace_optax import rso

pytest.importorskip('benchmarks', reason='a source distribution has none')

from benchmarks import communication
from benchmarks import hlo
from benchmarks import roofline

# The forms that TPUs', GPUs' and CPUs' programs have, shortened.
TEXT = """\
HloModule jit_update_fn, num_partitions=4

%gather (p: f32[8,4]) -> (f32[8,4], f32[8,16]) {
  %g.1 = f32[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=1, \
replica_groups=mesh['fsdp'=4] {'fsdp'}, dimensions={1}
}

%gather_done (p: f32[8,4]) -> f32[8,16] {
  %g.2 = f32[8,16]{1,0} all-gather(%p), channel_id=1, \
replica_groups=mesh['fsdp'=4] {'fsdp'}, dimensions={1}
}

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[8,4] {
  %r = f32[8,16]{1,0} all-reduce(%p), channel_id=2, \
replica_groups={{0,1},{2,3}}, to_apply=%add
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = bf16[4]{0} all-reduce(%p), channel_id=3, replica_groups=[1,4]<=[4]
}

%limit (p: (s32[], f32[4])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%rare (p: f32[4]) -> f32[64] {
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%p), channel_id=4, \
replica_groups=[1,4]<=[4]
  ROOT %d = f32[64]{0} all-gather-done(%s)
}

%usual (p: f32[4]) -> f32[64] {
  %c = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%p), \
channel_id=5, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %start = (f32[8,4], f32[8,16]) fusion(%p), calls=%gather
  %done = f32[8,16] fusion(%start), calls=%gather_done
  %rs = f32[8,4] fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
  %w = (s32[], f32[4]) while(%t), condition=%limit, body=%body
  %sum = (f32[3]{0}, f32[5]{0}) all-reduce(%x, %y), channel_id=6, \
replica_groups=[2,2]<=[2,2]T(1,0)
  %more = f32[5]{0} all-reduce(%z), channel_id=6, \
replica_groups=[2,2]<=[2,2]T(1,0)
  ROOT %if = f32[64] conditional(%k, %a, %b), \
branch_computations={%usual, %rare}
}
"""


def test_every_collective_is_read_once():
  found = hlo.collectives(TEXT, 4, 'all')
  expected = {
    '1': ('all-gather', 128, 0.75 * 128 * 4, 1),
    '2': ('reduce-scatter', 128, 0.5 * 128 * 4, 1),
    '3': ('all-reduce', 4, 1.5 * 4 * 2, 5),
    '4': ('all-gather', 64, 0.75 * 64 * 4, 1),
    '5': ('collective-permute', 2, 2 * 4, 1),
    '6': ('all-reduce', 5, 1.0 * 8 * 4, 1),
    '6.1': ('all-reduce', 5, 1.0 * 5 * 4, 1),
  }
  assert found == {k: hlo.Collective(*v) for k, v in expected.items()}
  assert hlo.largest(found) == 128
  assert hlo.sent(found) == sum(c[2] * c[3] for c in expected.values())


def test_branches_are_told_apart():
  always = {'1', '2', '3', '6', '6.1'}
  assert set(hlo.collectives(TEXT, 4, 'cheap')) == always | {'5'}
  assert set(hlo.collectives(TEXT, 4, 'dear')) == always | {'4'}


def test_loops_whose_turns_the_text_tells():
  line = '%w = while(%t), body=%b, backend_config={"known_trip_count":{"n":"7"}'
  assert hlo.trips(line, {}) == 7
  assert hlo.trips('%w = while(%t), condition=%c, body=%b', {'%c': []}) is None


def test_groups_of_split_and_joined_axes():
  mesh = "replica_groups=mesh['a'=4,'b'=2] "
  assert hlo.group_size(mesh + "{'a','b'}", 8) == 8
  assert hlo.group_size(mesh + "{'a':(1)2,'b'}", 8) == 4
  assert hlo.group_size('replica_groups={}', 8) == 8


def test_a_real_program():
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,))
  place = lambda *spec: NamedSharding(mesh, P(*spec))
  x = jax.ShapeDtypeStruct((8, 16), 'float32', sharding=place(None, 'x'))
  y = jax.ShapeDtypeStruct((16, 24), 'float32', sharding=place('x'))
  step = cases.jit(lambda x, y: x @ y, out_shardings=place())
  found = hlo.collectives(step.lower(x, y).compile().as_text(), 4)
  assert [(c.kind, c.elements) for c in found.values()] == [
    ('all-reduce', 8 * 24)
  ]
  assert hlo.sent(found) == 1.5 * 8 * 24 * 4


def test_what_fsdp_sends():
  # Two gathers and a scatter; the axis `tensor` has its half of the weights.
  assert communication.fsdp_bytes(64, {'fsdp': 4}) == 3 * 48
  two = communication.fsdp_bytes(64, {'fsdp': 2, 'tensor': 2})
  assert two == 3 * 16


MODEL = roofline.Model(4096, 11008, 32, 4096)


def test_parameters_and_flops_of_llama_7b():
  # Touvron et al., 2023, Table 2: 6.7B.
  assert round(MODEL.parameters / 1e9, 2) == 6.74
  products = MODEL.parameters - 32_000 * 4096
  attention = 2 * 32 * 4096 * 2048
  flops = MODEL.flops(10, 2048, remat=False)
  assert flops == 6 * 10 * (products + attention)
  assert MODEL.flops(10, 2048, remat=True) == 8 / 6 * flops


def test_counts_of_one_matrix():
  model = dataclasses.replace(MODEL, layers=1)
  alone = [roofline.Matrices(64, 256, 3)]
  r, m, n = 16, 64, 256

  class One:
    matrices, plain = alone, 7

  descent = roofline.METHODS['online_subspace_descent']
  assert roofline.update_flops(descent, One, 0.25) == [
    3 * 6 * m * n * r,
    3 * 8 * m * r * r,
  ]
  state = 3 * (3 * m * r + 2 * n * r) + 2 * 7
  assert roofline.state_numbers(descent, One, 0.25) == state
  assert roofline.thin_numbers(One, 0.25) == 3 * r * (m + n)
  adamw = roofline.METHODS['AdamW']
  adam_state = roofline.state_numbers(adamw, model, 0.25)
  assert adam_state == 2 * model.parameters


def test_links_of_two_levels():
  # 16 chips in domains of 4: each sends 3 of 4 quarters inside, and 3 of 4 of
  # its own quarter outside.
  assert roofline.gathered_over(64, 16, 4) == roofline.Links(48, 12)
  assert roofline.gathered_over(64, 4, 8) == roofline.Links(48, 0)
  assert roofline.reduced(64, 4) == 96
  chip = roofline.Chip(1, 1, 1, 6.0, 2.0, 4, 1.0)
  assert math.isclose(roofline.Links(48, 12).seconds(chip, 0.5), 16.0)


def test_no_gradient_of_a_kernel_is_averaged_over_the_data():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  place = lambda *spec: NamedSharding(mesh, P(*spec))
  of = lambda at, *shape: jax.ShapeDtypeStruct(shape, 'float32', sharding=at)
  params, bases, coords = (
    {'w': of(place(), *shape)} for shape in ((8, 20), (8, 3), (3, 20))
  )
  x = of(place('data'), 16, 8)
  loss = lambda params, x: jnp.mean(jnp.tanh(rso.dot(x, params['w'])) ** 2)

  def largest(f, *args):
    step = cases.jit(f, out_shardings=place())
    program = step.lower(*args, x).compile()
    return hlo.largest(hlo.collectives(program.as_text(), 4))

  assert largest(jax.value_and_grad(loss), params) == 8 * 20
  lifted = rso.value_and_grad(loss, so.SubspaceSpec(3))
  assert largest(lifted, params, bases, coords) == 3 * 20
