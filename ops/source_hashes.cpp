// See source_hashes.h. Tested by source_hashes_test.
#include "ops/source_hashes.h"

#include <algorithm>
#include <map>
#include <utility>

#include "ops/clean_pages.h"

namespace tilewright::ops {

SourceHashes::SourceHashes(std::vector<Block> blocks, cache::WeightDirectory& directory,
                           Options options)
    : blocks_(std::move(blocks)),
      directory_(directory),
      contents_(directory.file_contents()),
      options_(options) {
  thread_.begin([this] { looked_up_ = look_up(); });
}

SourceHashes::LookedUp& SourceHashes::looked_up() {
  thread_.join();
  if (!looked_up_) looked_up_ = look_up();  // no thread, no memory, or a child after fork()
  return *looked_up_;
}

std::unique_ptr<SourceHashes::LookedUp> SourceHashes::look_up() const {
  auto found = std::make_unique<LookedUp>();
  const bool learns = directory_.keeps_file_contents();
  MappedFiles files = MappedFiles::read();
  std::map<int, std::optional<cache::FileState>> lasting;  // by descriptor
  const auto lasting_state = [&](int file) {
    const auto [known, is_new] = lasting.try_emplace(file);
    if (is_new) known->second = cache::lasting_state(file, options_.age);
    return known->second;
  };

  std::vector<Block> unknown;
  for (Block block : blocks_) {
    const auto place = files.find(block);
    if (place && !options_.read_all && holds_its_file(block)) {
      const auto state = cache::state_of(place->file->get());
      const auto hash = state ? contents_.find(*state, place->part) : std::nullopt;
      if (hash) {
        found->known.push_back({block, *hash});
        continue;
      }
    }
    if (place && learns) {
      if (const auto state = lasting_state(place->file->get())) {
        found->unlearned.push_back({block, *place, *state});
      }
    }
    unknown.push_back(block);
  }
  found->hashes.emplace(std::move(unknown), *directory_.secret(false));
  found->hashes->begin();
  return found;
}

std::optional<cache::ContentHash> SourceHashes::find(Block block) {
  const auto is_it = [block](const Known& known) {
    return known.block.data() == block.data() && known.block.size() == block.size();
  };
  LookedUp& all = looked_up();
  const auto found = std::ranges::find_if(all.known, is_it);
  if (found != all.known.end()) return found->hash;
  return all.hashes->find(block);
}

void SourceHashes::wait() {
  looked_up().hashes->all();
  learn();
}

void SourceHashes::learn() {
  LookedUp& all = looked_up();
  if (all.unlearned.empty() || !all.hashes->complete()) return;
  cache::FileContents contents = directory_.file_contents();  // others may have learned meanwhile
  bool any = false;
  for (const Unknown& source : all.unlearned) {
    // What was hashed was memory: it was the file's if nobody has written either until now.
    if (cache::state_of(source.place.file->get()) != source.state) continue;
    if (!holds_its_file(source.block)) continue;
    contents.add(source.state, source.place.part, *all.hashes->find(source.block));
    any = true;
  }
  all.unlearned.clear();
  if (any) directory_.save(contents);
}

}  // namespace tilewright::ops
