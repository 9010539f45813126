"""Triton kernels compile for GPUs that are not here: default configs fit shared memory, spill nothing, run at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sass import overwritten

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).parent / "compile_triton.py"


def resident(registers: int, warps: int) -> int:
    """Programs that fit the 65536 registers of a multiprocessor, of which a warp gets 256 at a time."""
    return 65536 // (-(-registers * 32 // 256) * 256 * warps)


@pytest.mark.parametrize("device", ["a100", "h100", "b200", "mi300x"])
def test_default_configs_compile_fit_do_not_spill_and_run_in_one_wave(device: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, SCRIPT, device], capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    compiled = [json.loads(line) for line in ran.stdout.splitlines()]
    wanted = {"triton_dense", "triton_gemv", *(["triton_decode"] if device != "mi300x" else [])}
    wanted |= {"triton_wgmma"} if device == "h100" else set()
    assert {told["kernel"] for told in compiled} == wanted
    wrong = [told for told in compiled if told["spilled"] or not told["fits"]]
    assert not wrong, "\n".join(map(json.dumps, wrong))
    waves = [told for told in compiled if "programs" in told]
    assert device != "h100" or len(waves) == 18
    wrong = [t for t in waves if t["programs"] > 132 * resident(t["registers"], t["config"]["num_warps"])]
    assert not wrong, "\n".join(map(json.dumps, wrong))
    warpgroups = [told for told in compiled if told["kernel"] == "triton_wgmma"]
    wrong = [told for told in warpgroups if told["overwritten"] or told["serial"] or not told["loops"]]
    assert not wrong, "\n".join(map(json.dumps, wrong))


def test_code_that_fills_an_operand_of_an_mma_under_way_is_found() -> None:
    loop = """.L_x_1:
        /*0010*/ HFMA2.BF16_V2 R60, R20, 1, 1 ;
        /*0020*/ HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR4], R24, gsb0 ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, {} ;
        /*0040*/ @!P1 BRA `(.L_x_1) ;
    """
    assert overwritten(loop.format("0x0")) == (1, [])
    assert overwritten(loop.format("0x1")) == (1, ["HFMA2.BF16_V2 R60, R20, 1, 1"] * 2)
