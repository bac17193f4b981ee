"""The best of hundreds of assignments for sixteen groups at a time, by a walk through them.

For an assignment of values to levels, the least squared error of a group of 32 weights is
E = Σv² - V²/32 - shared² / (32 · spread), with V = Σv, shared = Σ(32v - V)·level and
spread = 32·Σlevel² - (Σlevel)². So the best assignment has the greatest shared² / spread. In halves
all of these are whole numbers below 2^24, exact in float32 whatever the order of additions.

From one assignment to the next only few levels change. A walk is a list of single changes: after
each of them the sums are mended by three multiplications and the result is compared with the best
so far, crosswise, without a division. What lies between two assignments of the list is one as well.
The lanes of a vector are groups, so that nothing depends on the width of the machine's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dsv4.weights.assignments import VALUES

GROUPS = 16  # side by side
SPLIT = 2.0**42 + 1  # leaves the highest 11 of a double's 53 bits (Veltkamp's splitting)
NEXT = 1 + 1.5 * 2.0**-11  # leads from any F16 number to the next, after rounding
SLACK = 1.0005  # when rounding to F16 costs more than this, look further than one step
_FLOATS = ir.VectorType(ir.FloatType(), GROUPS)
_INTS = ir.VectorType(ir.IntType(32), GROUPS)
_DOUBLES = ir.VectorType(ir.DoubleType(), GROUPS)
_LONGS = ir.VectorType(ir.IntType(64), GROUPS)
_LONG, _INT, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
N = len(VALUES)


@dataclass(frozen=True)
class Walk:
    """Single changes that lead through assignments; step s changes one value's level.

    places: int64 (steps,), 2 × the index of the value; deltas: float32, its new level less its old
    one; squares: float32, 32 × the new level² less 32 × the old one; rows: int64 (steps, values),
    all levels after the step.
    """

    places: np.ndarray
    deltas: np.ndarray
    squares: np.ndarray
    rows: np.ndarray


def walk_through(rows: np.ndarray) -> tuple[Walk, int]:
    """The walk from all levels 0 through assignments (n, values), in their order.

    Returns it with the step that reaches the first assignment, which is not the first step; an even
    number of steps is left. Steps that change nothing fill up. Levels fall from the least value on
    and then rise from the greatest on, so that what lies between two assignments keeps the order of
    the values.
    """
    now, out, start = np.zeros(rows.shape[1], np.int64), [], 0

    def change(i: int, level: int) -> None:
        old, now[i] = now[i], level
        out.append((2 * i, level - old, 32 * (level**2 - old**2), now.copy()))

    change(0, 0)
    for row in rows:
        for i in range(len(row)):
            if row[i] < now[i]:
                change(i, row[i])
        for i in reversed(range(len(row))):
            if row[i] > now[i]:
                change(i, row[i])
        start = start or len(out) - 1
    if (len(out) - start) % 2:
        change(0, now[0])
    places, deltas, squares, levels = zip(*out, strict=True)
    steps = np.array(places), np.array(deltas, np.float32), np.array(squares, np.float32)
    return Walk(*steps, np.array(levels)), start


@intrinsic
def go(context, words, levels, places, deltas, squares, first, start, stop, whole, real):
    """Walk sixteen groups from step `first` up to `stop`, comparing from step `start` on.

    words: int64 (2, 16), the first sixteen codes of each group, and the others; levels: float32
    (steps, 16), those after each step; places, deltas, squares: as in Walk. stop - start is even
    and positive, and start - first is positive. Written, as rows of 16 lanes:
    whole, int32 (5, 16): the best step; the F16 bits of scale and bias, in halves; 1 if levels must
    be turned, else 0; 1 if rounding costs more than SLACK;
    real, float64 (7, 16): Σ level, Σ level², Σ value · level, Σ value, Σ value², the greatest
    level, the squared error.
    """

    def generate(context, builder, signature, arguments):
        def data(array: int, kind: ir.Type) -> ir.Value:
            struct = context.make_array(signature.args[array])(context, builder, arguments[array])
            return builder.bitcast(struct.data, kind.as_pointer())

        def load(base: ir.Value, index: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
            pointer = builder.bitcast(builder.gep(base, [index]), kind.as_pointer())
            value = builder.load(pointer)
            value.align = align
            return value

        def add(sum_: ir.Value, one: ir.Value, other: ir.Value) -> ir.Value:
            name = "llvm.fmuladd.v16f32"  # in one instruction or two: exact either way
            kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(function, [one, other, sum_])

        def transposed(rows: list[ir.Value]) -> list[ir.Value]:
            for half in (8, 4, 2, 1):
                low = [lane if not lane & half else lane - half + 16 for lane in range(16)]
                high = [lane + half if not lane & half else lane + 16 for lane in range(16)]
                for i in (i for i in range(16) if not i & half):
                    both = rows[i], rows[i + half]
                    rows[i] = builder.shuffle_vector(*both, ir.Constant(_INTS, low))
                    rows[i + half] = builder.shuffle_vector(*both, ir.Constant(_INTS, high))
            return rows

        low, high = (load(data(0, _LONGS), _LONG(i), _LONGS, 8) for i in (0, 1))
        numbers = _count(builder, low, high)
        total = square = zero = _all(0.0)
        for value, count in zip(VALUES, numbers, strict=True):
            total = add(total, count, _all(value))
            square = add(square, count, _all(value**2))
        pairs = cgutils.alloca_once(builder, ir.ArrayType(_FLOATS, 2 * N))
        pair = builder.bitcast(pairs, _FLOATS.as_pointer())
        for i, (value, count) in enumerate(zip(VALUES, numbers, strict=True)):
            moment = builder.fmul(count, builder.fsub(_all(32 * value), total))
            builder.store(count, builder.gep(pair, [_LONG(2 * i)]))
            builder.store(moment, builder.gep(pair, [_LONG(2 * i + 1)]))
        changes = data(2, _LONG), data(3, _FLOAT), data(4, _FLOAT)

        def step(index: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            place = load(changes[0], index, _LONG, 8)
            count = builder.load(builder.gep(pair, [place]))
            moment = builder.load(builder.gep(pair, [builder.add(place, _LONG(1))]))
            delta = _splat(builder, load(changes[1], index, _FLOAT), _FLOATS)
            change = _splat(builder, load(changes[2], index, _FLOAT), _FLOATS)
            return [add(sum_, *two) for sum_, two in zip(
                state, [(count, delta), (count, change), (moment, delta)], strict=True
            )]  # fmt: skip

        def candidate(index: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            level, square, shared = state
            spread = add(square, builder.fneg(level), level)
            which = _splat(builder, builder.trunc(index, _INT), _INTS)
            return [builder.fmul(shared, shared), spread, which]

        def better(one: list[ir.Value], other: list[ir.Value]) -> list[ir.Value]:
            mine, its = builder.fmul(one[0], other[1]), builder.fmul(other[0], one[1])
            ahead = builder.fcmp_ordered(">", its, mine)
            return [builder.select(ahead, b, a) for a, b in zip(one, other, strict=True)]

        def compared(index: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            after = builder.add(index, _LONG(1))
            here = step(index, state[:3])
            there = step(after, here)
            two = better(candidate(index, here), candidate(after, there))
            return there + better(state[3:], two)

        state = _loop(builder, arguments[5], arguments[6], 1, [zero] * 3, step)
        state += [zero, _all(1.0), ir.Constant(_INTS, [0] * GROUPS)]
        winner = _loop(builder, arguments[6], arguments[7], 2, state, compared)[5]
        level, rows = data(1, _FLOAT), []
        for i in range(16):
            which = builder.zext(builder.extract_element(winner, _INT(i)), _LONG)
            rows.append(load(level, builder.mul(which, _LONG(16)), _FLOATS))
        ones, twos, mixed, top = zero, zero, zero, zero
        for value, count, row in zip(VALUES, numbers, transposed(rows)[:N], strict=True):
            part = builder.fmul(count, row)
            ones, twos = builder.fadd(ones, part), add(twos, part, row)
            mixed = add(mixed, part, _all(value))
            top = builder.select(builder.fcmp_ordered(">", row, top), row, top)
        doubles = [builder.fpext(value, _DOUBLES) for value in
                   (ones, twos, mixed, total, square, top)]  # fmt: skip
        error, *bits = _fit(builder, *(_Doubles(builder, value) for value in doubles))
        out, out_real = data(8, _INTS), data(9, _DOUBLES)
        for i, value in enumerate((winner, *bits)):
            builder.store(value, builder.gep(out, [_LONG(i)])).align = 4
        for i, value in enumerate((*doubles, error)):
            builder.store(value, builder.gep(out_real, [_LONG(i)])).align = 8
        return context.get_dummy_value()

    three = (types.int64,) * 3
    returns = types.void(words, levels, places, deltas, squares, *three, whole, real)
    return returns, generate


def _count(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> list[ir.Value]:
    """LLVM code for how often each of VALUES occurs, as float32; optimal._count is its like."""

    def every(word: int) -> ir.Constant:
        return ir.Constant(_LONGS, [word] * GROUPS)

    def plane(bit: int) -> ir.Value:
        one, other = (
            builder.and_(builder.lshr(word, every(bit)), every(0x1111111111111111))
            for word in (low, high)
        )
        return builder.or_(one, builder.shl(other, every(1)))

    def number(codes: ir.Value) -> ir.Value:
        kind = ir.FunctionType(_LONGS, [_LONGS])
        ones = cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.v16i64")
        return builder.sitofp(builder.trunc(builder.call(ones, [codes]), _INTS), _FLOATS)

    minus, planes = plane(3), [plane(bit) for bit in (2, 1, 0)]
    plus = builder.not_(minus)
    below, above = [], []
    for magnitude in range(8):
        these = every(0x3333333333333333)
        for bit, marked in zip((4, 2, 1), planes, strict=True):
            these = builder.and_(these, marked if magnitude & bit else builder.not_(marked))
        if magnitude == 0:
            zeros = number(these)
            continue
        below.append(number(builder.and_(these, minus)))
        above.append(number(builder.and_(these, plus)))
    return [*reversed(below), zeros, *above]


@dataclass(frozen=True)
class _Doubles:
    """Sixteen float64 in LLVM code, with Python's operators; none is fused with another."""

    builder: ir.IRBuilder
    value: ir.Value

    def _of(self, other: _Doubles | float) -> ir.Value:
        return (
            other.value
            if isinstance(other, _Doubles)
            else ir.Constant(_DOUBLES, [float(other)] * GROUPS)
        )

    def __add__(self, other: _Doubles | float) -> _Doubles:
        return _Doubles(self.builder, self.builder.fadd(self.value, self._of(other)))

    def __sub__(self, other: _Doubles | float) -> _Doubles:
        return _Doubles(self.builder, self.builder.fsub(self.value, self._of(other)))

    def __mul__(self, other: _Doubles | float) -> _Doubles:
        return _Doubles(self.builder, self.builder.fmul(self.value, self._of(other)))

    def __truediv__(self, other: _Doubles) -> _Doubles:
        return _Doubles(self.builder, self.builder.fdiv(self.value, other.value))

    def __neg__(self) -> _Doubles:
        return _Doubles(self.builder, self.builder.fneg(self.value))

    def __gt__(self, other: _Doubles) -> ir.Value:
        return self.builder.fcmp_ordered(">", self.value, other.value)

    def half(self) -> _Doubles:
        """The nearest F16 number, where it is a normal one: Veltkamp's splitting."""
        big = self * SPLIT
        return big - (big - self)

    def half_bits(self) -> ir.Value:
        """int32: the 16 bits of F16 numbers that are normal ones."""
        single = self.builder.bitcast(self.builder.fptrunc(self.value, _FLOATS), _INTS)

        def part(shift: int, mask: int) -> ir.Value:
            moved = self.builder.lshr(single, ir.Constant(_INTS, [shift] * GROUPS))
            return self.builder.and_(moved, ir.Constant(_INTS, [mask] * GROUPS))

        return self.builder.or_(part(13, 0x3FFF), part(16, 0xC000))


