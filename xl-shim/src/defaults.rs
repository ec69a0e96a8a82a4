//! `/etc/rxl.toml`: what a host's owner wants rxl to do unless the command line says otherwise.
//!
//! A table for each verb, in it a key for each option, named as on the command line without the
//! dashes (`-s` is `ssh`). There is no second list of options: a table becomes words of the
//! command line, before the user's, and clap checks them. An option that the user gives, or one
//! that goes against it, puts the file's aside. The table `save-helper` is for the helper under
//! stock `xl` or libvirt, whose options are variables ([`crate::ways`]).
//!
//! ```toml
//! [migrate]
//! nics = ["eth1", "eth2"]
//! max-pause = 100
//!
//! [save-helper]
//! addresses = ["10.0.0.1"]
//! ```

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use rxl_toolstack::inherit;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where it is, unless [`ENV`] names another place.
const PATH: &str = "/etc/rxl.toml";
/// Names the file; empty: none is read.
const ENV: &str = "RXL_CONFIG";
/// The table that is no verb's.
const HELPER: &str = "save-helper";
/// Its keys; the variable of `no-encrypt` is `RXL_NO_ENCRYPT`.
const HELPER_KEYS: [&str; 8] =
    ["workers", "mapper", "addresses", "streams", "no-encrypt", "reduce", "policy", "rate"];

/// The file's text, and where it was.
struct File {
    path: PathBuf,
    text: String,
}

/// An option that the file gives.
struct Given {
    id: String,
    words: Vec<String>,
}

/// The command line `args` with what the file says for its verb, which is word `at`.
///
/// # Errors
/// The file cannot be read, or has a mistake; the text begins with its name and the line.
pub(crate) fn apply(cli: &Command, args: &[OsString], at: usize) -> anyhow::Result<Vec<OsString>> {
    let verb = args.get(at).and_then(|word| cli.find_subcommand(word));
    // A guard has to run whatever the file says.
    if verb.is_none_or(Command::is_hide_set) {
        return Ok(args.to_vec());
    }
    match File::read()? {
        Some(file) => file.apply(cli, args, at),
        None => Ok(args.to_vec()),
    }
}

/// Sets the save helper's variables that are not set. A guest is not kept from moving by a
/// mistake in the file: it is only told. To be called while there is one thread.
pub(crate) fn apply_to_helper() {
    let variables = File::read().and_then(|file| file.map_or(Ok(Vec::new()), |f| f.variables()));
    match variables {
        Ok(variables) => {
            for (name, value) in variables.iter().filter(|(name, _)| env::var_os(name).is_none()) {
                if let Err(error) = inherit::set_variable(name, value.as_ref()) {
                    tracing::warn!(%error, "{name}");
                }
            }
        }
        Err(error) => tracing::warn!("passed over: {error:#}"),
    }
}

