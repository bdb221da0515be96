// Completion scripts. Options and their values come from the description that parsing uses, so that they
// cannot differ.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.hpp"
#include "cli/options.hpp"

namespace lodge::cli {
namespace {

using detail::Values;

std::vector<const CLI::App*> subcommands(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

// "--kernel", or the bare name of a positional argument.
std::string name_of(const CLI::Option& option) {
  const auto& names = option.get_lnames();
  return names.empty() ? option.get_name() : "--" + names.front();
}

std::string bash(const CLI::App& app) {
  std::string cases, names;
  for (const auto* sub : subcommands(app)) {
    std::string words, values;
    for (const auto* option : sub->get_options()) {
      const std::string name = name_of(*option);
      const Values known = detail::values_of(name);
      if (option->get_positional()) {
        words += fmt::format(" {}", fmt::join(known.words, " "));
        continue;
      }
      words += " " + name;
      if (known.file)
        values += fmt::format(
            "        {}) compopt -o filenames; COMPREPLY=($(compgen -f -- \"$word\")); return ;;\n", name);
      else if (!known.words.empty())
        values += fmt::format("        {}) COMPREPLY=($(compgen -W '{}' -- \"$word\")); return ;;\n", name,
                              fmt::join(known.words, " "));
      else if (option->get_items_expected_max() > 0)
        values += fmt::format("        {}) return ;;\n", name);
    }
    names += " " + sub->get_name();
    cases += fmt::format("    {})\n", sub->get_name());
    if (!values.empty()) cases += fmt::format("      case $previous in\n{}      esac\n", values);
    cases += fmt::format("      COMPREPLY=($(compgen -W '{}' -- \"$word\")) ;;\n",
                         words.substr(words.empty() ? 0 : 1));
  }
  // The colon of file:PATH breaks words in bash; the value is completed up to it.
  return fmt::format(R"(_lodge() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{} --help --version' -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{}  esac
}}
complete -F _lodge lodge
)",
                     names.substr(1), cases);
}

// Single quotes inside a single-quoted shell word.
std::string quoted(std::string text) {
  for (size_t at = 0; (at = text.find('\'', at)) != std::string::npos; at += 4) text.replace(at, 1, "'\\''");
  return text;
}

std::string zsh(const CLI::App& app) {
  const auto escaped = [](std::string text) {
    for (size_t at = 0; (at = text.find_first_of(":[]", at)) != std::string::npos; at += 2)
      text.insert(at, 1, '\\');
    return quoted(text);
  };
  std::string names, cases;
  for (const auto* sub : subcommands(app)) {
    names += fmt::format("    '{}:{}'\n", sub->get_name(), escaped(sub->get_description()));
    cases += fmt::format("    {})\n      _arguments", sub->get_name());
    for (const auto* option : sub->get_options()) {
      const std::string name = name_of(*option);
      const Values known = detail::values_of(name);
      std::string action;
      if (known.file)
        action = ":file:_files";
      else if (!known.words.empty())
        action = fmt::format(":value:({})", escaped(fmt::format("{}", fmt::join(known.words, " "))));
      else if (option->get_items_expected_max() > 0)
        action = ":value:";
      cases += option->get_positional() ? fmt::format(" \\\n        '1{}'", action)
                                        : fmt::format(" \\\n        '*{}[{}]{}'", name,
                                                      escaped(option->get_description()), action);
    }
    cases += " ;;\n";
  }
  return fmt::format(R"(#compdef lodge
_lodge() {{
  local -a commands=(
{}  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{}  esac
}}
compdef _lodge lodge
)",
                     names, cases);
}

std::string fish(const CLI::App& app) {
  std::string text = "complete -c lodge -f\ncomplete -c lodge -n __fish_use_subcommand -l version -l help\n";
  for (const auto* sub : subcommands(app)) {
    text += fmt::format("complete -c lodge -n __fish_use_subcommand -a {} -d '{}'\n", sub->get_name(),
                        quoted(sub->get_description()));
    const std::string when =
        fmt::format("complete -c lodge -n '__fish_seen_subcommand_from {}'", sub->get_name());
    for (const auto* option : sub->get_options()) {
      const std::string name = name_of(*option);
      const Values known = detail::values_of(name);
      const std::string words = fmt::format("{}", fmt::join(known.words, " "));
      if (option->get_positional()) {
        text += fmt::format("{} -a '{}'\n", when, words);
        continue;
      }
      text += fmt::format("{} -l {} -d '{}'", when, name.substr(2), quoted(option->get_description()));
      if (known.file)
        text += " -r -F";
      else if (!words.empty())
        text += fmt::format(" -x -a '{}'", words);
      else if (option->get_items_expected_max() > 0)
        text += " -x";
      text += "\n";
    }
  }
  return text;
}

}  // namespace

std::string completion_script(const std::string& shell) {
  detail::RawOptions raw;
  const auto app = detail::describe_command_line(raw);
  if (shell == "bash") return bash(*app);
  if (shell == "zsh") return zsh(*app);
  if (shell == "fish") return fish(*app);
  usage_error("completion: unknown shell '{}'; choose bash, zsh or fish", shell);
}

}  // namespace lodge::cli
