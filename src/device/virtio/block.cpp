// Block device (VirtIO 1.2, section 5.2).
//
// Modelled: read, write, flush, identification, discard, write zeroes, several queues, the sizes that the
// image works with, changes of the size. Every write is in the image when it completes and on stable storage
// after the next flush (FLUSH is offered, CONFIG_WCE is not: the cache cannot be switched off). A request
// that the rules forbid completes with an error status; one that has no room for a status comes back empty.
// Not modelled: secure erase, lifetime, zones.
#include "device/virtio/block.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

constexpr uint64_t F_SEG_MAX = feature(2), F_RO = feature(5), F_BLK_SIZE = feature(6), F_FLUSH = feature(9),
                   F_TOPOLOGY = feature(10), F_MQ = feature(12), F_DISCARD = feature(13),
                   F_WRITE_ZEROES = feature(14);
// A request of 1 MiB whose pages lie apart must fit into a chain, which may be as long as the queue
// (2.7.5.3.1).
constexpr uint16_t queue_size = 512;
constexpr uint32_t pci_class_storage = 0x010000;
constexpr uint64_t sector_size = 512;

using Clock = std::chrono::steady_clock;
// How long the loop waits for a next request before it interrupts, and then once more before it sleeps: a
// request takes a guest's driver 10 to 30 us, and waking a thread takes the host as long. While requests keep
// coming, answers to several are told together.
constexpr std::chrono::microseconds patience(30), telling_interval(120);

// 5.2.6 Device operation
enum Type : uint32_t { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
constexpr uint32_t no_type = ~0u;  // the header could not be read
enum Status : uint8_t { OK = 0, IOERR = 1, UNSUPP = 2 };
constexpr uint8_t under_way = 0xff;  // not a status: the image has it
struct Header {
  uint32_t type, reserved;
  uint64_t sector;
};
struct Range {
  uint64_t sector;
  uint32_t sectors, flags;
};
constexpr uint32_t RANGE_UNMAP = 1;
// Of one discard or write zeroes request; the driver is told.
constexpr uint32_t max_ranges = 32, max_range_sectors = 1u << 22;

// 5.2.4 Device configuration layout
struct [[gnu::packed]] Configuration {
  uint64_t capacity = 0;
  uint32_t size_max = 0, seg_max = queue_size - 2;
  uint16_t cylinders = 0;
  uint8_t heads = 0, sectors = 0;
  uint32_t blk_size = sector_size;
  uint8_t physical_block_exp = 0, alignment_offset = 0;
  uint16_t min_io_size = 0;
  uint32_t opt_io_size = 0;
  uint8_t writeback = 1, unused0 = 0;
  uint16_t num_queues = 1;
  uint32_t max_discard_sectors = max_range_sectors, max_discard_seg = max_ranges,
           discard_sector_alignment = 1;
  uint32_t max_write_zeroes_sectors = max_range_sectors, max_write_zeroes_seg = max_ranges;
  uint8_t write_zeroes_may_unmap = 1, unused1[3] = {};
};
static_assert(sizeof(Configuration) == 60);

uint64_t features_of(const block::Image& image, unsigned queues) {
  uint64_t features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
  features |= image.read_only() ? F_RO : F_DISCARD | F_WRITE_ZEROES;
  if (queues > 1) features |= F_MQ;
  return features;
}

}  // namespace

Block::Block(machine::GuestMemory& memory, std::shared_ptr<block::Image> image, Config config,
             const RingFeatures& rings)
    : Device({.name = "virtio-blk",
              .type = DeviceType::block,
              .pci_class = pci_class_storage,
              .features = features_of(*image, config.queues),
              .queue_sizes = std::vector<uint16_t>(config.queues, queue_size),
              .quick = true},
             memory, rings),
      image_(std::move(image)),
      config_(std::move(config)) {}

Block::~Block() {
  std::unique_lock lock(mutex_);
  quiesce(lock, -1);
}

// --- Requests out of the queues

// The lock is held to take requests and to give them back, not while the image works on them, which may be
// all of the work: what the page cache has is copied right here.
void Block::serve(unsigned index, std::unique_lock<std::mutex>& lock) noexcept {
  const bool on_loop = loop_ && loop_->on_loop_thread();
  Depth& depth = depth_[index];
  bool on_trial = on_loop && depth.arrived();
  // One loop has all queues.
  const unsigned turn = on_loop && queues() > 1 ? batch_size : requests_a_turn;
  servants_[index]++;
  unsigned taken = 0;
  Telling telling{Clock::now()};
  while (serving(index)) {
    if (taken >= turn) {
      kick_later(index);
      break;
    }
    queue(index).want_kicks(false);
    const Batch batch = take(index);
    taken += batch.taken;
    if (batch.size != 0) {
      lock.unlock();
      issue(batch);
      lock.lock();
      telling.owed = true;
      const bool more = queue(index).has_available();
      if (on_loop && (batch.taken > 1 || more)) depth.observe(true);
      // A driver with much to do is better not interrupted for each answer, and what it does before it is
      // told shows that it has.
      const auto interval = more ? telling_interval : 2 * telling_interval;
      if (on_loop && (depth.deep() || on_trial) && Clock::now() - telling.last < interval) continue;
      tell(index, telling);
    } else if (batch.broken) {
      needs_reset("a descriptor chain that breaks the rules");
    } else if (batch.taken == 0) {
      if (on_loop && (depth.deep() || std::exchange(on_trial, false)) && await_more(index, lock, telling))
        continue;
      queue(index).want_kicks(true);
      if (!queue(index).has_available()) break;
    }
  }
  servants_[index]--;
  notify(index);
}

