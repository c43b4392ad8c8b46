// A small Llama-shaped decoder as graph text, spelled out as the front end delivers it before any
// pass has run.
//
// cached: keys and values go to cache parameters (llm.optimize); otherwise they are plain tensors
// that grow by cat (torch.compile with a dynamic cache). all_rows: logits of every token, else of
// the last one. Shapes are odd on purpose: tails everywhere.
//
// Used by program_test, in_place_test, amx_program_test.
#pragma once

#include <fmt/format.h>

#include <map>
#include <string>
#include <vector>

namespace tilewright {

struct LlamaShape {
  int layers = 2, hidden = 40, heads = 4, kv_heads = 2, head_dim = 10, intermediate = 52,
      vocabulary = 61;
};

struct LlamaText {
  std::string text;
  std::map<std::string, std::vector<std::int64_t>> constants;  // shapes
};

// stored: the type of the caches' elements; empty: the model's.
inline LlamaText llama_graph(const LlamaShape& shape, bool cached, const std::string& dtype = "f32",
                             bool all_rows = false, const std::string& stored = "") {
  LlamaText result;
  const std::string cache_type = fmt::format("cache<{}, {} x {}>", stored.empty() ? dtype : stored,
                                             shape.kv_heads, shape.head_dim);
  std::string body;
  int next = 0;
  auto emit = [&](const std::string& expression) {
    const std::string name = fmt::format("%t{}", next++);
    body += fmt::format("  {} = {}\n", name, expression);
    return name;
  };
  auto type = [&](const std::string& dims) { return fmt::format("{}[{}]", dtype, dims); };
  auto weight = [&](const std::string& name, std::vector<std::int64_t> dims) {
    result.constants[name] = dims;
    return emit(fmt::format("const \"{}\" : {}[{}]", name, dtype, fmt::join(dims, ", ")));
  };
  auto scalar = [&](double value) {
    return emit(fmt::format("scalar {{value = {}}} : f32[]",
                            value == 2 ? "2.0" : fmt::format("{}", value)));
  };
  const std::string rows = fmt::format("b, s, {}", shape.hidden);
  const std::string one = "b, s, 1";

  auto norm = [&](const std::string& x, const std::string& name) {
    const std::string w = weight(name, {shape.hidden});
    const std::string wide = emit(fmt::format("convert({}) {{dtype = f32}} : f32[{}]", x, rows));
    const std::string squares =
        emit(fmt::format("pow({}) {{exponent = 2.0}} : f32[{}]", wide, rows));
    const std::string mean = emit(fmt::format("mean({}) : f32[{}]", squares, one));
    const std::string shifted =
        emit(fmt::format("add({}, {}) : f32[{}]", mean, scalar(1e-05), one));
    const std::string scale = emit(fmt::format("rsqrt({}) : f32[{}]", shifted, one));
    const std::string scaled = emit(fmt::format("mul({}, {}) : f32[{}]", wide, scale, rows));
    const std::string narrow =
        emit(fmt::format("convert({}) {{dtype = {}}} : {}", scaled, dtype, type(rows)));
    return emit(fmt::format("mul({}, {}) : {}", w, narrow, type(rows)));
  };
  auto linear = [&](const std::string& x, const std::string& name, int n, int k) {
    const std::string w = weight(name, {n, k});
    return emit(fmt::format("linear({}, {}) : {}", x, w, type(fmt::format("b, s, {}", n))));
  };
  auto heads = [&](const std::string& x, int count) {
    const std::string split =
        emit(fmt::format("reshape({}) {{shape = [b, s, {}, {}]}} : {}", x, count, shape.head_dim,
                         type(fmt::format("b, s, {}, {}", count, shape.head_dim))));
    return emit(fmt::format("permute({}) {{order = [0, 2, 1, 3]}} : {}", split,
                            type(fmt::format("b, {}, s, {}", count, shape.head_dim))));
  };
  std::string cosine, sine;
  auto rope = [&](const std::string& x, int count) {
    const int half = shape.head_dim / 2;
    const std::string whole = fmt::format("b, {}, s, {}", count, shape.head_dim);
    const std::string part = fmt::format("b, {}, s, {}", count, half);
    const std::string a = emit(fmt::format("mul({}, {}) : {}", x, cosine, type(whole)));
    const std::string low = emit(
        fmt::format("slice({}) {{axis = 3, start = [0], end = [{}]}} : {}", x, half, type(part)));
    const std::string high =
        emit(fmt::format("slice({}) {{axis = 3, start = [{}], end = [{}]}} : {}", x, half,
                         shape.head_dim, type(part)));
    const std::string minus = emit(fmt::format("neg({}) : {}", high, type(part)));
    const std::string turned =
        emit(fmt::format("cat({}, {}) {{axis = 3}} : {}", minus, low, type(whole)));
    const std::string b = emit(fmt::format("mul({}, {}) : {}", turned, sine, type(whole)));
    return emit(fmt::format("add({}, {}) : {}", a, b, type(whole)));
  };

  std::string parameters = fmt::format("%ids: i64[b, s], %positions: i64[b, s]");
  std::string outputs, output_types;
  for (int layer = 0; layer < shape.layers; ++layer) {
    if (cached) {
      parameters += fmt::format(", %kv{}: {}", layer, cache_type);
    } else {
      for (const char* kind : {"k", "v"}) {
        parameters += fmt::format(", %{0}{1}: {2}[b, {3}, past_{0}{1}, {4}]", kind, layer, dtype,
                                  shape.kv_heads, shape.head_dim);
      }
    }
  }

  const std::string table = weight("embed", {shape.vocabulary, shape.hidden});
  std::string x = emit(fmt::format("embedding({}, %ids) : {}", table, type(rows)));
  const int half = shape.head_dim / 2;
  result.constants["inv_freq"] = {half};
  const std::string frequencies = emit(fmt::format("const \"inv_freq\" : f32[{}]", half));
  const std::string column =
      emit(fmt::format("reshape(%positions) {{shape = [{0}]}} : i64[{0}]", one));
  const std::string places =
      emit(fmt::format("convert({}) {{dtype = f32}} : f32[{}]", column, one));
  const std::string angles =
      emit(fmt::format("mul({}, {}) : f32[b, s, {}]", places, frequencies, half));
  const std::string both =
      emit(fmt::format("cat({0}, {0}) {{axis = 2}} : f32[b, s, {1}]", angles, shape.head_dim));
  for (auto [name, op] : {std::pair{&cosine, "cos"}, std::pair{&sine, "sin"}}) {
    const std::string value = emit(fmt::format("{}({}) : f32[b, s, {}]", op, both, shape.head_dim));
    const std::string narrow = emit(fmt::format("convert({}) {{dtype = {}}} : {}", value, dtype,
                                                type(fmt::format("b, s, {}", shape.head_dim))));
    *name = emit(fmt::format("reshape({}) {{shape = [b, 1, s, {}]}} : {}", narrow, shape.head_dim,
                             type(fmt::format("b, 1, s, {}", shape.head_dim))));
  }
  for (int layer = 0; layer < shape.layers; ++layer) {
    auto name = [&](const char* part) { return fmt::format("layers.{}.{}", layer, part); };
    const std::string n = norm(x, name("input_norm"));
    const std::string q =
        rope(heads(linear(n, name("q"), shape.heads * shape.head_dim, shape.hidden), shape.heads),
             shape.heads);
    std::string k = rope(
        heads(linear(n, name("k"), shape.kv_heads * shape.head_dim, shape.hidden), shape.kv_heads),
        shape.kv_heads);
    std::string v =
        heads(linear(n, name("v"), shape.kv_heads * shape.head_dim, shape.hidden), shape.kv_heads);
    const std::string out = type(fmt::format("b, {}, s, {}", shape.heads, shape.head_dim));
    std::string attended;
    if (cached) {
      const std::string cache =
          emit(fmt::format("kv_append(%kv{}, {}, {}) : {}", layer, k, v, cache_type));
      attended = emit(
          fmt::format("attention({}, {}) {{scale = 0.25, causal = true}} : {}", q, cache, out));
    } else {
      for (auto [value, kind] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
        const std::string grown = type(
            fmt::format("b, {}, past_{}{} + s, {}", shape.kv_heads, kind, layer, shape.head_dim));
        *value = emit(fmt::format("cat(%{}{}, {}) {{axis = 2}} : {}", kind, layer, *value, grown));
        outputs += *value + ", ";
        output_types += grown + ", ";
      }
      attended = emit(
          fmt::format("attention({}, {}, {}) {{scale = 0.25, causal = false}} : {}", q, k, v, out));
    }
    const std::string moved =
        emit(fmt::format("permute({}) {{order = [0, 2, 1, 3]}} : {}", attended,
                         type(fmt::format("b, s, {}, {}", shape.heads, shape.head_dim))));
    const std::string joined = fmt::format("b, s, {}", shape.heads * shape.head_dim);
    const std::string flat =
        emit(fmt::format("reshape({0}) {{shape = [{1}]}} : {2}", moved, joined, type(joined)));
    const std::string projected =
        linear(flat, name("o"), shape.hidden, shape.heads * shape.head_dim);
    x = emit(fmt::format("add({}, {}) : {}", x, projected, type(rows)));
    const std::string m = norm(x, name("post_norm"));
    const std::string wide = type(fmt::format("b, s, {}", shape.intermediate));
    const std::string gate = linear(m, name("gate"), shape.intermediate, shape.hidden);
    const std::string active = emit(fmt::format("silu({}) : {}", gate, wide));
    const std::string up = linear(m, name("up"), shape.intermediate, shape.hidden);
    const std::string product = emit(fmt::format("mul({}, {}) : {}", active, up, wide));
    const std::string down = linear(product, name("down"), shape.hidden, shape.intermediate);
    x = emit(fmt::format("add({}, {}) : {}", x, down, type(rows)));
  }
  const std::string final_norm = norm(x, "norm");
  const std::string kept = all_rows ? "s" : "1";
  const std::string last = emit(fmt::format("slice({}) {{axis = 1, start = [{}], end = [s]}} : {}",
                                            final_norm, all_rows ? "0" : "s - 1",
                                            type(fmt::format("b, {}, {}", kept, shape.hidden))));
  const std::string logits = type(fmt::format("b, {}, {}", kept, shape.vocabulary));
  const std::string head = emit(fmt::format("linear({}, {}) : {}", last, table, logits));
  result.text = fmt::format("graph llama({}) -> ({}{}) {{\n{}  return {}{}\n}}\n", parameters,
                            output_types, logits, body, outputs, head);
  return result;
}

}  // namespace tilewright
