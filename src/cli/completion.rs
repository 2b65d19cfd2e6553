//! `larder completion`: scripts with which shells complete command lines, and the words that those ask for.
//!
//! The scripts know no command: they ask this program each time, so that one that was installed long ago is right.

use std::process::ExitCode;

use clap::builder::StyledStr;
use clap::{Arg, Command, CommandFactory, ValueEnum};

use super::{Larder, Line, Outcome, output};

/// Print a script that completes command lines in a shell
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  larder completion bash > /etc/bash_completion.d/larder      for every bash
  source <(larder completion bash)                            for this one
  larder completion zsh > \"${fpath[1]}/_larder\"
  larder completion fish > ~/.config/fish/completions/larder.fish
  larder completion kubectl > /usr/local/bin/kubectl_complete-larder && chmod +x /usr/local/bin/kubectl_complete-larder
                                                              for `kubectl larder`, in whatever shell completes kubectl")]
pub struct Args {
    /// The shell, or kubectl for `kubectl larder`
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
    Kubectl,
}

impl Shell {
    fn script(self) -> &'static str {
        match self {
            Self::Bash => include_str!("completion/larder.bash"),
            Self::Zsh => include_str!("completion/larder.zsh"),
            Self::Fish => include_str!("completion/larder.fish"),
            Self::Kubectl => include_str!("completion/kubectl_complete-larder"),
        }
    }
}

/// Prints the script.
pub fn run(args: Args) -> Outcome {
    output::print(args.shell.script())?;
    Ok(ExitCode::SUCCESS)
}

/// What the last of some words may become; the scripts of `larder completion` ask for it.
pub mod words {
    use super::{CommandFactory, ExitCode, Larder, Line, Outcome, candidates, output};

    /// Print what the last of the words may become, one a line, each with what it is behind a tab
    #[derive(clap::Args)]
    #[command(hide = true)]
    pub struct Args {
        /// The command line's words so far, without the program's name; the last is still being written
        #[arg(last = true, allow_hyphen_values = true)]
        words: Vec<String>,
    }

    /// Prints them.
    pub fn run(args: Args) -> Outcome {
        let mut command = Line::<Larder>::command();
        command.build();
        let lines = candidates(&command, &args.words).into_iter().map(|(word, help)| format!("{word}\t{help}\n"));
        output::print(&lines.collect::<String>())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What the last of `words` may become, and what each is. Nothing where anything may follow, such as the name of a file.
fn candidates(command: &Command, words: &[String]) -> Vec<(String, String)> {
    let (partial, before) = words.split_last().map_or(("", &[][..]), |(last, before)| (last.as_str(), before));
    let (mut command, mut awaited): (&Command, Option<&Arg>) = (command, None);
    // Some shells make a word of its own of the sign in `--output=json`.
    for word in before.iter().filter(|word| *word != "=") {
        if awaited.take().is_some() {
            continue;
        }
        match option(command, word) {
            Some((found, is_given)) => awaited = found.filter(|arg| !is_given && takes_value(arg)),
            None => command = command.find_subcommand(word).unwrap_or(command),
        }
    }
    let (stem, value) = match partial.split_once('=').filter(|_| partial.starts_with('-')) {
        Some((name, value)) => {
            awaited = option(command, name).and_then(|(found, _)| found);
            (format!("{name}="), value)
        }
        None => (String::new(), partial.trim_start_matches('=')),
    };
    let mut found = match awaited {
        Some(arg) => values(arg),
        None if value.starts_with('-') => options(command),
        None => subcommands(command).into_iter().chain(command.get_positionals().flat_map(values)).collect(),
    };
    found.retain(|(word, _)| word.starts_with(value));
    found.into_iter().map(|(word, help)| (format!("{stem}{word}"), help)).collect()
}

/// The option that a word names, and whether the word has its value too. `None`: it is no option.
fn option<'a>(command: &'a Command, word: &str) -> Option<(Option<&'a Arg>, bool)> {
    if word == "-" || word == "--" || !word.starts_with('-') {
        return None;
    }
    let (name, is_given) = word.split_once('=').map_or((word, false), |(name, _)| (name, true));
    let is_named = |arg: &&Arg| match name.strip_prefix("--") {
        Some(long) => arg.get_long() == Some(long),
        None => arg.get_short().is_some_and(|short| name.strip_prefix('-') == Some(short.encode_utf8(&mut [0; 4]))),
    };
    Some((command.get_arguments().find(is_named), is_given))
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

fn subcommands(command: &Command) -> Vec<(String, String)> {
    let visible = command.get_subcommands().filter(|command| !command.is_hide_set());
    visible.map(|command| (command.get_name().to_owned(), first_line(command.get_about()))).collect()
}

fn options(command: &Command) -> Vec<(String, String)> {
    let visible = command.get_arguments().filter(|arg| !arg.is_hide_set());
    visible.filter_map(|arg| Some((format!("--{}", arg.get_long()?), first_line(arg.get_help())))).collect()
}

fn values(arg: &Arg) -> Vec<(String, String)> {
    let possible = arg.get_possible_values();
    let visible = possible.iter().filter(|value| !value.is_hide_set());
    visible.map(|value| (value.get_name().to_owned(), first_line(value.get_help()))).collect()
}

fn first_line(help: Option<&StyledStr>) -> String {
    let text = help.map(ToString::to_string).unwrap_or_default();
    text.lines().next().unwrap_or_default().replace('\t', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(words: &[&str]) -> Vec<String> {
        let mut command = Line::<Larder>::command();
        command.build();
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        candidates(&command, &words).into_iter().map(|(word, _)| word).collect()
    }

    #[test]
    fn commands_options_and_values_are_completed() {
        assert_eq!(completed(&["sta"]), ["status"]);
        let all = completed(&[""]);
        assert!(["check", "explain", "status"].iter().all(|name| all.iter().any(|word| word == name)), "{all:?}");
        assert!(!all.iter().any(|word| word == "complete-words"), "what is hidden is not offered: {all:?}");
        assert_eq!(completed(&["status", "--all"]), ["--all-namespaces"]);
        assert_eq!(completed(&["status", "--output", ""]), ["table", "json", "yaml"]);
        assert_eq!(completed(&["status", "--output=j"]), ["--output=json"]);
        assert_eq!(completed(&["status", "--output", "=", "y"]), ["yaml"]);
        assert_eq!(completed(&["status", "-o", "j"]), ["json"]);
        assert_eq!(completed(&["completion", "z"]), ["zsh"]);
        assert_eq!(completed(&["agent", "ha"]), ["handover"]);
        assert_eq!(completed(&["--log", "info", "che"]), ["check"]);
    }

    #[test]
    fn where_anything_may_follow_nothing_is_offered() {
        assert!(completed(&["status", "--namespace", "s"]).is_empty());
        assert!(completed(&["check", "fi"]).is_empty());
        assert!(completed(&["status", "--nowhere="]).is_empty());
    }

    #[test]
    fn each_word_says_what_it_is() {
        let mut command = Line::<Larder>::command();
        command.build();
        let found = candidates(&command, &["status".to_owned(), "--output=".to_owned(), "".to_owned()]);
        assert!(!found.iter().any(|(word, help)| word.contains('\t') || help.contains('\n')));
        let found = candidates(&command, &["chec".to_owned()]);
        assert!(found.first().is_some_and(|(_, help)| help.starts_with("Check manifests")), "{found:?}");
    }
}
