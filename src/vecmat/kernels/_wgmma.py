"""The programs of ``triton_wgmma``: warps that bring (``_bring``), warps that multiply, and barriers between."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ._bring import bring, constants_of, of
from ._gluon import fragments, per_word, powers, word_layout
from ._triton import gdc_wait
from ._widen import widened_by


@gluon.constexpr_function
def ring_layout(WIDTH, LANE_WORDS):
    """Swizzle of a ring's rows of WIDTH words such that lanes that load at once, four of a row, meet no bank twice."""
    return gl.SwizzledSharedLayout(4 * LANE_WORDS, 1, max(1, min(WIDTH, 32) // (4 * LANE_WORDS)), [1, 0])


@gluon.jit
def share(total, program, programs):
    """The first step of a program's share of all steps."""
    each = total // programs
    return program * each + gl.minimum(program, total - each * programs)


@gluon.jit
def nth(tile, index: gl.constexpr, ROWS: gl.constexpr, COUNT: gl.constexpr):
    """One of COUNT tiles that lie side by side in one (ROWS, COUNT * width) and in each thread; of width 1, (ROWS,)."""
    WIDTH: gl.constexpr = tile.shape[1] // COUNT
    if COUNT == 1:
        if WIDTH == 1:
            return tile.reshape([ROWS])
        else:
            return tile
    else:
        first, last = gl.split(tile.reshape([ROWS, 2, WIDTH * COUNT // 2]).permute([0, 2, 1]))
        if index < COUNT // 2:
            return nth(first, index, ROWS, COUNT // 2)
        else:
            return nth(last, index - COUNT // 2, ROWS, COUNT // 2)


@gluon.jit
def join(y, part_ptr, count_ptr, block, tile, steps, done, program, programs, total_steps, n, m, BLOCK_N: gl.constexpr,
         BLOCK_M: gl.constexpr, TEAMS: gl.constexpr, TEAM: gl.constexpr):  # fmt: skip
    """(the sum of a block's parts, in order, in the program that comes last; whether this is the one).

    done: steps of the block that y is the sum of.
    """
    total = y
    is_last = True
    if done < steps:
        # The parts of a tile are its programs': those whose shares begin before its end.
        each = total_steps // programs
        more = total_steps - each * programs
        first = program_of(tile * steps, each, more)
        parts = program_of((tile + 1) * steps - 1, each, more) - first + 1
        SIZE: gl.constexpr = TEAMS * BLOCK_N * BLOCK_M
        inside = TEAM * (BLOCK_N * BLOCK_M) + n * BLOCK_M + m
        # A program has two parts at most: one begins its tile, one does not.
        mine = gl.where(program == first, programs + first, program)
        gl.store(part_ptr + mine * SIZE + inside, y)
        tl.debug_barrier()  # every thread's part is stored before this program says that it is
        is_last = gl.atomic_add(count_ptr + block, 1, sem="acq_rel") == parts - 1
        tl.debug_barrier()
        if is_last:
            gl.store(count_ptr + block, 0)
            total = gl.load(part_ptr + (programs + first) * SIZE + inside, cache_modifier=".cg")
            for other in range(1, parts, 2):
                pointers = part_ptr + (first + other) * SIZE + inside
                one = gl.load(pointers, cache_modifier=".cg")
                two = gl.load(pointers + SIZE, mask=other + 1 < parts, other=0.0, cache_modifier=".cg")
                total = total + one + two
    return total, is_last


@gluon.jit
def load_zeros(pointers, turn, groups, N, more, DEEP: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr):
    """The zero points (ROWS, PARTS) of a step's groups. pointers: those of its rows (ROWS, PARTS)."""
    part = gl.expand_dims(gl.arange(0, PARTS, layout=gl.SliceLayout(0, pointers.type.layout)), 0)
    group = gl.minimum((turn * DEEP + part * GROUP) // GROUP, groups - 1)
    return gl.load(pointers + group * N, mask=(group >= 0) & more, other=0)


@gluon.constexpr_function
def zeros_layout(PARTS):
    """Layout of zero points (64, PARTS) in which a thread has those of the rows of its words."""
    parts = [[0, i] for i in powers(PARTS)]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0], *parts], lanes, [[16, 0], [32, 0]], [], [64, PARTS])


@gluon.jit
def multiply(rings, TEAM: gl.constexpr, C: gl.constexpr):
    """A warpgroup that widens ROWS rows of the weight and multiplies them."""
    (w_ring, s_ring, x_ring, w_ready, x_ready, free, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, start,
     end, steps, program, programs, total_steps, N, groups, M) = rings  # fmt: skip
    KIND: gl.constexpr = of(C, "KIND")
    BF16: gl.constexpr = of(C, "BF16")
    GROUP: gl.constexpr = of(C, "GROUP")
    ZERO: gl.constexpr = of(C, "ZERO")
    BIAS: gl.constexpr = of(C, "BIAS")
    PDL: gl.constexpr = of(C, "PDL")
    SPLIT: gl.constexpr = of(C, "SPLIT")
    BLOCK_M: gl.constexpr = of(C, "BLOCK_M")
    ROWS: gl.constexpr = of(C, "ROWS")
    TEAMS: gl.constexpr = of(C, "TEAMS")
    LANE_WORDS: gl.constexpr = of(C, "LANE_WORDS")
    UNROLL: gl.constexpr = of(C, "UNROLL")
    SUBS: gl.constexpr = of(C, "SUBS")
    W_STAGES: gl.constexpr = of(C, "W_STAGES")
    X_STAGES: gl.constexpr = of(C, "X_STAGES")
    VALUES: gl.constexpr = per_word(KIND)
    SUB_WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    SUB_DEEP: gl.constexpr = SUB_WIDTH * VALUES
    CHAIN: gl.constexpr = max(1, min(SUBS, GROUP // SUB_DEEP))  # MMAs of a group
    PARTS: gl.constexpr = SUBS // CHAIN
    W_TILE: gl.constexpr = word_layout(LANE_WORDS, UNROLL * SUBS, 16, ROWS, 4, 1, 1)
    Z_TILE: gl.constexpr = zeros_layout(PARTS)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    SCALED: gl.constexpr = KIND != "dense" and GROUP == 0
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, ACC)
    r = gl.arange(0, ROWS, layout=BY_ROW)
    for tile in range(start // steps, (end + steps - 1) // steps):
        low = gl.maximum(start, tile * steps)
        high = gl.minimum(end, (tile + 1) * steps)
        block = tile * TEAMS + TEAM
        row = gl.minimum(block * ROWS + r, N - 1)
        if SCALED:
            row_scale = gl.load(scale_ptr + row)
        if ZERO:
            z_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Z_TILE))
            z_pointers = zero_ptr + gl.expand_dims(gl.minimum(block * ROWS + z_row, N - 1), 1)
            z_pointers, _ = gl.broadcast(z_pointers, gl.zeros([ROWS, PARTS], gl.int32, Z_TILE))
            following = load_zeros(z_pointers, low - tile * steps, groups, N, True, SUBS * SUB_DEEP, GROUP, PARTS)
        total = zeros
        product = zeros
        before = gl.zeros([ROWS], gl.float32, BY_ROW)
        if GROUP > 0:
            product = warpgroup_mma_init(product)
        for step in range(low, high):
            done = step - start
            slot = done % W_STAGES
            x_slot = done % X_STAGES
            mbarrier.wait(w_ready.index(slot), done // W_STAGES & 1)
            words = w_ring.index(slot * TEAMS + TEAM).load(W_TILE)
            if ZERO:
                zero = following
                turn = step + 1 - tile * steps
                following = load_zeros(z_pointers, turn, groups, N, step + 1 < high, SUBS * SUB_DEEP, GROUP, PARTS)
            for sub in gl.static_range(SUBS):
                w = nth(words, sub, ROWS, SUBS)
                if GROUP > 0 and sub % CHAIN == 0:
                    scale = s_ring.index((slot * TEAMS + TEAM) * PARTS + sub // CHAIN).load(BY_ROW)
                if GROUP > 0 and SUBS == 1:
                    total += warpgroup_mma_wait(0, deps=[product]) * gl.expand_dims(before, 1)
                z = 0
                if ZERO:
                    z = gl.convert_layout(nth(zero, sub // CHAIN, ROWS, PARTS), gl.SliceLayout(1, w.type.layout))
                left = fragments(w, z, KIND, BF16, ZERO, ROWS, LANE_WORDS, UNROLL)
                left = gl.convert_layout(left, LEFT)
                if sub == 0:
                    mbarrier.wait(x_ready.index(x_slot), done // X_STAGES & 1)
                    # Here and not where x is written: it waits for all copies that a thread has under way.
                    fence_async_shared()
                right = x_ring.index(x_slot).slice(sub * SUB_DEEP, SUB_DEEP, dim=1).permute((1, 0))
                # An MMA under way reads the registers of its left operand, which the same part of the next step fills:
                # by then all but the last MMA have ended.
                if GROUP > 0:
                    if sub % CHAIN == 0:
                        if SUBS > 1:
                            total += warpgroup_mma_wait(0, deps=[product]) * gl.expand_dims(before, 1)
                        before = scale
                        product = warpgroup_mma(left, right, zeros, use_acc=False, is_async=True)
                    else:
                        product = warpgroup_mma(left, right, product, is_async=True)
                        product = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[product]))
                else:
                    product = warpgroup_mma(left, right, product, is_async=True)
                    product = warpgroup_mma_wait(1 if SUBS > 1 else 0, deps=[product])
                if sub == 0:
                    # The MMAs of the step before have ended.
                    mbarrier.arrive(free.index((done + X_STAGES - 1) % X_STAGES), count=1, pred=step > low)
        y = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(free.index((high - 1 - start) % X_STAGES), count=1)
        if PDL:
            gdc_wait()
        if GROUP > 0:
            y = total + y * gl.expand_dims(before, 1)
        if widened_by(KIND, BF16) != 1:
            y *= widened_by(KIND, BF16)
        n = gl.expand_dims(r, 1)
        m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC)), 0)
        is_last = True
        if SPLIT:
            y, is_last = join(y, part_ptr, count_ptr, block, tile, steps, high - low, program, programs, total_steps, n,
                              m, ROWS, BLOCK_M, TEAMS, TEAM)  # fmt: skip
        if SCALED:
            y *= gl.expand_dims(row_scale, 1)
        if BIAS:
            y += gl.expand_dims(gl.load(bias_ptr + row), 1).to(gl.float32)
        y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), OUT)
        n = block * ROWS + gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT)), 1)
        m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, OUT)), 0)
        gl.store(y_ptr + m.to(gl.int64) * N + n, y, mask=(n < N) & (m < M) & is_last)