def _fit(
    builder: ir.IRBuilder,
    first: _Doubles,
    second: _Doubles,
    mixed: _Doubles,
    values: _Doubles,
    squares: _Doubles,
    top: _Doubles,
) -> list[ir.Value]:
    """LLVM code for what optimal._fit does before its far steps, for 32 weights in halves.

    Operation for operation the same; a division by 32 is exact, and so is multiplying instead.
    Returns error, bits of scale and bias, turned, far, as `go` writes them.
    """

    def choose(condition: ir.Value, one: _Doubles, other: _Doubles) -> _Doubles:
        return _Doubles(builder, builder.select(condition, one.value, other.value))

    spread = second * 32 - first * first
    slope = (mixed * 32 - first * values) / spread
    least = squares - (values * values + slope * slope * spread) * (1 / 32)
    near = slope.half()
    size = (near * NEXT).half() - near  # a slope is positive
    up = slope > near
    far = (near + choose(up, size, -size)).half()
    low, high = choose(up, near, far), choose(up, far, near)
    best, turned = None, ir.Constant(_INTS, [0] * GROUPS)
    for turn in (0, 1):
        if turn:
            second = top * top * 32 - top * 2 * first + second
            first, mixed = top * 32 - first, top * values - mixed
            low, high = -high, -low
        for scale in (low, high):
            bias = ((values - scale * first) * (1 / 32)).half()
            error = squares - (scale * mixed + bias * values) * 2
            error = error + (scale * scale * second + scale * 2 * bias * first + bias * bias * 32)
            if best is None:
                best = error, scale, bias
                continue
            better = best[0] > error
            new = error, scale, bias
            best = tuple(choose(better, b, a) for a, b in zip(best, new, strict=True))
            turned = builder.select(better, ir.Constant(_INTS, [turn] * GROUPS), turned)
    error, scale, bias = best
    bad = builder.zext(error > least * SLACK, _INTS)
    return [error.value, scale.half_bits(), bias.half_bits(), turned, bad]


def _all(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(value)] * GROUPS)


def _splat(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """LLVM code for a vector that holds `value` in every lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, value, _INT(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * GROUPS))


def _loop(
    builder: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    by: int,
    state: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """LLVM code for `while True: state = body(index, state); index += by`, until index ≥ stop."""
    before, around = builder.block, builder.append_basic_block()
    builder.branch(around)
    builder.position_at_end(around)
    index = builder.phi(_LONG)
    phis = [builder.phi(value.type) for value in state]
    after = body(index, phis)
    following = builder.add(index, _LONG(by))
    for phi, first, then in zip([index, *phis], [start, *state], [following, *after], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, around)
    done = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, stop), around, done)
    builder.position_at_end(done)
    return after
