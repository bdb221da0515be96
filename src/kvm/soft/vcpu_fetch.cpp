// From RIP to a decoded block: the jump table by linear address, the block cache by place, the decoder.
#include <algorithm>

#include "kvm/soft/mmu/host_access.hpp"
#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr unsigned max_block_instructions = 64;
constexpr unsigned max_instruction_bytes = 15;

}  // namespace

Block* SoftVcpu::lookup(uint64_t linear, Block* from) noexcept {
  Block::Link& jump = (*jumps_)[jump_hash(linear)];
  if (jump.linear != linear || jump.key != cpu_.decode_key || jump.flushes != cpu_.flushes) {
    Block* block = lookup_slowly(linear, cpu_.decode_key);
    if (block == nullptr) return nullptr;
    // `from` may be gone when the flush count has moved.
    if (from != nullptr && from_flushes_ != cpu_.flushes) from = nullptr;
    jump = {.linear = linear, .key = cpu_.decode_key, .flushes = cpu_.flushes, .block = block};
  }
  if (from != nullptr) from->links[from->next_link++ & 1] = jump;
  return jump.block;
}

Block* SoftVcpu::lookup_slowly(uint64_t linear, uint32_t key) noexcept {
  const Segment& cs = cpu_.segment[seg_cs];
  const bool wide = cpu_.mode() == Mode::bits64;
  if (wide ? !cpu_.canonical(linear) : cpu_.rip > cs.limit) {
    cpu_.raise(Exception::gp, 0);
    return nullptr;
  }
  uint64_t gpa = 0;
  bool failed = false;
  const uint8_t* host =
      cpu_.resolve(linear, Cpu::Access::fetch, cpu_.cpl() == 3 ? 0 : cpu_.view(), gpa, failed);
  if (host == nullptr) {
    fetch_failed_ = !failed;
    return nullptr;
  }
  Block* block = blocks_.find(reinterpret_cast<uint64_t>(host), key);
  if (block != nullptr && block->fresh()) {
    bool usable = wide || cpu_.rip + block->bytes - 1 <= cs.limit;
    if (usable && block->host_page[1] != 0) {
      const uint8_t* second =
          cpu_.resolve((linear | page_mask) + 1, Cpu::Access::fetch, cpu_.view(), gpa, failed);
      // Mapped elsewhere, or gone: decoding anew raises the fault that is due, if any.
      usable = reinterpret_cast<uint64_t>(second) == block->host_page[1];
      cpu_.pending.valid = false;
      cpu_.run_alone = false;
    }
    if (usable) return block;
  }
  std::unique_ptr<Block> fresh = decode(linear, key, max_block_instructions);
  if (!fresh) return nullptr;
  bool dropped = false;
  block = blocks_.insert(std::move(fresh), dropped);
  if (dropped) ++cpu_.flushes;  // the jump table may point there
  return block;
}

uint64_t SoftVcpu::fetch_page(uint64_t linear, Block& block, unsigned which) noexcept {
  for (;;) {
    uint64_t gpa = 0;
    bool failed = false;
    const uint8_t* host = cpu_.resolve(linear, Cpu::Access::fetch, cpu_.view(), gpa, failed);
    if (host == nullptr) {
      fetch_failed_ = !failed;
      return 0;
    }
    Cpu::Translation translation;
    if (!cpu_.translate(linear, Cpu::Access::fetch, cpu_.view(), translation)) return 0;
    Slot* slot = cpu_.memory->find(translation.gpa);
    if (slot == nullptr) {
      fetch_failed_ = true;
      return 0;
    }
    const uint64_t page = slot->page(translation.gpa);
    std::atomic<uint32_t>& word = slot->code(page);
    const uint64_t host_page = reinterpret_cast<uint64_t>(slot->host) + (page << page_shift);
    if ((word.load() & Slot::has_code) == 0) {
      const auto map = map_;  // keeps the slot while others may make us let go of it
      if (!slot->mark_code(page)) {
        if (vm_.forget_code()) continue;
        word.fetch_or(Slot::has_code);  // nothing of ours to give up: unguarded
      }
      drop_write_tags(host_page);
      vm_.shoot_down(*this, host_page);
      if (map != map_) continue;
    }
    block.word[which] = &word;
    block.word_value[which] = word.load();
    if ((block.word_value[which] & Slot::has_code) == 0) continue;  // written to meanwhile
    block.host_page[which] = host_page;
    return host_page | (linear & page_mask);
  }
}

