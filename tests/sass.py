"""Machine code of a kernel, and the one thing about it that no compiler flag checks.

A wgmma works on its accumulators until a wait covers it. ptxas once moved accumulators to other
registers while the instruction before was still adding to them, without a word; the sums came out
short of it. `touched_in_flight` finds such code.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

MULTIPLY = re.compile(r"IGMMA\.64x(\d+)x")
REGISTER = re.compile(r"(?<!\w)R(\d+)(\.64)?")


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    bundled = folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else None


def disassemble(cuobjdump: str, cubin: Path) -> list[str]:
    """Instructions in their order, without addresses and predicates."""
    command = [cuobjdump, "-sass", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]


def _registers(name: str, operands: list[str]) -> Iterator[int]:
    for i, operand in enumerate(operands):
        for number, pair in REGISTER.findall(operand):
            count = 2 if pair else 1
            if i == 0:  # what is loaded
                count = 4 if ".128" in name else 2 if ".64" in name else count
            yield from range(int(number), int(number) + count)


def touched_in_flight(instructions: Iterable[str]) -> list[str]:
    """Instructions that read or write accumulators of a wgmma that may not have finished.

    Follows the text of a loop once, which is enough where a loop leaves as much in flight as it
    finds. A group of multiplications ends with `gsb0`; a wait names how many groups may be left.
    """
    found: list[str] = []
    groups: list[set[int]] = []  # registers of those in flight
    open_group: set[int] = set()
    for instruction in instructions:
        name, _, rest = instruction.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if match := MULTIPLY.match(name):
            first = int(operands[0].removeprefix("R"))
            accumulators = set(range(first, first + int(match[1]) // 2))
            # The same accumulators again are what the hardware orders.
            if any(group & accumulators and group != accumulators for group in groups):
                found.append(instruction)
            open_group |= accumulators
            if operands[-1].endswith("gsb0"):
                groups.append(open_group)
                open_group = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands[-1], 16)
            groups = groups[len(groups) - left :] if left else []
        elif not name.startswith("WARPGROUP"):
            in_flight = open_group.union(*groups)
            if in_flight & set(_registers(name, operands)):
                found.append(instruction)
    return found
