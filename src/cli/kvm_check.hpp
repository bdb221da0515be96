// Whether a program can have liblodge-kvm.so preloaded, by its files and its arguments alone.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace lodge::cli {

// The first reason why the dynamic linker would not preload a library into the program, in one sentence with
// the remedy; empty: none is known. Opens nothing but regular files.
std::string why_not_preloaded(const std::filesystem::path& program);

// Why the program's own words (the first is its name) keep the accelerator from working; empty: they do not.
std::string why_not_arguments(const std::vector<std::string>& words);

}  // namespace lodge::cli