std::unique_ptr<Block> SoftVcpu::decode(uint64_t linear, uint32_t key, unsigned limit) noexcept {
  const Segment& cs = cpu_.segment[seg_cs];
  const bool wide = cpu_.mode() == Mode::bits64;
  if (wide ? !cpu_.canonical(linear) : cpu_.rip > cs.limit) {
    cpu_.raise(Exception::gp, 0);
    return nullptr;
  }
  auto block = std::make_unique<Block>();
  block->key = key;
  const auto map = map_;
  block->host = fetch_page(linear, *block, 0);
  if (block->host == 0) return nullptr;
  block->map = map_;
  const auto* code = reinterpret_cast<const uint8_t*>(block->host);
  const auto in_page = static_cast<unsigned>(page_size - (linear & page_mask));
  if (limit == max_block_instructions) {
    // Only code without a CS limit is translated, so none can end what is found here earlier.
    if (translator_ && translator_->adopt(*block)) return block;
    ++counts_.decoded;
  }

  std::vector<Op> ops;
  unsigned offset = 0;
  bool last = false;
  while (!last && block->instructions < limit && offset < in_page) {
    uint8_t bytes[max_instruction_bytes];
    unsigned available = std::min(in_page - offset, max_instruction_bytes);
    host_read(reinterpret_cast<uint64_t>(code) + offset, bytes, available);
    if (!wide) {
      const uint64_t left = uint64_t{cs.limit} + 1 - (cpu_.rip + offset);
      if (left < available) available = static_cast<unsigned>(left);
    }
    Op op;
    op.offset = static_cast<uint16_t>(offset);
    Decoder::Result result = decoder_.decode(cpu_, cpu_.rip, bytes, available, op);
    if (result == Decoder::Result::more) {
      if (block->instructions > 0) break;  // a block of its own, so that its fault is its own
      if (available < in_page) {           // CS limit
        cpu_.raise(Exception::gp, 0);
        return nullptr;
      }
      uint64_t next = linear + in_page;
      if (!wide) next = static_cast<uint32_t>(next);
      const uint64_t second = fetch_page(next, *block, 1);
      if (second == 0) return nullptr;
      if (map != map_) return decode(linear, key, limit);
      host_read(second, bytes + available, max_instruction_bytes - available);
      unsigned total = max_instruction_bytes;
      if (!wide) total = static_cast<unsigned>(std::min<uint64_t>(total, uint64_t{cs.limit} + 1 - cpu_.rip));
      op = {};
      result = decoder_.decode(cpu_, cpu_.rip, bytes, total, op);
      if (result == Decoder::Result::more) {
        cpu_.raise(Exception::gp, 0);
        return nullptr;
      }
      last = true;
    }
    if (result == Decoder::Result::undefined && block->instructions > 0) break;
    last = last || result != Decoder::Result::ok;
    ops.push_back(op);
    offset += op.length;
    ++block->instructions;
  }
  block->bytes = offset;
  ops.push_back(Decoder::end_of_block(offset));
  ops.shrink_to_fit();
  block->ops = Ops(std::move(ops));
  return block;
}

std::shared_ptr<const DecodedBlock> SoftVcpu::decode_pieces(const DecodedBlock& head, uint64_t linear,
                                                            std::span<const Piece> pieces) noexcept {
  if (cpu_.decode_key != head.key || !head.fresh()) return nullptr;
  auto path = std::make_shared<DecodedBlock>(head);
  path->host = head.host_page[0];
  std::vector<Op> ops;
  for (const Piece& piece : pieces)
    for (unsigned offset = piece.offset; offset < piece.end;) {
      uint8_t bytes[max_instruction_bytes];
      const auto available =
          std::min<unsigned>(static_cast<unsigned>(page_size) - offset, max_instruction_bytes);
      host_read(path->host + offset, bytes, available);
      Op op;
      op.offset = static_cast<uint16_t>(offset);
      const Decoder::Result result = decoder_.decode(cpu_, linear & ~page_mask, bytes, available, op);
      if (result != Decoder::Result::ok && result != Decoder::Result::last) return nullptr;
      ops.push_back(op);
      offset += op.length;
    }
  path->instructions = static_cast<uint32_t>(ops.size());
  path->bytes = pieces.back().end;
  ops.push_back(Decoder::end_of_block(path->bytes));
  path->ops = Ops(std::move(ops));
  return path->fresh() ? path : nullptr;
}

}  // namespace lodge::kvm::soft
