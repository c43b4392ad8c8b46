// inspect: what was emitted, for people and tools: disassembly and perf's symbol map.
//
// Tested by emit_test, filetests/code.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "jit/base/result.h"

namespace tilewright::jit {

// One instruction per line, Intel syntax, from objdump. Without addresses: jumps go to labels
// ("L0:" stands before its instruction), constants are named by their offset in the code
// ("[0x40]"). `code` is instructions only: the first CodeObject::code_size bytes. The Error names
// objdump when it is not installed.
Result<std::string> disassemble(std::span<const std::byte> code);

// Adds a line to /tmp/perf-<pid>.map, where `perf report` looks for the names of generated code.
// Never follows a link that somebody else put there.
Status write_perf_map(std::string_view name, const void* address, std::size_t size);

}  // namespace tilewright::jit
