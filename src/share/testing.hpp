// A guest's side of FUSE for tests: requests in plain memory.
#pragma once

#include <linux/fuse.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "share/fuse.hpp"

namespace lodge::share::testing {

class PlainMessage final : public Message {
 public:
  PlainMessage(std::vector<uint8_t> request, size_t room) : request_(std::move(request)), answer_(room) {}
  uint64_t request_size() const noexcept override { return request_.size(); }
  uint64_t room() const noexcept override { return answer_.size(); }
  size_t read(uint64_t offset, std::span<uint8_t> out) const noexcept override {
    if (offset >= request_.size()) return 0;
    const size_t count = std::min<size_t>(out.size(), request_.size() - offset);
    std::memcpy(out.data(), request_.data() + offset, count);
    return count;
  }
  size_t write(uint64_t offset, std::span<const uint8_t> data) noexcept override {
    if (offset >= answer_.size()) return 0;
    const size_t count = std::min<size_t>(data.size(), answer_.size() - offset);
    std::memcpy(answer_.data() + offset, data.data(), count);
    return count;
  }
  void request_pieces(uint64_t offset, uint64_t size, std::vector<iovec>& out) const override {
    pieces(const_cast<std::vector<uint8_t>&>(request_), offset, size, out);
  }
  void answer_pieces(uint64_t offset, uint64_t size, std::vector<iovec>& out) override {
    pieces(answer_, offset, size, out);
  }
  const std::vector<uint8_t>& answer() const { return answer_; }

 private:
  // Small ones, so that transfers are really put together from several.
  static void pieces(std::vector<uint8_t>& of, uint64_t offset, uint64_t size, std::vector<iovec>& out) {
    if (offset >= of.size()) return;
    size = std::min<uint64_t>(size, of.size() - offset);
    const uint64_t step = std::max<uint64_t>(7, size / 100);
    for (uint64_t at = 0; at < size; at += step)
      out.push_back({of.data() + offset + at, std::min(step, size - at)});
  }
  std::vector<uint8_t> request_, answer_;
};

struct Answer {
  int error = 0;  // errno
  std::vector<uint8_t> body;
  template <class Struct>
  Struct as() const {
    Struct out{};
    std::memcpy(&out, body.data(), std::min(sizeof out, body.size()));
    return out;
  }
  uint64_t node() const { return as<fuse_entry_out>().nodeid; }
};

template <class Struct>
std::string bytes_of(const Struct& value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
inline std::string name(const std::string& text) {
  return text + '\0';
}

class FakeGuest {
 public:
  explicit FakeGuest(FuseServer& driven) : server(driven) {}

  Answer ask(uint32_t opcode, uint64_t node, const std::string& body, size_t room = 65536) {
    fuse_in_header header{};
    header.len = static_cast<uint32_t>(sizeof header + body.size());
    header.opcode = opcode;
    header.unique = ++unique_;
    header.nodeid = node;
    header.uid = uid;
    header.gid = gid;
    std::string request = bytes_of(header) + body;
    PlainMessage message({request.begin(), request.end()}, sizeof(fuse_out_header) + room);
    const uint32_t size = server.serve(message);
    fuse_out_header out{};
    std::memcpy(&out, message.answer().data(), sizeof out);
    if (size < sizeof out) return {-1, {}};
    if (out.len != size || out.unique != header.unique) return {-2, {}};
    return {-out.error, {message.answer().begin() + sizeof out, message.answer().begin() + size}};
  }
  Answer init(uint32_t minor = 36) {
    fuse_init_in in{};
    in.major = 7, in.minor = minor, in.flags = ~0u, in.max_readahead = 65536;
    return ask(FUSE_INIT, 0, bytes_of(in));
  }
  Answer lookup(uint64_t parent, const std::string& text) { return ask(FUSE_LOOKUP, parent, name(text)); }
  Answer open(uint64_t node, uint32_t flags) {
    return ask(FUSE_OPEN, node, bytes_of(fuse_open_in{flags, 0}));
  }
  Answer create(uint64_t parent, const std::string& text, uint32_t flags, uint32_t mode) {
    return ask(FUSE_CREATE, parent, bytes_of(fuse_create_in{flags, mode, 0, 0}) + name(text));
  }
  Answer mkdir(uint64_t parent, const std::string& text) {
    return ask(FUSE_MKDIR, parent, bytes_of(fuse_mkdir_in{0755, 0}) + name(text));
  }
  Answer read(uint64_t node, uint64_t fh, uint64_t offset, uint32_t size, uint32_t opcode = FUSE_READ) {
    fuse_read_in in{};
    in.fh = fh, in.offset = offset, in.size = size;
    return ask(opcode, node, bytes_of(in), size);
  }
  Answer write(uint64_t node, uint64_t fh, uint64_t offset, const std::string& data) {
    fuse_write_in in{};
    in.fh = fh, in.offset = offset, in.size = static_cast<uint32_t>(data.size());
    return ask(FUSE_WRITE, node, bytes_of(in) + data);
  }
  Answer release(uint64_t node, uint64_t fh) {
    fuse_release_in in{};
    in.fh = fh;
    return ask(FUSE_RELEASE, node, bytes_of(in));
  }
  Answer set(uint64_t node, const fuse_setattr_in& in) { return ask(FUSE_SETATTR, node, bytes_of(in)); }
  Answer get(uint64_t node) { return ask(FUSE_GETATTR, node, bytes_of(fuse_getattr_in{})); }
  Answer rename(uint64_t from, const std::string& old_name, uint64_t to, const std::string& new_name,
                uint32_t flags = 0) {
    return ask(FUSE_RENAME2, from, bytes_of(fuse_rename2_in{to, flags, 0}) + name(old_name) + name(new_name));
  }
  void forget(uint64_t node, uint64_t count) { ask(FUSE_FORGET, node, bytes_of(fuse_forget_in{count})); }

  FuseServer& server;
  uint32_t uid = 0, gid = 0;

 private:
  uint64_t unique_ = 0;
};

}  // namespace lodge::share::testing
