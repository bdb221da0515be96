// What the parts of the image engine, its tools and tests need of opening beyond open_image().
#pragma once

#include "block/storage.hpp"

namespace lodge::block {

// The path that the name of a backing or data file in `image` means. Throws UsageError for what is not a
// file.
std::string backing_path(const std::string& image, const std::string& name);

// open_image() over storage that is open already.
std::unique_ptr<Image> open_storage(std::unique_ptr<Storage> storage, const OpenOptions& options);

}  // namespace lodge::block