@gluon.jit
def program_of(step, each, more):
    """The program whose share has a step: the first ``more`` programs have one step more than ``each``."""
    first = step // (each + 1)
    return gl.where(first < more, first, more + (step - more * (each + 1)) // gl.maximum(each, 1))


@gluon.jit(do_not_specialize=["M"])
def warpgroups(x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, row_words, groups, split, M,
               KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
               EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, FROZEN: gl.constexpr, SPLIT: gl.constexpr,
               BLOCK_M: gl.constexpr, TEAMS: gl.constexpr, LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr,
               SUBS: gl.constexpr, W_STAGES: gl.constexpr, X_STAGES: gl.constexpr, BRINGERS: gl.constexpr,
               BRING_WARPS: gl.constexpr, REGS: gl.constexpr, BRING_REGS: gl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T * scale + bias; a program an equal share of all steps of all tiles.

    A tile is TEAMS * 64 rows of w, a step SUBS MMAs of 4 * LANE_WORDS * UNROLL words of each. The programs that share
    a tile add its parts in the order of K. row_words: words in a row of w, ALIGN of them taken for one.
    """
    ROWS: gl.constexpr = 64  # of the weight, to a team
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL * SUBS
    DEEP: gl.constexpr = WIDTH * per_word(KIND)
    X_TYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    PARTS: gl.constexpr = max(1, DEEP // GROUP) if GROUP > 0 else 1
    steps = (row_words * ALIGN + WIDTH - 1) // WIDTH
    tiles = (N + TEAMS * ROWS - 1) // (TEAMS * ROWS)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    total_steps = steps * tiles
    start = share(total_steps, program, programs)
    end = share(total_steps, program + 1, programs)
    w_ring = gl.allocate_shared_memory(gl.int32, [W_STAGES * TEAMS, ROWS, WIDTH], ring_layout(WIDTH, LANE_WORDS))
    s_ring = gl.allocate_shared_memory(
        gl.float32, [W_STAGES * TEAMS * PARTS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    x_ring = gl.allocate_shared_memory(X_TYPE, [X_STAGES, BLOCK_M, DEEP], gl.NVMMASharedLayout(128, 16, 2))
    w_ready = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    x_ready = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(w_ready.index(stage), count=32 * BRING_WARPS)
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=TEAMS)
    rings = (w_ring, s_ring, x_ring, w_ready, x_ready, free, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr,
             start, end, steps, program, programs, total_steps, N, groups, M)  # fmt: skip
    sources = (x_ptr, w_ptr, scale_ptr, x_ring, w_ring, s_ring, x_ready, w_ready, free, start, end, steps, N, row_words,
               groups, M)  # fmt: skip
    C: gl.constexpr = constants_of(KIND=KIND, BF16=BF16, GROUP=GROUP, ZERO=ZERO, BIAS=BIAS, EVEN=EVEN,
                                ALIGN=ALIGN, PDL=PDL, FROZEN=FROZEN, SPLIT=SPLIT, BLOCK_M=BLOCK_M, ROWS=ROWS,
                                TEAMS=TEAMS, LANE_WORDS=LANE_WORDS, UNROLL=UNROLL, SUBS=SUBS, W_STAGES=W_STAGES,
                                X_STAGES=X_STAGES, BRINGERS=BRINGERS)  # fmt: skip
    gl.static_assert(TEAMS <= 2 and BRINGERS <= 2)
    if TEAMS == 1 and BRINGERS == 1:
        gl.warp_specialize(
            [(multiply, (rings, 0, C)),
             (bring, (sources, 0, C))],
            [BRING_WARPS],
            [BRING_REGS],
        )  # fmt: skip
    elif TEAMS == 1 and BRINGERS == 2:
        gl.warp_specialize(
            [(multiply, (rings, 0, C)),
             (bring, (sources, 0, C)), (bring, (sources, 1, C))],
            [BRING_WARPS, BRING_WARPS],
            [BRING_REGS, BRING_REGS],
        )  # fmt: skip
    elif TEAMS == 2 and BRINGERS == 1:
        gl.warp_specialize(
            [(multiply, (rings, 0, C)), (multiply, (rings, 1, C)),
             (bring, (sources, 0, C))],
            [4, BRING_WARPS],
            [REGS, BRING_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(multiply, (rings, 0, C)), (multiply, (rings, 1, C)),
             (bring, (sources, 0, C)), (bring, (sources, 1, C))],
            [4, BRING_WARPS, BRING_WARPS],
            [REGS, BRING_REGS, BRING_REGS],
        )  # fmt: skip
