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

Reg KeyBlocks::take(Reg remaining, Reg most) {
  Reg taken = b_.min(most, remaining);
  // The loop takes one away itself.
  b_.assign(remaining, b_.add(b_.sub(remaining, taken), 1));
  return taken;
}

KeyBlocks::Place KeyBlocks::first() { return {saved(kFirstBlock), saved(kFirstToken)}; }

Reg KeyBlocks::address(const Table& table, const Place& place) {
  Reg block = b_.load_gpr(Element::i64, b_.at(b_.arg(table.blocks), place.entry, 1));
  if (table.scales) {
    return b_.lea(b_.at(block, b_.sub(place.token, b_.arg(slots_.block_tokens)), kScaleBytes));
  }
  b_.add_to(block, b_.mul(place.token, b_.arg(table.stride)));
  return block;
}

void KeyBlocks::walk(const Place& place, Reg keys, std::span<const Table> tables,
                     const Body& body) {
  b_.loop(keys, [&] {
    std::vector<Reg> addresses;
    for (const Table& table : tables) addresses.push_back(address(table, place));
    Reg tokens = take(keys, b_.sub(b_.arg(slots_.block_tokens), place.token));
    b_.add_to(place.token, tokens);
    // At its end, on to the next block.
    Reg stays = b_.min(b_.sub(b_.arg(slots_.block_tokens), place.token), b_.constant(1));
    b_.assign(place.token, b_.mul(place.token, stays));
    b_.assign(place.entry, b_.add(b_.sub(place.entry, b_.shift_left(stays, 3)), 8));
    body(addresses, tokens);
  });
}

}  // namespace tilewright::ops
