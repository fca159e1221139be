"""Bytes that a program moves, by its text."""

import jax
import jax.numpy as jnp
import pytest

from experiments.compiled.hlo import parse
from experiments.compiled.traffic import moved_bytes

SIZE = 64
WHOLE = 4 * SIZE * SIZE


def moved(function, *arguments, cache=0):
    return moved_bytes(jax.jit(function).lower(*arguments).compile().as_text(), cache)


def square():
    return jnp.ones((SIZE, SIZE))


def test_a_product_reads_both_matrices_and_writes_one():
    assert moved(jnp.matmul, square(), square()) == 3 * WHOLE
    assert moved(jnp.matmul, square(), square(), cache=WHOLE // 4) == 3 * WHOLE * 3 / 4
    assert moved(jnp.matmul, square(), square(), cache=WHOLE) == 0


@pytest.mark.parametrize("inner", [1, 5])
def test_a_loop_counts_as_often_as_it_runs(inner):
    def run(x, w):
        def once(_, x):
            return jax.lax.fori_loop(0, inner, lambda _, x: x @ w, x)

        return jax.lax.fori_loop(0, 30, once, x)

    found = moved(run, square(), square()) / WHOLE
    # A compiler may copy what goes round, but not more than that.
    assert 3 * 30 * inner <= found <= 5 * 30 * inner + 10


def test_of_many_rows_those_that_are_taken_count():
    many, rows = jnp.ones((10_000, SIZE)), jnp.arange(16)
    found = moved(lambda x, rows: 2 * x[rows], many, rows)
    assert 2 * 4 * 16 * SIZE <= found < 4 * 4 * 16 * SIZE


def test_of_an_array_that_a_loop_fills_a_row_counts_in_each_round():
    def fill(x):
        return jax.lax.map(lambda row: 2 * row, x)

    found = moved(fill, jnp.ones((1000, SIZE)))
    whole = 4 * 1000 * SIZE
    assert 2 * whole <= found < 5 * whole  # with the zeros that it starts with


HLO = """HloModule m, is_scheduled=true

%body (state.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state.1), index=0
  %x = f32[8]{0:T(8,128)S(1)} get-tuple-element(%state.1), index=1
  %more = s32[]{:T(128)S(6)} add(%i, %i)
  %sum = f32[8]{0:T(8,128)} add(%x, %x)
  %sent = f32[8]{0:T(8,128)} all-reduce-start(%sum), to_apply=%add
  %got = f32[8]{0:T(8,128)} all-reduce-done(%sent)
  %begun = (f32[8]{0:T(8,128)S(1)}, f32[8]{0:T(8,128)}, u32[]{:S(2)}) copy-start(%got)
  %near = f32[8]{0:T(8,128)S(1)} copy-done(%begun)
  ROOT %next = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) tuple(%more, %near)
}

%condition (state.2: (s32[], f32[8])) -> pred[] {
  %most = s32[]{:T(128)} constant(7)
  %state.2 = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %most), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) tuple(%zero, %a)
  %while = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def test_what_lies_on_a_tpu_s_chip_is_not_memory():
    # In each round of seven the sum is written, read and written by the all-reduce, read by the copy.
    assert moved_bytes(HLO) == 7 * 4 * (4 * 8)
    assert moved_bytes(HLO.replace("direction=LT", "direction=GT")) == 4 * (4 * 8)


FUSED = """HloModule m, is_scheduled=true

%replace (old: f32[100,8], row: f32[1,8], at: s32[]) -> f32[100,8] {
  %old = f32[100,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%old, %row, %at, %zero)
}

ENTRY %main (a: f32[100,8], b: f32[1,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %result = f32[100,8]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%replace
}
"""


def test_a_fusion_that_replaces_a_row_moves_the_row():
    assert moved_bytes(FUSED) == 2 * 4 * 8 + 4  # and the place
    begins = (
        "%begun = ((f32[100,8]{1,0}, f32[1,8]{1,0}, s32[]), f32[100,8]{1,0}, u32[]) fusion-start("
    )
    beside = FUSED.replace("ROOT %result = f32[100,8]{1,0} fusion(", begins).replace(
        "calls=%replace\n",
        "calls=%replace\n  ROOT %result = f32[100,8]{1,0} fusion-done(%begun)\n",
    )
    assert moved_bytes(beside) == moved_bytes(FUSED)


def test_text_that_ends_in_the_middle():
    with pytest.raises(ValueError, match="no end of the bracket"):
        parse(HLO.replace("parameter(0)", "parameter(0"))