// The loop has done all that there was, for a driver that had several requests out. The next of them often
// comes within the time that it takes to sleep and to be woken, and then the driver need not kick. False when
// none has come; the driver has been told of all answers by then.
bool Block::await_more(unsigned index, std::unique_lock<std::mutex>& lock, Telling& telling) noexcept {
  bool in_vain = false;
  for (const auto begin = Clock::now();;) {
    lock.unlock();
    for (unsigned i = 0; i < 16; i++) __builtin_ia32_pause();
    lock.lock();
    if (!serving(index)) return true;
    if (queue(index).has_available()) {
      if (telling.owed) depth_[index].observe(true);
      return true;
    }
    const auto waited = Clock::now() - begin;
    if (waited > patience) {
      if (!std::exchange(in_vain, true)) depth_[index].observe(false);
      tell(index, telling);
    }
    if (waited > 2 * patience) return false;
  }
}

void Block::tell(unsigned index, Telling& telling) noexcept {
  notify(index);
  telling = {Clock::now()};
}

Block::Batch Block::take(unsigned index) noexcept {
  Batch batch;
  while (batch.taken < batch_size) {
    Request& request = idle_request();
    const Pop result = queue(index).pop(request.chain);
    batch.broken = result == Pop::broken;
    if (result != Pop::chain) break;
    batch.taken++;
    if (request.chain.writable_size() == 0) {  // nowhere to put a status
      queue(index).push(request.chain, 0);
      continue;
    }
    idle_.pop_back();
    request.queue = index;
    request.status_at = request.chain.writable_size() - 1;
    request.error = 0;
    request.type = no_type;
    out_++, out_of_[index]++;
    batch.requests[batch.size++] = &request;
  }
  return batch;
}

// The last of the idle ones, which it stays until it is taken off the list.
Block::Request& Block::idle_request() noexcept {
  if (idle_.empty()) idle_.push_back(&requests_.emplace_back());
  return *idle_.back();
}

void Block::issue(const Batch& batch) noexcept {
  image_->plug();
  for (unsigned i = 0; i < batch.size; i++) {
    Request& request = *batch.requests[i];
    const uint8_t status = begin(request);
    if (status == under_way) continue;
    const std::lock_guard lock(mutex_);
    complete(request, status);
  }
  image_->unplug();
}

// A status, or under_way when the image has it.
uint8_t Block::begin(Request& request) noexcept {
  Header header{};
  if (request.chain.read(0, {reinterpret_cast<uint8_t*>(&header), sizeof header}) != sizeof header)
    return IOERR;
  request.type = header.type;
  switch (header.type) {
    case IN: return transfer(request, false, header.sector);
    case OUT: return transfer(request, true, header.sector);
    case FLUSH:
      request.parts = 1;
      image_->flush(part(request));
      return under_way;
    case GET_ID: return identify(request);
    case DISCARD: return change_ranges(request, false);
    case WRITE_ZEROES: return change_ranges(request, true);
    default: return UNSUPP;
  }
}

bool Block::inside(uint64_t sector, uint64_t bytes) const noexcept {
  const uint64_t size = image_->size();
  return sector <= size / sector_size && bytes <= size - sector * sector_size;
}

uint8_t Block::transfer(Request& request, bool write, uint64_t sector) noexcept {
  const Chain& chain = request.chain;
  const uint64_t bytes = write ? chain.readable_size() - sizeof(Header) : request.status_at;
  if (bytes % sector_size != 0 || !inside(sector, bytes)) return IOERR;
  if (write && image_->read_only()) return IOERR;  // 5.2.6.2
  request.pieces.clear();
  if (write)
    chain.cut_readable(sizeof(Header), bytes, request.pieces);
  else
    chain.cut_writable(0, bytes, request.pieces);
  request.buffers.clear();
  for (const Segment& piece : request.pieces)
    request.buffers.push_back({piece.bytes.data(), piece.bytes.size()});
  request.parts = 1;
  if (write)
    image_->write(request.buffers, sector * sector_size, part(request));
  else
    image_->read(request.buffers, sector * sector_size, part(request));
  return under_way;
}

