"""Weights of 16, 8 and 4 bits as 16-bit floats, by bits: conversion instructions run at a quarter of the rate.

Where sums may be scaled at the end there are shorter ways. A GPU of compute capability 9.0 does logic at half the rate
of arithmetic, and that is what widening costs. A byte of zeros above a byte is a bf16 number too: u * 2 ** -133 for
every u up to 255, denormal or not. So one multiplication by 2 ** 127 and the subtraction of the offset, which are one
instruction, do what two masks and a subtraction did. The largest power of two that bf16 has leaves the factor 2 ** -6,
which the caller takes out of the sums.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def halves(words, BF16: gl.constexpr):
    """The two 16-bit floats of each word, low half first."""
    if BF16:
        return gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words],
                                         dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words],
                                         dtype=(gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def bytes_to_floats(words, KIND: gl.constexpr, BF16: gl.constexpr):
    """The four int8 or e4m3 values of each word as 16-bit floats, exactly.

    int8 to fp16: a byte in the mantissa of 1024 (0x6400), less 1152 (Kim et al., 2022). bf16 has seven bits of
    mantissa: the low seven go into that of 128 (0x4300), and the sign's 128 is subtracted as 256 or 128.
    e4m3 to bf16: exponent and mantissa moved into place, times 2 ** 120 for the difference of the biases.
    """
    if KIND == "int8":
        if BF16:
            return gl.inline_asm_elementwise("""{
                .reg .b32 t, u, a, b, minus;
                mov.b32 minus, 0xBF80BF80;
                prmt.b32 t, $4, 0, 0x4140;
                prmt.b32 u, $4, 0, 0x4342;
                lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;
                lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
                fma.rn.bf16x2 t, b, minus, a;
                lop3.b32 a, u, 0x007F007F, 0x43004300, 0xEA;
                lop3.b32 b, u, 0x00800080, 0x43004300, 0xEA;
                fma.rn.bf16x2 u, b, minus, a;
                mov.b32 {$0, $1}, t;
                mov.b32 {$2, $3}, u;
                }""", "=h,=h,=h,=h,r", [words],
                dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
        else:
            return gl.inline_asm_elementwise("""{
                .reg .b32 t, u, v, offset;
                mov.b32 offset, 0x64806480;
                xor.b32 t, $4, 0x80808080;
                prmt.b32 u, t, 0x64646464, 0x4140;
                prmt.b32 v, t, 0x64646464, 0x4342;
                sub.rn.f16x2 u, u, offset;
                sub.rn.f16x2 v, v, offset;
                mov.b32 {$0, $1}, u;
                mov.b32 {$2, $3}, v;
                }""", "=h,=h,=h,=h,r", [words],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip
    else:
        gl.static_assert(KIND == "fp8")
        if BF16:
            return gl.inline_asm_elementwise("""{
                .reg .b32 t, u, sign, bias, zero;
                mov.b32 bias, 0x7B807B80;
                mov.b32 zero, 0x80008000;
                prmt.b32 t, $4, 0, 0x1404;
                prmt.b32 u, $4, 0, 0x3424;
                and.b32 sign, t, 0x80008000;
                shr.b32 t, t, 4;
                lop3.b32 t, t, 0x07F007F0, sign, 0xEA;
                fma.rn.bf16x2 t, t, bias, zero;
                and.b32 sign, u, 0x80008000;
                shr.b32 u, u, 4;
                lop3.b32 u, u, 0x07F007F0, sign, 0xEA;
                fma.rn.bf16x2 u, u, bias, zero;
                mov.b32 {$0, $1}, t;
                mov.b32 {$2, $3}, u;
                }""", "=h,=h,=h,=h,r", [words],
                dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
        else:
            return gl.inline_asm_elementwise("""{
                .reg .b16 low, high;
                .reg .b32 t, u;
                mov.b32 {low, high}, $4;
                cvt.rn.f16x2.e4m3x2 t, low;
                cvt.rn.f16x2.e4m3x2 u, high;
                mov.b32 {$0, $1}, t;
                mov.b32 {$2, $3}, u;
                }""", "=h,=h,=h,=h,r", [words],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def nibbles_to_floats(words, offset, BF16: gl.constexpr):
    """The eight nibbles of each word less a zero point as 16-bit floats, exactly, in the order 0 4 1 5 2 6 3 7.

    A nibble goes into the mantissa of 1024 (fp16) or 128 (bf16); offset: words of two times that plus the zero point.
    """
    if BF16:
        return gl.inline_asm_elementwise("""{
            .reg .b32 t, minus;
            mov.b32 minus, 0xBF80BF80;
            lop3.b32 t, $8, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 t, $9, minus, t;
            mov.b32 {$0, $1}, t;
            shr.b32 t, $8, 4;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 t, $9, minus, t;
            mov.b32 {$2, $3}, t;
            shr.b32 t, $8, 8;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 t, $9, minus, t;
            mov.b32 {$4, $5}, t;
            shr.b32 t, $8, 12;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 t, $9, minus, t;
            mov.b32 {$6, $7}, t;
            }""", "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r", [words, offset],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16,
                   gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("""{
            .reg .b32 t;
            lop3.b32 t, $8, 0x000F000F, 0x64006400, 0xEA;
            sub.rn.f16x2 t, t, $9;
            mov.b32 {$0, $1}, t;
            shr.b32 t, $8, 4;
            lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA;
            sub.rn.f16x2 t, t, $9;
            mov.b32 {$2, $3}, t;
            shr.b32 t, $8, 8;
            lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA;
            sub.rn.f16x2 t, t, $9;
            mov.b32 {$4, $5}, t;
            shr.b32 t, $8, 12;
            lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA;
            sub.rn.f16x2 t, t, $9;
            mov.b32 {$6, $7}, t;
            }""", "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r", [words, offset],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16,
                   gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip


@gluon.constexpr_function
def widened_by(kind, bf16):
    """What sums of the weights that ``bytes_to_bf16`` and ``nibbles_to`` make are multiplied by to be those wanted."""
    return 64.0 if bf16 and kind in ("int8", "int4") else 1.0


@gluon.jit
def bytes_to_bf16(words):
    """The four int8 values of each word as bf16, 2 ** -6 as large, exactly."""
    return gl.inline_asm_elementwise("""{
        .reg .b32 t, u, scale, offset;
        mov.b32 scale, 0x7F007F00;
        mov.b32 offset, 0xC000C000;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 u, t, 0, 0x4342;
        prmt.b32 t, t, 0, 0x4140;
        fma.rn.bf16x2 t, t, scale, offset;
        fma.rn.bf16x2 u, u, scale, offset;
        mov.b32 {$0, $1}, t;
        mov.b32 {$2, $3}, u;
        }""", "=h,=h,=h,=h,r", [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def nibbles_to(words, zero, BF16: gl.constexpr):
    """The eight nibbles of each word less a zero point, in the order 0 4 1 5 2 6 3 7; as bf16 2 ** -6 as large.

    zero: words of two zero points, each in the low byte of a half.
    """
    if BF16:
        return gl.inline_asm_elementwise("""{
            .reg .b32 t, u, w, low, high, minus, offset;
            mov.b32 low, 0x7F007F00;
            mov.b32 high, 0x7D007D00;
            mov.b32 minus, 0xFF00FF00;
            mov.b32 t, 0x80008000;
            fma.rn.bf16x2 offset, $9, minus, t;
            shr.b32 w, $8, 8;
            and.b32 t, $8, 0x000F000F;
            and.b32 u, $8, 0x00F000F0;
            fma.rn.bf16x2 t, t, low, offset;
            fma.rn.bf16x2 u, u, high, offset;
            mov.b32 {$0, $1}, t;
            mov.b32 {$2, $3}, u;
            and.b32 t, w, 0x000F000F;
            and.b32 u, w, 0x00F000F0;
            fma.rn.bf16x2 t, t, low, offset;
            fma.rn.bf16x2 u, u, high, offset;
            mov.b32 {$4, $5}, t;
            mov.b32 {$6, $7}, u;
            }""", "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r", [words, zero],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16,
                   gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("""{
            .reg .b32 t, u, w, near, far, part;
            or.b32 near, $9, 0x64006400;
            mov.b32 part, 0x63806380;
            sub.rn.f16x2 far, part, near;
            mov.b32 part, 0x2C002C00;
            shr.b32 w, $8, 8;
            lop3.b32 t, $8, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 u, $8, 0x00F000F0, 0x64006400, 0xEA;
            sub.rn.f16x2 t, t, near;
            fma.rn.f16x2 u, u, part, far;
            mov.b32 {$0, $1}, t;
            mov.b32 {$2, $3}, u;
            lop3.b32 t, w, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 u, w, 0x00F000F0, 0x64006400, 0xEA;
            sub.rn.f16x2 t, t, near;
            fma.rn.f16x2 u, u, part, far;
            mov.b32 {$4, $5}, t;
            mov.b32 {$6, $7}, u;
            }""", "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r", [words, zero],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16,
                   gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip
