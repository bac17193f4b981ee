"""Sixteen table lookups in one instruction, which is the one thing that plain loops cannot say.

`affine` and `optimal` turn each group's 32 codes into levels by a table of sixteen bytes, and
`affine` sums energies and errors by three more. On x86-64 (pshufb) and arm64 (tbl) a lookup of
sixteen codes is one instruction; the compiler finds it in no loop, so this file makes LLVM code by
hand. Nothing else in this project does.

Plain Numba loops were tried in its place: the same bytes, but more than 1.3 × the time of
affine.quantize for one tensor of 2048 × 4096, which is 2.4 ms. Median ratios, scales rounded up and
by OCP's rule, with AVX-512; in brackets, scales rounded up, as compiled for AVX2 alone
(NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=): the loops live by AVX-512's 64-bit products and bit
counts, which few machines have, and none of Apple's.

- 256 entries a row, the levels of two codes, energy and error in one int64:   1.97, 2.03
- the same in 32 bits:                                                         2.22, 2.30
- the levels alone, nothing summed, which is not enough:                       1.27, 1.38
- for each code the places that it has in a word, from bit planes, times its
  level; the sums from how many places there are:                              1.39, 1.39 (2.35)
- that by shifts and a level in all sixteen nibbles, without a product:        1.48, 1.50 (2.06)
- that with planes of whole nibbles, without shifts:                           1.33, 1.33 (1.67)
- that with words of 32 bits where places are counted:                         2.07, 1.97 (2.20)

Measured on 2026-11-25, AMD EPYC, 2 cores, x86-64, shared, numba 0.68.1: old and new alternating in
one process, 11 to 15 pairs of two calls, CPU time (time.process_time), on the tensor that
`.venv/bin/python scripts/lab/bench.py --kernels` makes; that command gives the times of today. The
walk of `optimal`, once made by hand too, is plain loops now (walk.py).
"""

from __future__ import annotations

import platform

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ENERGY_BITS = 13  # 32 squares of values × 4, at most 32 × 144
_BYTES = ir.VectorType(ir.IntType(8), 16)
_SHORTS = ir.VectorType(ir.IntType(16), 16)
_INTS = ir.VectorType(ir.IntType(32), 16)
_LONG = ir.IntType(64)


def _choose(builder: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
    """LLVM code for `table[indices]`, all of sixteen bytes, the indices below 16.

    One instruction on x86-64 (pshufb) and on arm64 (tbl); elsewhere what the compiler makes of
    sixteen single choices.
    """
    tuned = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # compile for the CPU at hand only
    name = None if tuned else {
        "x86_64": "llvm.x86.ssse3.pshuf.b.128",
        "arm64": "llvm.aarch64.neon.tbl1.v16i8",
        "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
    }.get(platform.machine())  # fmt: skip
    if name is not None:
        signature = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, signature, name), [table, indices]
        )
    result = ir.Constant(_BYTES, ir.Undefined)
    for lane in range(16):
        place = ir.IntType(32)(lane)
        index = builder.zext(builder.extract_element(indices, place), ir.IntType(32))
        result = builder.insert_element(result, builder.extract_element(table, index), place)
    return result


@intrinsic
def look_up(context, packed, group, rows, row, weight):
    """Look a group's 32 codes up in a row and write its levels.

    packed, weight: int64 (2n,), sixteen codes or levels each; group, row: int64; rows: uint8
    (m, 64), four lookups by code: the level, the energy, low and high byte of the error.
    Returns the sum of energies | the sum of errors << ENERGY_BITS, 32 bits in all.
    """

    def generate(context, builder, signature, arguments):
        def at(array: int, index: ir.Value, stride: int, part: int) -> ir.Value:
            struct = context.make_array(signature.args[array])(context, builder, arguments[array])
            data = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
            offset = builder.add(builder.mul(index, _LONG(stride)), _LONG(16 * part))
            return builder.bitcast(builder.gep(data, [offset]), _BYTES.as_pointer())

        def load(*place: int | ir.Value) -> ir.Value:
            value = builder.load(at(*place))
            value.align = 1
            return value

        codes = load(0, arguments[1], 16, 0)
        low = builder.and_(codes, ir.Constant(_BYTES, [15] * 16))
        high = builder.lshr(codes, ir.Constant(_BYTES, [4] * 16))
        levels, *others = (load(2, arguments[3], 64, part) for part in range(4))
        both = builder.or_(
            _choose(builder, levels, low),
            builder.shl(_choose(builder, levels, high), ir.Constant(_BYTES, [4] * 16)),
        )
        builder.store(both, at(4, arguments[1], 16, 0)).align = 1
        energies, low_bytes, high_bytes = (
            builder.add(
                builder.zext(_choose(builder, table, low), _SHORTS),
                builder.zext(_choose(builder, table, high), _SHORTS),
            )
            for table in others
        )
        errors = builder.add(low_bytes, builder.shl(high_bytes, ir.Constant(_SHORTS, [8] * 16)))
        both = builder.or_(
            builder.zext(energies, _INTS),
            builder.shl(builder.zext(errors, _INTS), ir.Constant(_INTS, [ENERGY_BITS] * 16)),
        )
        # As energies of two codes fit below ENERGY_BITS, and those of 32 as well, one sum does.
        signature = ir.FunctionType(ir.IntType(32), [_INTS])
        name = "llvm.vector.reduce.add.v16i32"
        add = cgutils.get_or_insert_function(builder.module, signature, name)
        return builder.zext(builder.call(add, [both]), _LONG)

    return types.int64(packed, group, rows, row, weight), generate
