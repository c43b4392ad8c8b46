# Writes generator_hash.cpp: the SHA-256 of the paths and contents of the generator's sources and
# of Xbyak's headers, and another of the sources of the passes. Paths are relative, so that two
# checkouts of one source tree share a cache.
# Tested by cache_test and tests/python/test_packaging.py.

# Appends a line for each source below a folder to the variable `lines`.
macro(append_sources folder)
  file(GLOB_RECURSE paths RELATIVE "${SOURCE_DIR}" "${SOURCE_DIR}/${folder}/*.h"
       "${SOURCE_DIR}/${folder}/*.cpp" "${SOURCE_DIR}/${folder}/*.def")
  list(SORT paths)
  foreach(path IN LISTS paths)
    file(SHA256 "${SOURCE_DIR}/${path}" digest)
    string(APPEND lines "${digest} ${path}\n")
  endforeach()
endmacro()

set(lines "")
append_sources(graph)
string(SHA256 passes_hash "${lines}")

set(lines "")
append_sources(jit)
append_sources(ops)
file(GLOB paths RELATIVE "${XBYAK_DIR}" "${XBYAK_DIR}/*.h")
list(SORT paths)
foreach(path IN LISTS paths)
  file(SHA256 "${XBYAK_DIR}/${path}" digest)
  string(APPEND lines "${digest} xbyak/${path}\n")
endforeach()
string(SHA256 hash "${lines}")
file(WRITE "${OUTPUT}"
"// Made by cache/hash_generator.cmake.
#include \"cache/key.h\"

namespace tilewright::cache {
std::string_view generator_hash() { return \"${hash}\"; }
std::string_view passes_hash() { return \"${passes_hash}\"; }
}  // namespace tilewright::cache
")
