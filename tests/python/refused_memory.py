"""Runs a command in a process to which the system refuses executable memory.

    python refused_memory.py mdwe|seccomp COMMAND [ARGUMENT ...]

mdwe: prctl(PR_SET_MDWE), Linux 6.3. seccomp: a filter that answers EPERM to mprotect and to
anonymous mmap with PROT_EXEC; mapping the file of a library, as the loader does, stays allowed.
Both last over exec. Exit code 77: this kernel does not know it.

Used by test_refused_memory.py.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

UNSUPPORTED = 77
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MDWE = 38, 22, 65
EPERM = 1
PROT_EXEC, MAP_ANONYMOUS = 4, 0x20
MMAP, MPROTECT, PKEY_MPROTECT = 9, 10, 329  # of x86-64
# Of struct seccomp_data: the number of the call, the low halves of its arguments.
NUMBER, PROTECTION, FLAGS = 0, 32, 40
# Classic BPF: load a word, jump if equal, jump if a bit is set, return.
LOAD, IF_EQUAL, IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | EPERM
FILTER = [  # an instruction, where to go (how many to leave out) if it holds and if not, a number
    (LOAD, 0, 0, NUMBER),
    (IF_EQUAL, 4, 0, MPROTECT),
    (IF_EQUAL, 3, 0, PKEY_MPROTECT),
    (IF_EQUAL, 0, 4, MMAP),
    (LOAD, 0, 0, FLAGS),
    (IF_SET, 0, 2, MAP_ANONYMOUS),
    (LOAD, 0, 0, PROTECTION),
    (IF_SET, 1, 0, PROT_EXEC),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, REFUSE),
]


def prctl(option: int, *arguments: int) -> bool:
    rest = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return bool(ctypes.CDLL(None).prctl(ctypes.c_int(option), *rest) == 0)


def refuse(how: str) -> bool:
    """From now on, for this thread and what it starts. False: this kernel does not know it."""
    if how == "mdwe":
        return prctl(PR_SET_MDWE, 1)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in FILTER)
    memory = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(FILTER), ctypes.addressof(memory))
    by_address = ctypes.create_string_buffer(program, len(program))
    return prctl(PR_SET_NO_NEW_PRIVS, 1) and prctl(PR_SET_SECCOMP, 2, ctypes.addressof(by_address))


if __name__ == "__main__":
    if not refuse(sys.argv[1]):
        sys.exit(UNSUPPORTED)
    os.execvp(sys.argv[2], sys.argv[2:])
