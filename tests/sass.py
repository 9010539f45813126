"""What the machine code of a kernel for compute capability 9.0 must not do: write what an MMA under way still reads.

A warpgroup MMA takes its left operand from registers while the warp goes on. PTX leaves it to the program not to fill
them again before the MMA has been waited for, and no compiler tells if it does.
"""

from __future__ import annotations

import re

# Their first operand is no register that they write.
_NOT_WRITING = {
    "STG", "STS", "STL", "STSM", "ST", "RED", "ATOMS", "LDGSTS", "BAR", "BRA", "SYNCS", "DEPBAR", "WARPGROUP", "FENCE",
    "MEMBAR", "ERRBAR", "ARRIVES", "BSSY", "BSYNC", "EXIT", "NOP", "ISETP", "FSETP", "HSETP2", "PLOP3", "R2UR", "CCTL",
}  # fmt: skip


def overwritten(text: str) -> tuple[int, list[str]]:
    """(loops of MMAs looked at, instructions in them that write an operand of an MMA under way). text: nvdisasm's."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            code.append(instruction.group(1).strip())
    loops = []
    for end, each in enumerate(code):
        target = re.search(r"BRA.*?(\.L_x_\d+)", each)
        start = labels.get(target.group(1), end + 1) if target else end + 1
        if start <= end and any(other.startswith("HGMMA") for other in code[start:end]):
            loops.append((start, end))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return len(inner), [wrong for start, end in inner for wrong in _overwritten(code[start : end + 1] * 3)]


def _overwritten(code: list[str]) -> list[str]:
    """The instructions of a straight piece of code that write an operand of an MMA under way."""
    groups: list[set[int]] = []  # the registers that each group of MMAs reads, oldest first
    current: set[int] = set()
    wrong = []
    for each in code:
        name, _, rest = each.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if name.startswith("HGMMA"):
            first = int(operands[1].split(".")[0][1:])
            current = current | set(range(first, first + 4))
            if "gsb0" in rest:
                groups, current = [*groups, current], set()
        elif waits := re.match(r"DEPBAR\.LE gsb0, (0x[0-9a-f]+)|WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", each):
            under_way = int(waits.group(1) or waits.group(2), 16)
            groups = groups[len(groups) - under_way :] if under_way < len(groups) else groups
            groups = groups if under_way else []
        elif _written(name, operands[0]) & current.union(*groups):
            wrong.append(each)
    return wrong


def _written(name: str, first: str) -> set[int]:
    """The registers that an instruction writes."""
    register = re.match(r"R(\d+)", first)
    if register is None or name.split(".")[0] in _NOT_WRITING:
        return set()
    wide = 2 if re.search(r"\.64|\.WIDE|^CS2R$", name) else 4 if ".128" in name else 1
    return set(range(int(register.group(1)), int(register.group(1)) + wide))
