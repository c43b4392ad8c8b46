"""A small machine that executes the AVX-512 and AMX code that emission produces, on any computer.

Machines without AVX-512 cannot run that code, and its emitter cannot judge itself. So iced-x86
decodes the bytes, and this machine executes them: general registers, zmm, mask and tile registers,
flags, and memory in which every byte that a kernel may touch is named. What each instruction does
is in avx512_instructions.py and amx_instructions.py, written after Intel's manual.

Tested by test_avx512_machine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import iced_x86
from iced_x86 import Instruction, OpKind, Register

U64 = (1 << 64) - 1
CODE_BASE = 0x7F31_0000_0000
STACK_TOP = 0x7FFF_0000_0000
STACK_SIZE = 1 << 16
RETURN_ADDRESS = 0xDEAD_0000  # where no code is: the run ends there
CALLEE_SAVED = (3, 5, 12, 13, 14, 15)
RSP, RDI = 4, 7


class UnsupportedError(Exception):
    """An instruction that the machine does not know."""


class FaultError(Exception):
    """An access to memory that nobody gave to the kernel, or a broken promise of the ABI."""


class Memory:
    """Separate regions of bytes; everything between them faults."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, bytearray, bool]] = []

    def map(self, address: int, content: bytes, writable: bool) -> bytearray:
        storage = bytearray(content)
        self._regions.append((address, storage, writable))
        return storage

    def _find(self, address: int, size: int, write: bool) -> tuple[bytearray, int]:
        for base, storage, writable in self._regions:
            if base <= address and address + size <= base + len(storage):
                if write and not writable:
                    raise FaultError(f"a write of {size} bytes to read-only {address:#x}")
                return storage, address - base
        raise FaultError(f"{'write' if write else 'read'} of {size} bytes at {address:#x}")

    def read(self, address: int, size: int) -> bytes:
        if size == 0:
            return b""
        storage, offset = self._find(address, size, False)
        return bytes(storage[offset : offset + size])

    def write(self, address: int, content: bytes) -> None:
        if content:
            storage, offset = self._find(address, len(content), True)
            storage[offset : offset + len(content)] = content


Lanes = list[int]  # of a vector, as unsigned 32-bit integers
Step = Callable[["Machine", Instruction], None]


