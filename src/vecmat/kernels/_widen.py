"""Weights of 16, 8 and 4 bits as 16-bit floats, by bits: conversion instructions run at a quarter of the rate.

A GPU of compute capability 9.0 does logic at half the rate of arithmetic, and that is what widening costs. bf16 has too
short a mantissa for a byte, but a byte of zeros above a byte is a bf16 number too: u * 2 ** -133 for every u up to 255,
denormal or not. So one multiplication by 2 ** 127 and the subtraction of the offset, which are one instruction, do
what two masks and a subtraction would. The largest power of two that bf16 has leaves the factor 2 ** -6, which the
caller takes out of the sums (``widened_by``).
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
    """The four int8 or e4m3 values of each word as 16-bit floats, exactly, but for the factor of ``widened_by``.

    int8 to fp16: a byte in the mantissa of 1024 (0x6400), less 1152 (Kim et al., 2022); to bf16 as told above. e4m3 to
    bf16: exponent and mantissa moved into place, times 2 ** 120 for the difference of the biases.
    """
    if KIND == "int8":
        if BF16:
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


@gluon.constexpr_function
def widened_by(kind, bf16):
    """What sums of widened weights of a kind are multiplied by to be those of the weights themselves."""
    return 64.0 if bf16 and kind in ("int8", "int4") else 1.0


@gluon.jit
def nibbles_to_floats(words, zero, BF16: gl.constexpr):
    """The eight nibbles of each word less a zero point, in the order 0 4 1 5 2 6 3 7, exactly, but for ``widened_by``.

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


@gluon.jit
def e4m3_to_bf16(words):
    """The four e4m3 values of each word as bf16, exactly, in the order 0 2 1 3.

    A shift puts the exponents and mantissas of two values in place at once, and left shifts are multiplications, which
    take nothing from the logic.
    """
    return gl.inline_asm_elementwise("""{
        .reg .b32 t, u, v, bias, zero;
        mov.b32 bias, 0x7B807B80;
        mov.b32 zero, 0x80008000;
        shl.b32 t, $4, 4;
        shl.b32 u, $4, 8;
        shr.b32 v, $4, 4;
        and.b32 t, t, 0x07F007F0;
        and.b32 v, v, 0x07F007F0;
        lop3.b32 t, u, 0x80008000, t, 0xEA;
        lop3.b32 v, $4, 0x80008000, v, 0xEA;
        fma.rn.bf16x2 t, t, bias, zero;
        fma.rn.bf16x2 v, v, bias, zero;
        mov.b32 {$0, $1}, t;
        mov.b32 {$2, $3}, v;
        }""", "=&h,=&h,=&h,=&h,r", [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
