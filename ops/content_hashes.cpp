// ContentHashes: see content_hashes.h. Tested by content_hashes_test.
#include "ops/content_hashes.h"

#include <unistd.h>

#include <algorithm>
#include <memory>
#include <system_error>
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
  join();
}

void ContentHashes::begin() {
  try {
    thread_ = std::thread([this] { work(); });
    begun_by_ = getpid();
  } catch (const std::system_error&) {
    // Then all() does everything.
  }
}

void ContentHashes::work() {
  for (std::size_t i = next_++; i < pieces_.size(); i = next_++) {
    of_pieces_[i] = cache::content_hash(pieces_[i], secret_);
  }
}

void ContentHashes::join() {
  // In a child after fork() another thread may have got the same handle: it is neither joined nor
  // detached, but forgotten.
  if (begun_by_ != getpid()) std::construct_at(&thread_);
  if (thread_.joinable()) thread_.join();
}

const std::vector<cache::ContentHash>& ContentHashes::all() {
  if (of_blocks_.size() == blocks_.size()) return of_blocks_;
  if (thread_.joinable() && begun_by_ != getpid()) next_ = 0;
  const std::size_t begun = std::min<std::size_t>(next_, pieces_.size());
  const bool team = pieces_.size() - begun >= kPiecesWorthATeam;
  const int helping = thread_.joinable() && begun_by_ == getpid() ? 1 : 0;
  run_team(team ? std::max(default_threads() - helping, 1) : 1, [this](int, int) { work(); });
  join();
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
