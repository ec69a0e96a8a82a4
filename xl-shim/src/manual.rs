//! What is made from the command line ([`crate::cli`]) for people and shells: the manual page and
//! completions.

use anyhow::Context;
use clap::CommandFactory;

use crate::cli::Cli;
use crate::words::{self, Message};

/// The script for `shell`.
pub(crate) fn completions(shell: clap_complete::Shell) -> String {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rxl", &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// The manual page of a verb, or of all: the program, each verb, and what `xl` would say as well.
pub(crate) fn man(verb: Option<&str>) -> anyhow::Result<String> {
    let mut cli = Cli::command();
    cli.build();
    let mut out = Vec::new();
    if let Some(name) = verb {
        let found = cli.get_subcommands().find(|v| v.get_name() == name && !v.is_hide_set());
        let command = found.with_context(|| format!("rxl has no verb {name}"))?.clone();
        clap_mangen::Man::new(command).render(&mut out)?;
        return Ok(String::from_utf8_lossy(&out).into_owned());
    }
    clap_mangen::Man::new(cli.clone()).render(&mut out)?;
    for verb in cli.get_subcommands().filter(|v| !v.is_hide_set()) {
        let page = clap_mangen::Man::new(verb.clone());
        let title = format!(".SH \"RXL {}\"\n", verb.get_name().to_uppercase());
        out.extend_from_slice(title.as_bytes());
        page.render_synopsis_section(&mut out)?;
        page.render_description_section(&mut out)?;
        page.render_options_section(&mut out)?;
        if let Some(more) = verb.get_after_help() {
            out.extend_from_slice(paragraphs(&more.to_string()).as_bytes());
        }
    }
    out.extend_from_slice(messages_section().as_bytes());
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// What follows a verb's options, in roff: a paragraph for each line.
fn paragraphs(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.is_empty());
    let escaped = lines.map(|line| line.replace('\\', "\\e").replace('-', "\\-"));
    escaped.map(|line| format!(".PP\n\\&{line}\n")).collect()
}

/// The manual's section of `xl`'s messages, in roff.
fn messages_section() -> String {
    let mut out = ".SH MESSAGES\nOn standard error, word for word as xl's:\n".to_owned();
    for Message { verbs, text, meaning } in words::MESSAGES {
        out += ".TP\n";
        for line in text.lines() {
            // A quote or a point in the first place would be a command.
            out += &format!("\\&{line}\n.br\n");
        }
        out += &format!("({verbs}) {meaning}\n");
    }
    out
}
