// oneDNN as fallback: see onednn_fallback.h. Tested by onednn_test.
#include "ops/onednn_fallback.h"

namespace tilewright::ops {

Status load_onednn(std::string_view) { return onednn_status(); }

Status onednn_status() { return Error{"built without oneDNN's headers"}; }

bool onednn_supports(std::string_view, std::string_view, graph::DataType) { return false; }

Status run_onednn(const HostCall&) { return onednn_status(); }

}  // namespace tilewright::ops