class Machine:
    """Registers and memory; run() executes one kernel."""

    def __init__(self, code: bytes, code_size: int, steps: Mapping[str, Step]) -> None:
        self._steps = steps
        self.memory = Memory()
        self.memory.map(CODE_BASE, code, writable=False)
        self.memory.map(STACK_TOP - STACK_SIZE, bytes(STACK_SIZE), writable=True)
        decoder = iced_x86.Decoder(64, code[:code_size], ip=CODE_BASE)
        self._instructions = {instruction.ip: instruction for instruction in decoder}
        self.gpr = [0x1111_1111 * (i + 1) for i in range(16)]
        self.zmm = [[0xFFFF_FFFF] * 16 for _ in range(32)]  # NaN: nothing may be assumed
        self.k = [0xFFFF] * 8
        self.tile_configuration = bytes(64)  # nothing is configured
        self.tiles: list[list[Lanes]] = []
        self.zero = self.sign = self.overflow = False
        self.ip = CODE_BASE

    def run(self, args_address: int, step_limit: int = 1_000_000) -> None:
        """Calls the kernel and checks what it promises its caller."""
        self.gpr[RSP] = STACK_TOP - 4096
        self.push(RETURN_ADDRESS)
        self.gpr[RDI] = args_address
        before = list(self.gpr)
        for _ in range(step_limit):
            if self.ip == RETURN_ADDRESS:
                break
            instruction = self._instructions.get(self.ip)
            if instruction is None:
                raise FaultError(f"a jump to {self.ip:#x}, where no instruction begins")
            self.ip = instruction.next_ip
            self.execute(instruction)
        else:
            raise FaultError("the kernel does not end")
        if any(self.gpr[i] != before[i] for i in CALLEE_SAVED):
            raise FaultError("a callee-saved register has changed")
        if self.gpr[RSP] != before[RSP] + 8:
            raise FaultError("rsp has changed")
        if any(self.tile_configuration):
            raise FaultError("the thread's tiles are not as they were")

    def execute(self, instruction: Instruction) -> None:
        name = MNEMONICS[instruction.mnemonic]
        step = self._steps.get(name)
        if step is None:
            raise UnsupportedError(f"{name}: {instruction}")
        step(self, instruction)

    # --- operands

    def address(self, instruction: Instruction) -> int:
        if instruction.is_ip_rel_memory_operand:
            return instruction.ip_rel_memory_address
        address = instruction.memory_displacement
        if instruction.memory_base != Register.NONE:
            address += self.gpr[register_number(instruction.memory_base)]
        if instruction.memory_index != Register.NONE:
            index = self.gpr[register_number(instruction.memory_index)]
            address += index * instruction.memory_index_scale
        return address & U64

    def get(self, instruction: Instruction, operand: int, size: int | None = None) -> int:
        """A general operand as an unsigned integer; immediates sign-extended to 64 bits."""
        kind = instruction.op_kind(operand)
        if kind == OpKind.MEMORY:
            width = size or memory_size(instruction)
            return int.from_bytes(self.memory.read(self.address(instruction), width), "little")
        if kind == OpKind.REGISTER:
            register = instruction.op_register(operand)
            value = self.gpr[register_number(register)]
            return value & ((1 << (8 * register_size(register))) - 1)
        return instruction.immediate(operand) & U64

    def put(self, instruction: Instruction, value: int) -> None:
        """To operand 0; a 32-bit result clears the upper half of its register."""
        if instruction.op0_kind == OpKind.MEMORY:
            size = memory_size(instruction)
            content = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
            self.memory.write(self.address(instruction), content)
            return
        size = register_size(instruction.op0_register)
        if size < 4:
            raise UnsupportedError(f"a {size}-byte register as a result: {instruction}")
        self.gpr[register_number(instruction.op0_register)] = value & ((1 << (8 * size)) - 1)

    def push(self, value: int) -> None:
        self.gpr[RSP] -= 8
        self.memory.write(self.gpr[RSP], value.to_bytes(8, "little"))

    def pop(self) -> int:
        value = int.from_bytes(self.memory.read(self.gpr[RSP], 8), "little")
        self.gpr[RSP] += 8
        return value

    def mask(self, instruction: Instruction) -> int:
        if instruction.op_mask == Register.NONE:
            return 0xFFFF
        return self.k[register_number(instruction.op_mask)]

    def lanes(self, instruction: Instruction, operand: int) -> Lanes:
        """A vector operand, all 16 lanes; from memory, as many as the destination has."""
        if instruction.op_kind(operand) == OpKind.REGISTER:
            return list(self.zmm[register_number(instruction.op_register(operand))])
        if instruction.is_broadcast:
            raise UnsupportedError(f"embedded broadcast: {instruction}")
        return self.load(instruction, 4, vector_lanes(instruction))

    def load(self, instruction: Instruction, size: int, count: int) -> Lanes:
        """`count` elements of `size` bytes; those outside the mask are 0 and are not touched."""
        address = self.address(instruction)
        mask = self.mask(instruction)
        return [
            int.from_bytes(self.memory.read(address + i * size, size), "little")
            if mask >> i & 1
            else 0
            for i in range(count)
        ] + [0] * (16 - count)

    def store(self, instruction: Instruction, values: Lanes, size: int, count: int) -> None:
        address = self.address(instruction)
        mask = self.mask(instruction)
        for i in range(count):
            if mask >> i & 1:
                low = values[i] & ((1 << (8 * size)) - 1)
                self.memory.write(address + i * size, low.to_bytes(size, "little"))

    def put_lanes(self, instruction: Instruction, values: Lanes) -> None:
        """To the register operand 0: zeroing masks apply, lanes beyond its width become 0."""
        register = instruction.op0_register
        if instruction.op_mask != Register.NONE and not instruction.zeroing_masking:
            raise UnsupportedError(f"merging: {instruction}")
        mask = self.mask(instruction)
        width = register_size(register) // 4
        self.zmm[register_number(register)] = [
            value if i < width and mask >> i & 1 else 0 for i, value in enumerate(values)
        ]

    def set_flags(self, result: int, overflow: bool = False) -> None:
        self.zero = result & U64 == 0
        self.sign = bool(result >> 63 & 1)
        self.overflow = overflow


MNEMONICS = {
    value: name
    for name, value in vars(iced_x86.Mnemonic).items()
    if name.isupper() and isinstance(value, int)
}


def register_number(register: int) -> int:
    """Of the whole register: dil and sil count as rdi and rsi (ah to bh are never used)."""
    return iced_x86.RegisterExt.number(iced_x86.RegisterExt.full_register(register))


def register_size(register: int) -> int:
    return iced_x86.RegisterExt.size(register)


def memory_size(instruction: Instruction) -> int:
    return iced_x86.MemorySizeExt.size(instruction.memory_size)


def vector_lanes(instruction: Instruction) -> int:
    """Of the vector registers that an instruction works on."""
    sizes = [
        register_size(instruction.op_register(i))
        for i in range(instruction.op_count)
        if instruction.op_kind(i) == OpKind.REGISTER
        and iced_x86.RegisterExt.is_vector_register(instruction.op_register(i))
    ]
    return max(sizes) // 4