// All ranges are checked, in a copy, before the first is changed.
uint8_t Block::change_ranges(Request& request, bool zero) noexcept {
  const uint64_t bytes = request.chain.readable_size() - sizeof(Header);
  std::array<Range, max_ranges> ranges{};
  if (bytes == 0 || bytes % sizeof(Range) != 0 || bytes > sizeof ranges || image_->read_only()) return IOERR;
  request.chain.read(sizeof(Header), {reinterpret_cast<uint8_t*>(ranges.data()), bytes});
  const auto used = std::span(ranges).first(bytes / sizeof(Range));
  for (const Range& range : used) {
    if (range.flags & ~RANGE_UNMAP || (!zero && range.flags != 0)) return UNSUPP;  // 5.2.6.2
    if (range.sectors > max_range_sectors || !inside(range.sector, range.sectors * sector_size)) return IOERR;
  }
  request.parts = static_cast<unsigned>(used.size());
  for (const Range& range : used) {
    const uint64_t offset = range.sector * sector_size, length = range.sectors * sector_size;
    if (zero)
      image_->write_zeroes(offset, length, range.flags & RANGE_UNMAP, part(request));
    else
      image_->discard(offset, length, part(request));
  }
  return under_way;
}

// 5.2.6: 20 bytes, not ended by a zero when all are used.
uint8_t Block::identify(const Request& request) noexcept {
  std::array<uint8_t, max_serial> id{};
  std::ranges::copy(config_.serial, id.begin());
  if (request.status_at < id.size()) return IOERR;
  request.chain.write(0, id);
  return OK;
}

// --- Completions

block::Completion Block::part(Request& request) noexcept {
  return [this, &request](int error) { part_done(request, error); };
}

void Block::part_done(Request& request, int error) noexcept {
  const std::lock_guard lock(mutex_);
  if (error != 0) request.error = error;
  if (--request.parts != 0) return;
  complete(request, request.error == 0 ? OK : request.error == EOPNOTSUPP ? UNSUPP : IOERR);
}

// 5.2.6: what a request transfers is all of its chain but header and status.
void Block::count(const Request& request, uint8_t status) noexcept {
  if (status != OK) counts_.errors++;
  switch (request.type) {
    case IN:
      counts_.reads++;
      if (status == OK) counts_.read_bytes += request.status_at;
      break;
    case OUT:
      counts_.writes++;
      if (status == OK) counts_.written_bytes += request.chain.readable_size() - sizeof(Header);
      break;
    case FLUSH: counts_.flushes++; break;
    case DISCARD: counts_.discards++; break;
    case WRITE_ZEROES: counts_.zeroes++; break;
    default: break;
  }
}

void Block::complete(Request& request, uint8_t status) noexcept {
  count(request, status);
  request.chain.write(request.status_at, {&status, 1});
  queue(request.queue).push(request.chain, static_cast<uint32_t>(request.status_at + 1));
  if (servants_[request.queue] == 0) notify(request.queue);
  idle_.push_back(&request);
  out_--, out_of_[request.queue]--;
  came_back_.notify_all();
}

void Block::quiesce(std::unique_lock<std::mutex>& lock, int index) noexcept {
  came_back_.wait(lock, [&] { return index < 0 ? out_ == 0 : out_of_[static_cast<size_t>(index)] == 0; });
}

// --- Configuration and state

int Block::resize(uint64_t bytes) noexcept {
  if (bytes < size() || bytes % sector_size != 0) return EINVAL;
  const int error = block::resize(*image_, bytes);
  if (error == 0) resized();
  return error;
}

Disk::Counts Block::counts() const noexcept {
  const std::lock_guard lock(mutex_);
  return counts_;
}

void Block::resized() noexcept {
  const std::lock_guard lock(mutex_);
  config_changed();
}

unsigned Block::config_size() const noexcept {
  return sizeof(Configuration);
}

void Block::config_bytes(std::span<uint8_t> out) const noexcept {
  Configuration config;
  config.capacity = image_->size() / sector_size;
  // The unit in which the image works without reading first, as the disk's physical block.
  for (uint64_t block = sector_size; block < image_->block_size() && config.physical_block_exp < 7;
       block *= 2)
    config.physical_block_exp++;
  config.num_queues = static_cast<uint16_t>(config_.queues);
  config.discard_sector_alignment =
      std::max<uint32_t>(1, static_cast<uint32_t>(image_->discard_granularity() / sector_size));
  std::memcpy(out.data(), &config, sizeof config);
}

// The disk's contents are the image's; only its size tells a restored machine that it has the right one.
void Block::save_device(nlohmann::json& json) const {
  json = {{"capacity", image_->size() / sector_size}};
}

void Block::load_device(const nlohmann::json& json) {
  if (!json.is_object() || !json.contains("capacity") || json["capacity"] != image_->size() / sector_size)
    usage_error(
        "saved state of virtio-blk: the disk has another size; give the image that was saved with it");
}

}  // namespace lodge::device::virtio
