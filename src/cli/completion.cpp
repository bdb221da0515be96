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

// The body of one command's case in bash: its options' values, then its words. A group of commands, like
// image, completes the next word, and then the command named there.
std::string bash_body(const CLI::App& command, unsigned depth) {
  if (const auto inner = subcommands(command); !inner.empty()) {
    std::string names, cases;
    for (const auto* sub : inner) {
      names += " " + sub->get_name();
      cases += fmt::format("    {})\n{}", sub->get_name(), bash_body(*sub, depth + 1));
    }
    return fmt::format(R"(      if [ "$COMP_CWORD" -eq {0} ]; then
        COMPREPLY=($(compgen -W '{1}' -- "$word"))
        return
      fi
      case ${{COMP_WORDS[{0}]}} in
{2}      esac ;;
)",
                       depth, names.substr(1), cases);
  }
  std::string words, values;
  bool files = false;
  for (const auto* option : command.get_options()) {
    const std::string name = name_of(*option);
    const Values known = detail::values_of(name);
    if (option->get_positional()) {
      words += fmt::format(" {}", fmt::join(known.words, " "));
      files |= known.file;
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
  std::string body;
  if (!values.empty()) body += fmt::format("      case $previous in\n{}      esac\n", values);
  body +=
      fmt::format("      COMPREPLY=($(compgen -W '{}' -- \"$word\"))", words.substr(words.empty() ? 0 : 1));
  if (files)
    body +=
        "\n      [[ $word == -* ]] || { compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "
        "\"$word\")); }";
  return body + " ;;\n";
}

std::string bash(const CLI::App& app) {
  std::string cases, names;
  for (const auto* sub : subcommands(app)) {
    names += " " + sub->get_name();
    cases += fmt::format("    {})\n{}", sub->get_name(), bash_body(*sub, 2));
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

std::string zsh_escaped(std::string text) {
  for (size_t at = 0; (at = text.find_first_of(":[]", at)) != std::string::npos; at += 2)
    text.insert(at, 1, '\\');
  return quoted(text);
}

std::string zsh_arguments(const CLI::App& command) {
  std::string text = "      _arguments";
  for (const auto* option : command.get_options()) {
    const std::string name = name_of(*option);
    const Values known = detail::values_of(name);
    std::string action;
    if (known.file)
      action = ":file:_files";
    else if (!known.words.empty())
      action = fmt::format(":value:({})", zsh_escaped(fmt::format("{}", fmt::join(known.words, " "))));
    else if (option->get_items_expected_max() > 0)
      action = ":value:";
    text += option->get_positional() ? fmt::format(" \\\n        '*{}'", action.empty() ? ":value:" : action)
                                     : fmt::format(" \\\n        '*{}[{}]{}'", name,
                                                   zsh_escaped(option->get_description()), action);
  }
  return text + " ;;\n";
}

// A choice among commands, and what each of them completes; groups of commands nest.
std::string zsh_choice(const CLI::App& app) {
  std::string names, cases;
  for (const auto* sub : subcommands(app)) {
    names += fmt::format("    '{}:{}'\n", sub->get_name(), zsh_escaped(sub->get_description()));
    cases += fmt::format("    {})\n{}", sub->get_name(),
                         subcommands(*sub).empty() ? zsh_arguments(*sub) : zsh_choice(*sub) + "      ;;\n");
  }
  return fmt::format(R"(  commands=(
{}  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{}  esac
)",
                     names, cases);
}

std::string zsh(const CLI::App& app) {
  return fmt::format(
      "#compdef lodge\n_lodge() {{\n  local -a commands\n  local command\n{}}}\ncompdef _lodge lodge\n",
      zsh_choice(app));
}

// Options of `command`, offered under the condition `when`; of a group, its commands, and then theirs.
std::string fish_command(const CLI::App& command, const std::string& when) {
  std::string text;
  for (const auto* sub : subcommands(command)) {
    text += fmt::format("complete -c lodge -n '{}' -a {} -d '{}'\n", when, sub->get_name(),
                        quoted(sub->get_description()));
    text += fish_command(*sub, fmt::format("{}; and __fish_seen_subcommand_from {}", when, sub->get_name()));
  }
  if (!text.empty()) return text;
  for (const auto* option : command.get_options()) {
    const std::string name = name_of(*option);
    const Values known = detail::values_of(name);
    const std::string words = fmt::format("{}", fmt::join(known.words, " "));
    if (option->get_positional()) {
      text += known.file ? fmt::format("complete -c lodge -n '{}' -F\n", when)
                         : fmt::format("complete -c lodge -n '{}' -a '{}'\n", when, words);
      continue;
    }
    text += fmt::format("complete -c lodge -n '{}' -l {} -d '{}'", when, name.substr(2),
                        quoted(option->get_description()));
    if (known.file)
      text += " -r -F";
    else if (!words.empty())
      text += fmt::format(" -x -a '{}'", words);
    else if (option->get_items_expected_max() > 0)
      text += " -x";
    text += "\n";
  }
  return text;
}

std::string fish(const CLI::App& app) {
  std::string text = "complete -c lodge -f\ncomplete -c lodge -n __fish_use_subcommand -l version -l help\n";
  for (const auto* sub : subcommands(app)) {
    text += fmt::format("complete -c lodge -n __fish_use_subcommand -a {} -d '{}'\n", sub->get_name(),
                        quoted(sub->get_description()));
    text += fish_command(*sub, "__fish_seen_subcommand_from " + sub->get_name());
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
