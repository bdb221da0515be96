// What the parts of the image engine, its tools and tests need of opening beyond open_image().
#pragma once

#include "block/storage.hpp"

namespace lodge::block {

// The path that the name of a backing or data file in `image` means. Throws UsageError for what is not a
// file.
std::string backing_path(const std::string& image, const std::string& name);

// Whether two paths name files of one directory, as an image and its external data file must be.
bool in_same_directory(const std::string& a, const std::string& b);

// open_image() over storage that is open already.
std::unique_ptr<Image> open_storage(std::unique_ptr<Storage> storage, const OpenOptions& options);

}  // namespace lodge::block
