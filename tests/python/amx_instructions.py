"""What each AMX instruction of a kernel does, after Intel's manual: added to STEPS.

Every access to a tile checks it against the configuration, as the hardware does.

Tested by test_avx512_machine.py.
"""

from __future__ import annotations

from iced_x86 import Instruction

from avx512_floats import flush, fused, to_bits, to_float
from avx512_instructions import STEPS, step
from avx512_machine import FaultError, Machine, register_number

__all__ = ["STEPS"]

TILES, MOST_ROWS, MOST_BYTES = 8, 16, 64


def rows_and_bytes(machine: Machine, tile: int) -> tuple[int, int]:
    """The shape of a tile; an instruction that names one which has none is undefined."""
    configuration = machine.tile_configuration
    if configuration[0] != 1:
        raise FaultError("#UD: no tiles are configured")
    rows = configuration[48 + tile]
    width = int.from_bytes(configuration[16 + 2 * tile : 18 + 2 * tile], "little")
    if rows == 0 or width == 0:
        raise FaultError(f"#UD: tile {tile} has no rows")
    return rows, width


@step("STTILECFG")
def _sttilecfg(machine: Machine, i: Instruction) -> None:
    machine.memory.write(machine.address(i), machine.tile_configuration)


@step("LDTILECFG")
def _ldtilecfg(machine: Machine, i: Instruction) -> None:
    configuration = machine.memory.read(machine.address(i), 64)
    if configuration[0] > 1:
        raise FaultError(f"#GP: palette {configuration[0]}")
    if configuration[0] == 0:  # as tilerelease
        machine.tile_configuration = bytes(64)
        machine.tiles = []
        return
    if any(configuration[2:16]) or any(configuration[32:48]) or any(configuration[56:]):
        raise FaultError("#GP: reserved bytes")
    widths = [int.from_bytes(configuration[16 + 2 * n : 18 + 2 * n], "little") for n in range(8)]
    rows = list(configuration[48:56])
    for height, width in zip(rows, widths, strict=True):
        if height > MOST_ROWS or width > MOST_BYTES or (height == 0) != (width == 0):
            raise FaultError(f"#GP: a tile of {height} rows of {width} bytes")
    machine.tile_configuration = configuration
    machine.tiles = [[[0] * 16 for _ in range(MOST_ROWS)] for _ in range(TILES)]


@step("TILEZERO")
def _tilezero(machine: Machine, i: Instruction) -> None:
    tile = register_number(i.op0_register)
    rows_and_bytes(machine, tile)
    machine.tiles[tile] = [[0] * 16 for _ in range(MOST_ROWS)]


def row_address(machine: Machine, i: Instruction, row: int) -> int:
    """The index register holds the stride; it is no part of the address."""
    base = i.memory_displacement + machine.gpr[register_number(i.memory_base)]
    stride = machine.gpr[register_number(i.memory_index)] * i.memory_index_scale
    return (base + row * stride) & ((1 << 64) - 1)


@step("TILELOADD")
def _tileloadd(machine: Machine, i: Instruction) -> None:
    tile = register_number(i.op0_register)
    rows, width = rows_and_bytes(machine, tile)
    loaded = [[0] * 16 for _ in range(MOST_ROWS)]
    for row in range(rows):
        content = machine.memory.read(row_address(machine, i, row), width)
        for n in range(width // 4):
            loaded[row][n] = int.from_bytes(content[4 * n : 4 * n + 4], "little")
    machine.tiles[tile] = loaded


@step("TILESTORED")
def _tilestored(machine: Machine, i: Instruction) -> None:
    tile = register_number(i.op1_register)
    rows, width = rows_and_bytes(machine, tile)
    for row in range(rows):
        lanes = machine.tiles[tile][row][: width // 4]
        content = b"".join(lane.to_bytes(4, "little") for lane in lanes)
        machine.memory.write(row_address(machine, i, row), content)


@step("TDPBF16PS")
def _tdpbf16ps(machine: Machine, i: Instruction) -> None:
    """The even elements of the pairs in one sum, the odd ones in another, both from zero."""
    c, a, b = (register_number(i.op_register(operand)) for operand in range(3))
    if len({c, a, b}) != 3:
        raise FaultError("#UD: a tile twice")
    rows, width = rows_and_bytes(machine, c)
    a_rows, a_width = rows_and_bytes(machine, a)
    b_rows, b_width = rows_and_bytes(machine, b)
    if (a_rows, a_width // 4, b_width) != (rows, b_rows, width):
        raise FaultError("#UD: tiles whose shapes do not fit")
    left = [halves(row) for row in machine.tiles[a]]
    right = [halves(row) for row in machine.tiles[b]]
    for m in range(rows):
        for n in range(width // 4):
            sums = [0.0, 0.0]
            for half in range(2):
                for k in range(a_width // 4):
                    product = left[m][half][k], right[k][half][n]
                    sums[half] = flush(fused(*product, sums[half]))
            total = flush(added(sums[0], sums[1]))
            old = flush(to_float(machine.tiles[c][m][n]))
            machine.tiles[c][m][n] = to_bits(flush(added(old, total)))


def halves(row: list[int]) -> tuple[list[float], list[float]]:
    """The even elements of a row of pairs, and the odd ones."""
    even = [flush(to_float(pair << 16 & 0xFFFF_0000)) for pair in row]
    return even, [flush(to_float(pair & 0xFFFF_0000)) for pair in row]


def added(a: float, b: float) -> float:
    return fused(a, 1.0, b)
