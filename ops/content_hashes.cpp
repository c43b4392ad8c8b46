// ContentHashes: see content_hashes.h. Tested by content_hashes_test.
#include "ops/content_hashes.h"

#include <algorithm>
#include <utility>

#include "ops/threads.h"

namespace tilewright::ops {
namespace {

constexpr std::size_t kPieceBytes = 1 << 20;

// Threads that share less wait for each other longer than they work: the others are asleep at this
// point, and a virtual machine may not run them at once.
constexpr std::size_t kPiecesWorthATeam = 8;

}  // namespace

ContentHashes::ContentHashes(std::vector<Block> blocks, const cache::ContentSecret& secret)
    : blocks_(std::move(blocks)), secret_(secret) {
  for (Block block : blocks_) {
    for (std::size_t at = 0; at < block.size(); at += kPieceBytes) {
      pieces_.push_back(block.subspan(at, std::min(kPieceBytes, block.size() - at)));
    }
    ends_.push_back(pieces_.size());
  }
  of_pieces_.resize(pieces_.size());
}

ContentHashes::~ContentHashes() {
  next_ = pieces_.size();
  thread_.join();
}

void ContentHashes::begin() {
  // Without a thread all() does everything.
  is_begun_ = thread_.begin([this] { work(); });
}

void ContentHashes::work() {
  for (std::size_t i = next_++; i < pieces_.size(); i = next_++) {
    of_pieces_[i] = cache::content_hash(pieces_[i], secret_);
  }
}

const std::vector<cache::ContentHash>& ContentHashes::all() {
  if (complete()) return of_blocks_;
  const bool helped = thread_.begun();
  if (is_begun_ && !helped) next_ = 0;  // a child after fork()
  const std::size_t begun = std::min<std::size_t>(next_, pieces_.size());
  const bool team = pieces_.size() - begun >= kPiecesWorthATeam;
  const int threads = team ? std::max(default_threads() - (helped ? 1 : 0), 1) : 1;
  run_team(threads, [this](int, int) { work(); });
  thread_.join();
  std::size_t begin = 0;
  for (std::size_t end : ends_) {
    const auto of_block = std::span(of_pieces_).subspan(begin, end - begin);
    of_blocks_.push_back(cache::content_hash(std::as_bytes(of_block), secret_));
    begin = end;
  }
  return of_blocks_;
}

std::optional<cache::ContentHash> ContentHashes::find(Block block) {
  const auto is_it = [block](Block known) {
    return known.data() == block.data() && known.size() == block.size();
  };
  const auto found = std::ranges::find_if(blocks_, is_it);
  if (found == blocks_.end()) return std::nullopt;
  return all()[static_cast<std::size_t>(found - blocks_.begin())];
}

}  // namespace tilewright::ops
