"""The command line: help, versions, explain and doctor, and how it says no."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vecmat
from vecmat import doctor, table
from vecmat.cli import main
from vecmat.device import KNOWN, Device
from vecmat.kernels import registry
from vecmat.ops import explain_problem
from vecmat.problem import Format, Problem

SHAPE = ["--m", "1", "--n", "4096", "--k", "4096"]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def leaves(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    code = stop.value.code
    assert isinstance(code, int)
    return code


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "vecmat", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vecmat {vecmat.__version__}\n", "")
    wrong = subprocess.run(
        [sys.executable, "-m", "vecmat", "explain", *SHAPE, "--device", "abacus"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert re.fullmatch(r"vecmat: error: .*'abacus'.*\n", wrong.stderr)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ([], ["run", "explain", "doctor", "--version"]),
        (["run"], ["MODEL", "--weights", "--group-size", "--dtype", "--prompt", "--max-new-tokens", "--device",
                   "--untie", "--fuse", "--compute", "--compile", "--json", "int8", "int4", "fp8", "bf16"]),
        (["explain"], ["--m", "--n", "--k", "--weights", "--group-size", "--x", "--out", "--layout", "--compute",
                       "--bias", "--device", "h200"]),
        (["doctor"], ["--json"]),
        (["convert"], ["IN", "OUT", "--weights", "--group-size", "--zero-points", "--dtype", "--skip", "--shard-gb",
                       "--json"]),
    ],
)  # fmt: skip
def test_help_names_every_option(command: list[str], options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves(*command, "--help") == 0
    text = capsys.readouterr().out
    assert [option for option in options if option not in text] == []


@pytest.mark.parametrize("name", [*KNOWN, "cpu"])
def test_explain_a_device_that_may_be_absent(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem(m=1, n=4096, k=4096, x="bf16", weight=Format.parse("int8"), out="bf16")
    device = Device.named(name)
    assert said(capsys, "explain", *SHAPE, "--device", name) == f"{explain_problem(problem, device)}\n"


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        ([], "m1 n4096 k4096 x=bf16 w=int8 o=bf16 nk"),
        (["--weights", "fp32"], "m1 n4096 k4096 x=fp32 w=fp32 o=fp32 nk"),
        (["--weights", "fp16", "--layout", "kn"], "m1 n4096 k4096 x=fp16 w=fp16 o=fp16 kn"),
        (["--weights", "int8", "--layout", "kn"], "m1 n4096 k4096 x=bf16 w=int8 o=bf16 nk"),
        (["--weights", "int4"], "m1 n4096 k4096 x=bf16 w=int4:g128 o=bf16 nk"),
        (["--weights", "int4:g32:zp", "--x", "fp16"], "m1 n4096 k4096 x=fp16 w=int4:g32:zp o=fp16 nk"),
        (["--weights", "int4", "--group-size", "64"], "m1 n4096 k4096 x=bf16 w=int4:g64 o=bf16 nk"),
        (["--weights", "fp8", "--compute", "fp8"], "m1 n4096 k4096 x=bf16 w=fp8 o=bf16 nk c=fp8"),
        (["--bias", "--out", "fp32"], "m1 n4096 k4096 x=bf16 w=int8 o=fp32 nk bias"),
    ],
)
def test_explain_options(argv: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "explain", *SHAPE, "--device", "h200", *argv)
    assert told.splitlines()[0] == f"{key} on NVIDIA H200"
    assert told.splitlines()[1].startswith("-> ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "abacus"], "'abacus' is not known; known are cpu, h200"),
        (["--device", "cuda:99"], "cuda:99 is asked for"),
        (["--device", "cuda:x"], "'cuda:x' is not known"),
        (["--weights", "int5"], "'int5' is not known"),
        (["--weights", "int4:q"], "'q' is no option"),
        (["--weights", "bf16", "--group-size", "32"], "has no groups"),
        (["--group-size", "48"], "group_size is 48"),
        (["--weights", "int4:g64", "--group-size", "32"], "group_size is 32"),
        (["--compute", "fp8"], "compute='fp8' multiplies fp8 by fp8"),
        (["--weights", "fp8", "--compute", "int8"], "compute='int8' multiplies integers"),
        (["--m", "0"], "--m is 0"),
        (["--k", "-1"], "--k is -1"),
    ],
)
def test_explain_says_what_is_wrong(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *SHAPE, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vecmat: error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["walk"], "'walk'"),
        (["explain", "--m", "1"], "--n, --k"),
        (["explain", *SHAPE, "--m", "one"], "'one'"),
        (["explain", *SHAPE, "--layout", "nn"], "'nn'"),
        (["run", "--weights", "int5"], "'int5'"),
        (["run", "--max-new-tokens", "many"], "'many'"),
        (["doctor", "--verbose"], "--verbose"),
    ],
)
def test_the_parser_says_no(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves(*argv) == 2
    assert words in capsys.readouterr().err


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "doctor", "--json"))
    assert found["versions"]["vecmat"] == vecmat.__version__
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["no_gpu"] is None) == torch.cuda.is_available()
    assert sum(device["count"] for device in found["devices"]) == 1 + torch.cuda.device_count()
    cpu = found["devices"][0]
    assert (cpu["kind"], cpu["units"]) == ("cpu", torch.get_num_threads())
    for device in found["devices"]:
        assert "triton_dense" in device["kernels"]  # listed, with the reason, where it cannot run too
        for name in doctor.FORMATS:
            answers = {kernel: answers[name] for kernel, answers in device["kernels"].items()}
            assert list(answers.values()).count("chosen") == 1
            assert answers["fallback"] in ("chosen", "yes")
    assert cpu["kernels"]["torch_dense"]["int8"] == "the weight is int8; this kernel multiplies dense weights"


def test_doctor_tells_of_the_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECMAT_CACHE_DIR", str(tmp_path))
    cpu = Device.of(torch.device("cpu"))
    before = json.loads(said(capsys, "doctor", "--json"))["devices"][0]
    state = before["table"]
    assert state["path"] == str(table.path(cpu.name))
    assert state["path"].startswith(str(tmp_path))
    assert (state["exists"], state["rows"]) == (False, 0)
    assert before["kernels"]["fallback"]["bf16"] == "yes"
    problem, fallback = doctor.problems()["bf16"], registry()[0]["fallback"]
    config = fallback.default_config(problem, cpu)
    row = table.Row(kernel="fallback", kernel_version=fallback.version, config=config)
    assert table.save(cpu.name, {problem.key(): row})
    found = json.loads(said(capsys, "doctor", "--json"))["devices"][0]
    assert (found["table"]["exists"], found["table"]["rows"]) == (True, 1)
    assert found["kernels"]["fallback"]["bf16"] == "chosen"


def test_doctor_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "doctor")
    assert "\x1b" not in out
    assert Device.of(torch.device("cpu")).name in out
    for words in ("versions", f"vecmat {vecmat.__version__}", "GB/s", "tuned:", "fallback", "torch_dense", "int4:g128",
                  "chosen", "the weight is of another format; this kernel multiplies dense weights"):  # fmt: skip
        assert words in out
    for number in re.findall(r"no \((\d+)\)", out):
        assert f"\n  ({number}) " in out