impl File {
    /// `None`: there is none.
    fn read() -> anyhow::Result<Option<File>> {
        let path = PathBuf::from(env::var_os(ENV).unwrap_or_else(|| PATH.into()));
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(File { path, text })),
            // One that is named has to be there.
            Err(error) if error.kind() == ErrorKind::NotFound && path == Path::new(PATH) => {
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    fn apply(&self, cli: &Command, args: &[OsString], at: usize) -> anyhow::Result<Vec<OsString>> {
        let verb = args.get(at).and_then(|word| word.to_str()).unwrap_or_default();
        let mut given = Vec::new();
        for (table, content) in self.tables()? {
            if table.get_ref() == HELPER {
                continue;
            }
            let command = cli.find_subcommand(table.get_ref().as_ref());
            let command = command.filter(|command| !command.is_hide_set()).ok_or_else(|| {
                self.wrong(&table, format_args!("rxl has no verb {}", table.get_ref()))
            })?;
            let options = self.options(command, content.get_ref())?;
            if table.get_ref() == verb {
                given = options;
            }
        }
        // What is missing may be in the file. A command line that is wrong by itself is explained
        // by itself.
        let lenient = |verb: Command| verb.mut_args(|arg| arg.required(false));
        let matches = cli.clone().mut_subcommand(verb, lenient).try_get_matches_from(args);
        let Ok(matches) = matches else { return Ok(args.to_vec()) };
        let command = cli.find_subcommand(verb).context("the verb is not rxl's")?;
        let matches = matches.subcommand_matches(verb).context("the verb is not rxl's")?;
        let words = given.into_iter().filter(|option| !is_decided(command, matches, &option.id));
        let (before, after) = args.split_at_checked(at + 1).unwrap_or((args, &[]));
        let words = words.flat_map(|option| option.words).map(OsString::from);
        Ok(before.iter().cloned().chain(words).chain(after.iter().cloned()).collect())
    }

    /// The variables of the table [`HELPER`].
    fn variables(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut variables = Vec::new();
        for (_, content) in self.tables()?.iter().filter(|(table, _)| table.get_ref() == HELPER) {
            for (key, value) in content.get_ref() {
                let name = key.get_ref().as_ref();
                if !HELPER_KEYS.contains(&name) {
                    let known = HELPER_KEYS.join(", ");
                    bail!(self.wrong(key, format_args!("no {name} here, only {known}")));
                }
                let text = match value.get_ref() {
                    DeValue::Boolean(on) => if *on { "1" } else { "" }.to_owned(),
                    _ => self.text(value, true)?,
                };
                let variable = format!("RXL_{}", name.replace('-', "_").to_uppercase());
                variables.push((variable, text));
            }
        }
        Ok(variables)
    }

    fn tables(&self) -> anyhow::Result<Vec<Entry<'_>>> {
        let all = DeTable::parse(&self.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            anyhow!("{}:{}: {}", self.path.display(), self.line(at), error.message())
        })?;
        let tables = all.into_inner().into_iter().map(|(key, value)| {
            let span = value.span();
            match value.into_inner() {
                DeValue::Table(table) => Ok((key, Spanned::new(span, table))),
                _ => Err(self.wrong(&key, "an option belongs under its verb, such as [migrate]")),
            }
        });
        tables.collect()
    }

    /// What a table says, checked against the verb.
    fn options(&self, verb: &Command, table: &DeTable<'_>) -> anyhow::Result<Vec<Given>> {
        let mut all = Vec::new();
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let option = options(verb).find(|arg| self::name(arg) == name).ok_or_else(|| {
                let known: Vec<String> = options(verb).map(self::name).collect();
                let verb = verb.get_name();
                self.wrong(
                    key,
                    format_args!("{verb} has no option {name}, only {}", known.join(", ")),
                )
            })?;
            if let Some(words) = self.words(option, value)? {
                self.check(verb, &words).map_err(|reason| self.wrong(value, reason))?;
                all.push(Given { id: option.get_id().to_string(), words });
            }
        }
        Ok(all)
    }

    /// An option as on the command line; `None`: a switch that is off.
    fn words(
        &self,
        arg: &Arg,
        value: &Spanned<DeValue<'_>>,
    ) -> anyhow::Result<Option<Vec<String>>> {
        let flag = match (arg.get_long(), arg.get_short()) {
            (Some(long), _) => format!("--{long}"),
            (None, short) => format!("-{}", short.unwrap_or_default()),
        };
        match (arg.get_action().takes_values(), value.get_ref()) {
            (false, DeValue::Boolean(on)) => Ok(on.then(|| vec![flag])),
            (false, _) => bail!(self.wrong(value, "true or false is wanted")),
            (true, _) => {
                let text = self.text(value, arg.get_value_delimiter().is_some())?;
                Ok(Some(vec![flag, text]))
            }
        }
    }

    /// A value as a word; lists have commas.
    fn text(&self, value: &Spanned<DeValue<'_>>, may_be_list: bool) -> anyhow::Result<String> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.to_string()),
            DeValue::Integer(number) => Ok(number.to_string()),
            DeValue::Array(list) if may_be_list => {
                let texts = list.iter().map(|one| self.text(one, false));
                Ok(texts.collect::<anyhow::Result<Vec<String>>>()?.join(","))
            }
            _ => Err(self.wrong(value, "a text or a number is wanted")),
        }
    }

    /// What clap has against an option, without the hints that would not help here.
    fn check(&self, verb: &Command, words: &[String]) -> Result<(), String> {
        let alone = verb.clone().mut_args(|arg| arg.required(false));
        let args = std::iter::once(verb.get_name()).chain(words.iter().map(String::as_str));
        let tried = alone.try_get_matches_from(args);
        let first = |error: clap::Error| {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        };
        tried.map(|_| ()).map_err(first)
    }

    fn wrong<T>(&self, what: &Spanned<T>, reason: impl fmt::Display) -> anyhow::Error {
        anyhow!("{}:{}: {reason}", self.path.display(), self.line(what.span().start))
    }

    /// The line, from 1, of the byte at `at`.
    fn line(&self, at: usize) -> usize {
        let before = self.text.as_bytes().get(..at).unwrap_or_default();
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }
}

/// A table of the file with its name.
type Entry<'a> = (Spanned<toml::de::DeString<'a>>, Spanned<DeTable<'a>>);

/// The options of a verb that a file can give.
fn options(verb: &Command) -> impl Iterator<Item = &Arg> {
    let all = verb.get_arguments().filter(|arg| !arg.is_positional() && !arg.is_hide_set());
    all.filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version" | "verbose"))
}

