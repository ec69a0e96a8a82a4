//! What `xl` prints, word for word (including its spelling), where scripts may be waiting for it.
//! `{}` stands for what differs. Lines of rxl's own are not here: they begin with `rxl: `.
//!
//! The manual page lists them all, with what they mean.

/// A line of `xl`'s.
#[derive(Debug)]
pub(crate) struct Message {
    /// Whose it is: verbs, or "all".
    pub(crate) verbs: &'static str,
    /// The words.
    pub(crate) text: &'static str,
    /// When it is printed.
    pub(crate) meaning: &'static str,
}

macro_rules! messages {
    ($($verbs:literal: $($name:ident = $text:literal, $meaning:literal;)*)*) => {
        $($(pub(crate) const $name: &str = $text;)*)*

        /// All of them, in the order of their verbs.
        pub(crate) const MESSAGES: &[Message] = &[
            $($(Message { verbs: $verbs, text: $name, meaning: $meaning },)*)*
        ];
    };
}

messages! {
    "all":
    NO_OPTION = "option `{}' not supported.", "exit code 2";
    TOO_FEW = "'xl {}' requires at least {} argument{}.", "exit code 2";
    NO_DRY_RUN = "command does not implement -N (dryrun) option", "`-N`; exit code 1";
    NO_DOMAIN = "{} is an invalid domain identifier (rc={})", "there is no such domain";

    "migrate, save":
    SAVING = "Saving to {} new xl format (info {}/{}/{})",
        "the header is being written: flags, length of the configuration";

    "migrate":
    ACKNOWLEDGED = "migration sender: Target has acknowledged transfer.",
        "the target has a complete copy";
    GIVING = "migration sender: Giving target permission to start.",
        "from here on it cannot be cancelled";
    STARTED_THERE = "migration sender: Target reports successful startup.",
        "the guest runs at the target; the copy here is destroyed next";
    NOT_STARTED_THERE = "migration sender: Target reports startup failure (status code {}).",
        "the target could not start its copy";
    TRYING_TO_RESUME = "migration sender: Trying to resume at our end.",
        "the target's copy is gone";
    RESUMED = "migration sender: Resumed OK.", "the guest runs here again";
    SUCCESSFUL = "Migration successful.", "exit code 0";
    NOT_SUSPENDED = "Migration failed, failed to suspend at sender.",
        "the guest was never suspended and runs here";
    RESUMING = "Migration failed, resuming at sender.", "the guest is about to run here again";
    TARGET_FAILED = "Migration failed due to problems at target.", "exit code 1";
    UNDEFINED = "\
** Migration failed during final handshake **
Domain state is now undefined !
Please CHECK AT BOTH ENDS for running instances, before renaming and
 resuming at most one instance.  Two simultaneous instances of the domain
 would probably result in SEVERE DATA LOSS and it is now your
 responsibility to avoid that.  Sorry.",
        "nobody can know whether the guest runs at the target; the copy here stays suspended";

    "save":
    CANNOT_WRITE = "Failed to open temp file {} for writing", "exit code 1";
    NOT_SAVED = "Failed to save domain, resuming domain", "exit code 1";

    "migrate-receive, restore":
    LOADING = "Loading new save file {} (new xl fmt info {}/{}/{})",
        "the header was read: flags, length of the configuration";
    WRONG_MAGIC = "File has wrong magic number - corrupt or for a different tool?",
        "this is no saved domain";
    NEWER_XL = "Savefile has mandatory flag(s) {} which are not supported; need newer xl",
        "it has something in it that nobody knew of when this rxl was made";
    HAS_CONFIG = " Savefile contains xl domain config{}", "` in JSON format`, as since 4.5";
    PARSING = "Parsing config from {}", "`<saved>`, or the file that was named";

    "restore":
    CANNOT_OPEN = "Can't open restore file: {}", "exit code 1";

    "migrate-receive":
    TARGET_READY = "migration target: Ready to receive domain.", "the sender may begin";
    COMPLETE = "migration target: Transfer complete, requesting permission to start domain.",
        "there is a complete copy, paused";
    PERMITTED = "migration target: Got permission, starting domain.",
        "it gets the guest's name and is unpaused";
    STARTED = "migration target: Domain started successsfully.", "exit code 0";
    NOT_CREATED = "migration target: Domain creation failed (code {}).",
        "nothing of it is left; exit code 1";
    DESTROYING = "migration target: Failure, destroying our copy.", "exit code 1";
    NOT_DESTROYED = "migration target: Failed to destroy our copy (code {}).",
        "it is still there, paused";
    GIVING_BACK = "migration target: Cleanup OK, granting sender permission to resume.",
        "the copy is gone";
}

/// The words of a message, with `values` in the places of its `{}`.
pub(crate) fn fill(text: &str, values: &[&dyn std::fmt::Display]) -> String {
    let mut parts = text.split("{}");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for (part, value) in parts.zip(values) {
        out += &value.to_string();
        out += part;
    }
    out
}

#[cfg(test)]
mod tests {
    use rxl_migrate::xl::header::HeaderError;

    use super::*;

    #[test]
    fn the_words_are_in_xl_itself() {
        let Ok(xl) = std::fs::read("/usr/lib/xen-4.17/bin/xl") else {
            eprintln!("not tested: xen-utils-4.17 is not installed");
            return;
        };
        let has = |piece: &str| xl.windows(piece.len()).any(|bytes| bytes == piece.as_bytes());
        for message in MESSAGES {
            for piece in message.text.split("{}").filter(|piece| !piece.is_empty()) {
                assert!(has(piece), "xl does not say {piece:?}");
            }
        }
        assert!(!has("Domain creation went wrong"));
    }

    #[test]
    fn the_engine_says_xls_words_of_a_header_too() {
        assert_eq!(HeaderError::Magic.to_string(), WRONG_MAGIC);
        let unknown = HeaderError::UnknownFlags(0x10).to_string();
        assert_eq!(unknown, fill(NEWER_XL, &[&"0x10"]));
    }

    #[test]
    fn values_take_their_places_and_are_not_looked_into() {
        assert_eq!(
            fill(NO_DOMAIN, &[&"a{}b", &-6]),
            "a{}b is an invalid domain identifier (rc=-6)"
        );
        assert_eq!(fill(SUCCESSFUL, &[]), SUCCESSFUL);
    }
}
