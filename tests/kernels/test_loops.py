"""tools/loops.py: the main loop of SASS and of AMD's assembly, on listings small enough to count by hand."""

from types import SimpleNamespace

import pytest

from tools.binaries import entry_instructions
from tools.loops import Loop, main_loop, read_amdgcn, read_sass


def sass(listing: str) -> str:
    """Return the listing with addresses and semicolons, as nvdisasm prints it."""
    lines = [line.strip() for line in listing.strip().splitlines()]
    return "\n".join(line if line.endswith(":") else f"  /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))


TWO_LOOPS = """
    LDC R1, c[0x0][0x28]
    .L_x_0:
    LDG.E.128 R4, desc[UR20][R2.64]
    FADD R8, R8, R4
    FADD R8, R8, R5
    IADD3 R2, R2, 0x200, RZ
    @P0 BRA `(.L_x_0)
    .L_x_1:
    IADD3 R2, R2, 0x1, RZ
    @!P1 BRA `(.L_x_1)
    EXIT
    .L_x_2:
    BRA `(.L_x_2)
    NOP
"""


def test_the_innermost_loop_that_loads_most_is_the_main_one():
    """However long another is; of loops that load as much, the shortest."""
    assert main_loop(read_sass(sass(TWO_LOOPS))) == Loop(5, 5, 16, 16)
    longer = TWO_LOOPS.replace("@!P1 BRA", "LDG.E R5, desc[UR20][R2.64]\n" + "FADD R0, R0, R1\n" * 9 + "@!P1 BRA")
    assert main_loop(read_sass(sass(longer))) == Loop(5, 5, 16, 16)
    as_much = longer.replace("LDG.E R5", "LDG.E.128 R5")
    assert main_loop(read_sass(sass(as_much))) == Loop(5, 5, 16, 16)
    first_longer = as_much.replace("FADD R8", "FADD R8, R8, R4\n" * 8 + "FADD R8", 1)
    assert main_loop(read_sass(sass(first_longer))) == Loop(12, 12, 16, 16)


def test_a_loop_around_it_is_not_counted():
    around = TWO_LOOPS.replace("EXIT", "@P2 BRA `(.L_x_3)\n EXIT").replace("LDC", ".L_x_3:\n LDC")
    assert main_loop(read_sass(sass(around))) == Loop(5, 5, 16, 16)


RARE = """
    .L_x_0:
    LDG.E R4, desc[UR20][R2.64]
    BRA.U !UP0, `(.L_x_1)
    LDG.E.U8 R5, desc[UR20][R2.64]
    @P1 BRA `(.L_x_2)
    MUFU.EX2 R6, R5
    BRA `(.L_x_1)
    .L_x_2:
    MUFU.LG2 R6, R5
    .L_x_1:
    @P0 BRA `(.L_x_0)
    EXIT
"""


def test_what_a_branch_can_jump_over_is_counted_apart():
    assert main_loop(read_sass(sass(RARE))) == Loop(8, 3, 5, 4)


def test_no_loop():
    """A kernel ends with a branch to itself, which is none; nor does a branch forward make one."""
    straight = "@P0 BRA `(.L_x_0)\n FADD R0, R0, R1\n .L_x_0:\n EXIT\n .L_x_1:\n BRA `(.L_x_1)"
    assert main_loop(read_sass(sass(straight))) is None
    assert main_loop([]) is None


AMD = """
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	s_or_b64 exec, exec, s[6:7]
	v_add_f32_e32 v4, v4, v6
	s_cbranch_scc0 .LBB0_6
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_cmp_gt_i32_e32 vcc, s53, v36
	s_cbranch_execz .LBB0_4
; %bb.3:                                ;   in Loop: Header=BB0_2 Depth=1
	global_load_dwordx2 v[6:7], v[4:5], off
	v_exp_f32_e32 v6, v6
.LBB0_4:
	s_waitcnt vmcnt(0)
	s_cbranch_scc1 .LBB0_1
; %bb.5:
	v_mov_b32_e32 v4, 0
	s_branch .LBB0_1
.LBB0_6:
	s_endpgm
"""


def test_a_rotated_loop_of_amd_counts_vector_instructions():
    """Three on the shortest way: its load is never jumped over."""
    assert main_loop(read_amdgcn(AMD)) == Loop(4, 3, 8, 8)


def test_a_loops_blocks_may_stand_in_any_order():
    """.LBB0_1, .LBB0_3, .LBB0_2: the branch back to the last closes nothing of its own."""
    moved = """
.LBB0_1:
	global_load_dword v1, v[2:3], off
	v_exp_f32_e32 v1, v1
	s_branch .LBB0_3
.LBB0_2:
	v_add_f32_e32 v4, v4, v1
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.LBB0_3:
	v_mul_f32_e32 v1, v1, v1
	s_branch .LBB0_2
"""
    assert main_loop(read_amdgcn(moved)) == Loop(3, 3, 4, 4)


@pytest.mark.parametrize(("loaded", "per_entry"), [(64, 2.5), (128, 1.25), (68, 2.5)])
def test_instructions_of_an_entry(loaded, per_entry):
    """Four warps, 1,024 entries, two float32 tiles: a thread loads 64 bytes for a block; an unrolled loop takes two blocks."""
    loads = ["LDG.E.128 R4, desc[UR20][R2.64]"] * (loaded // 16) + ["LDG.E R4, desc[UR20][R2.64]"] * (loaded % 16 // 4)
    body = [*loads, *["FADD R0, R0, R1"] * (19 - len(loads)), "@P0 BRA `(.L_x_0)"]
    assembly = read_sass(sass("\n".join([".L_x_0:", *body, "EXIT"])))
    launch = SimpleNamespace(
        arguments={"block_count": 63, "vocab": 64_000},
        constants={"BLOCK": 1024},
        num_warps=4,
        grid=(4, 1),
        read_bytes=4 * 64_008 * 8,
    )
    assert entry_instructions(launch, 32, assembly) == (per_entry, per_entry)
    del launch.arguments["block_count"]
    assert entry_instructions(launch, 32, assembly) == (None, None)
