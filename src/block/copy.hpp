// Long work on whole images, for `lodge image`. All of it throws std::system_error that names what failed.
#pragma once

#include <optional>

#include "block/qcow2/image.hpp"

namespace lodge::block {

// Bytes done and bytes in all; called on the calling thread, a few times a second. What it throws ends the
// work.
using Progress = std::function<void(uint64_t, uint64_t)>;

// Copies all contents into an image of the same size that reads as zeros. Zeros take no space in the copy.
// `compress`: into compressed clusters; `to` is a Qcow2Image then.
void copy_contents(Image& from, Image& to, bool compress, const Progress& progress);

// Makes `to`, which may show a backing file, read as `from` does, by writing where the two differ.
void copy_difference(Image& from, Image& to, const Progress& progress);

// Writes into `overlay` what it has shown of its backing file so far and `backing` (null: zeros) would not
// show.
void keep_contents(qcow2::Qcow2Image& overlay, Image* backing, const Progress& progress);

}  // namespace lodge::block
