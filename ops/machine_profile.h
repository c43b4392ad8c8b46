// MachineProfile: choices (choices.h) that `tilewright tune` found faster on one machine than the
// shipped ones, in a file of the user.
//
// A JSON object: "tilewright" (the format, 1), "cpu" ("AuthenticAMD 25/1/1"), "generator" (the hash
// of the build that measured, cache/key.h), "choices" (those that differ) and anything else for
// people, which is not read. Choices change speed only, and every value is checked, so a profile
// cannot make a result wrong; it is read all the same through the checks of cache/trusted_file.h.
// One of another CPU, of another build (whose kernels were others) or that is broken is not used,
// with a warning that says why.
//
// Thread-safe. Tested by choices_test and tests/python/test_tune.py.
#pragma once

#include <string>
#include <string_view>

#include "jit/base/result.h"
#include "jit/base/target.h"
#include "ops/choices.h"

namespace tilewright::ops {

// Where the user's own is: $XDG_CONFIG_HOME/tilewright/profile.json or
// $HOME/.config/tilewright/profile.json; empty if there is no such place.
std::string default_profile_path();

// The text of a profile for this CPU and this build. choices, measured: JSON objects. Error: they
// are not, or a choice is unknown or out of range.
Result<std::string> print_profile(const CpuModel& cpu, std::string_view choices,
                                  std::string_view measured);
// `shipped` with a profile's choices. Error: why it must not be used on this CPU by this build.
Result<Choices> read_profile(const CpuModel& cpu, const Choices& shipped, std::string_view text);

// The choices for a host: a profile's where there is one, else the shipped ones. setting: that of
// TILEWRIGHT_PROFILE. A missing file is a problem only if it was named.
Decision decide(const Target& host, const std::string& setting);

}  // namespace tilewright::ops
