// See key_blocks.h.
//
// Tested by attention_test and prefill_attention_test.
#include "ops/attention/key_blocks.h"

namespace tilewright::ops {

using jit::vir::Element;
using jit::vir::Reg;

namespace {

constexpr std::int64_t kFirstBlock = 0;  // i64: offset in the tables of first_key's block
constexpr std::int64_t kFirstToken = 8;  // i64: tokens of that block before first_key

}  // namespace

Reg KeyBlocks::saved(std::int64_t offset) {
  return b_.load_gpr(Element::i64, b_.at(b_.arg(slots_.scratch), slots_.offset + offset));
}

void KeyBlocks::save(std::int64_t offset, Reg value) {
  b_.store_gpr(Element::i64, b_.at(b_.arg(slots_.scratch), slots_.offset + offset), value);
}

void KeyBlocks::find_first() {
  Reg block = b_.constant(0);
  Reg token = b_.arg(slots_.first_key);
  Reg per_block = b_.arg(slots_.block_tokens);
  // While token >= per_block; the counter is kept at token - per_block + 1.
  Reg more = b_.add(b_.sub(token, per_block), 1);
  b_.loop(more, [&] {
    b_.add_to(block, 8);
    b_.assign(token, b_.sub(token, per_block));
    b_.assign(more, b_.add(b_.sub(token, per_block), 2));
  });
  save(kFirstBlock, block);
  save(kFirstToken, token);
}

Reg KeyBlocks::key_count() {
  Reg none = b_.constant(0);
  return b_.max(none, b_.arg(slots_.key_count));
}

void KeyBlocks::walk(int table, int stride, const std::function<void(Reg, Reg)>& body) {
  Reg entry = saved(kFirstBlock);
  b_.add_to(entry, b_.arg(table));
  Reg skipped = saved(kFirstToken);
  Reg remaining = key_count();
  b_.loop(remaining, [&] {
    Reg tokens = b_.min(b_.sub(b_.arg(slots_.block_tokens), skipped), remaining);
    Reg token = b_.load_gpr(Element::i64, b_.at(entry));
    b_.add_to(token, b_.mul(skipped, b_.arg(stride)));
    b_.add_to(entry, 8);
    b_.assign(skipped, b_.constant(0));
    // The loop takes one away itself.
    b_.assign(remaining, b_.add(b_.sub(remaining, tokens), 1));
    body(token, tokens);
  });
}

}  // namespace tilewright::ops