/// What a file calls it.
fn name(arg: &Arg) -> String {
    arg.get_long().map_or_else(|| arg.get_id().as_str().replace('_', "-"), str::to_owned)
}

/// Whether the command line says it, or something that goes against it.
fn is_decided(verb: &Command, matches: &ArgMatches, id: &str) -> bool {
    let said = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let against =
        |a: &Arg, b: &str| verb.get_arg_conflicts_with(a).iter().any(|other| other.get_id() == b);
    let goes_against = |arg: &Arg| {
        let other = arg.get_id().as_str();
        let own = options(verb).find(|arg| arg.get_id() == id);
        said(other) && (against(arg, id) || own.is_some_and(|own| against(own, other)))
    };
    said(id) || options(verb).any(goes_against)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn cli() -> Command {
        let mut cli = Cli::command();
        cli.build();
        cli
    }

    fn file(text: &str) -> File {
        File { path: "rxl.toml".into(), text: text.to_owned() }
    }

    fn applied(text: &str, line: &str) -> anyhow::Result<String> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let at = args.iter().skip(1).position(|word| !word.to_str().unwrap().starts_with('-'));
        let args = file(text).apply(&cli(), &args, at.unwrap() + 1)?;
        let words: Vec<String> = args.into_iter().map(|w| w.into_string().unwrap()).collect();
        Ok(words.join(" "))
    }

    #[test]
    fn options_come_before_the_users_and_give_way_to_them() {
        let text = "[migrate]\nssh = 'ssh -p 2'\nmax-pause = 100\nno-encrypt = true\n\
                    nics = ['eth1', 'eth2']\n[save]\nworkers = '2:thread'\n";
        let try_one = |line: &str| applied(text, line).unwrap();
        assert_eq!(
            try_one("rxl -v migrate g host2"),
            "rxl -v migrate --max-pause 100 --nics eth1,eth2 --no-encrypt -s ssh -p 2 g host2"
        );
        assert_eq!(
            try_one("rxl migrate --max-pause 7 --addresses 10.0.0.1 -s rsh g host2"),
            "rxl migrate --no-encrypt --max-pause 7 --addresses 10.0.0.1 -s rsh g host2"
        );
        assert_eq!(try_one("rxl save g f"), "rxl save --workers 2:thread g f");
        assert_eq!(try_one("rxl restore f"), "rxl restore f");
        // What is wrong is left to be explained.
        assert_eq!(try_one("rxl migrate --max-puase 1 g h"), "rxl migrate --max-puase 1 g h");
    }

    #[test]
    fn a_mistake_is_named_with_its_line_whatever_the_verb_is() {
        let wrong = |text: &str| applied(text, "rxl restore f").unwrap_err().to_string();
        let begins = |text: &str, beginning: &str| {
            let said = wrong(text);
            assert!(said.starts_with(beginning), "{said}");
        };
        begins("\n[migrate]\nmax-puase = 1\n", "rxl.toml:3: migrate has no option max-puase, only");
        begins("[mirgate]\n", "rxl.toml:1: rxl has no verb mirgate");
        begins("[domain-guard]\n", "rxl.toml:1: rxl has no verb domain-guard");
        begins("max-pause = 1\n", "rxl.toml:1: an option belongs under its verb");
        begins(
            "[migrate]\nmax-pause = 'x'\n",
            "rxl.toml:2: invalid value 'x' for '--max-pause <MS>'",
        );
        begins("[migrate]\nno-encrypt = 1\n", "rxl.toml:2: true or false is wanted");
        begins("[migrate]\nmax-pause = [1]\n", "rxl.toml:2: a text or a number is wanted");
        begins("[migrate]\nmax-pause =\n", "rxl.toml:2: ");
        begins("[migrate]\nDOM = 'g'\n", "rxl.toml:2: migrate has no option DOM");
    }

    #[test]
    fn the_save_helper_has_a_table_of_its_own() {
        let text = "[save-helper]\naddresses = ['10.0.0.1', '10.0.1.1']\nstreams = 4\n\
                    no-encrypt = true\n";
        let variables = file(text).variables().unwrap();
        let set = |name: &str| variables.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(set("RXL_ADDRESSES"), Some("10.0.0.1,10.0.1.1"));
        assert_eq!(set("RXL_STREAMS"), Some("4"));
        assert_eq!(set("RXL_NO_ENCRYPT"), Some("1"));
        assert_eq!(set("RXL_POLICY"), None);
        assert!(applied(text, "rxl restore f").is_ok());
        let said = file("[save-helper]\nnics = 'eth1'\n").variables().unwrap_err().to_string();
        assert!(said.starts_with("rxl.toml:2: no nics here, only workers"), "{said}");
    }
}
