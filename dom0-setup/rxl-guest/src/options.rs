//! Options from the kernel's command line, all of the form `rxl.NAME=VALUE`.

use std::time::Duration;

use crate::pattern::Content;

/// What the guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// `rxl.dirty`: pages rewritten per second.
    pub(crate) dirty_pages_per_s: u64,
    /// `rxl.working_set`: MiB that are rewritten; 0 stands for all.
    pub(crate) working_set_mib: u64,
    /// `rxl.leave`: MiB that are left alone beside what the system needs.
    pub(crate) leave_mib: usize,
    /// `rxl.content`: what pages hold.
    pub(crate) content: Content,
    /// `rxl.seed`: start of all pseudo-random content.
    pub(crate) seed: u64,
    /// `rxl.tick_ms`: time between two looks at the clock, and between two bursts of rewriting.
    pub(crate) tick: Duration,
    /// `rxl.status_s`: time between two status lines.
    pub(crate) status_interval: Duration,
    /// `rxl.no_suspend=1`: never answer a suspend request.
    pub(crate) ignore_suspend: bool,
}

impl Options {
    /// Reads the options; what is absent or makes no sense keeps its default.
    pub(crate) fn parse(command_line: &str) -> Self {
        let value = |name: &str| {
            command_line
                .split_ascii_whitespace()
                .filter_map(|word| word.strip_prefix("rxl."))
                .filter_map(|word| word.split_once('='))
                .find_map(|(key, value)| (key == name).then_some(value))
        };
        let number =
            |name: &str, default: u64| value(name).and_then(|v| v.parse().ok()).unwrap_or(default);
        Self {
            dirty_pages_per_s: number("dirty", 0),
            working_set_mib: number("working_set", 0),
            leave_mib: value("leave").and_then(|v| v.parse().ok()).unwrap_or(0),
            content: value("content").and_then(Content::parse).unwrap_or(Content::Random),
            seed: number("seed", 1),
            tick: Duration::from_millis(number("tick_ms", 20).max(1)),
            status_interval: Duration::from_secs(number("status_s", 30).max(1)),
            ignore_suspend: number("no_suspend", 0) == 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_mixed_line_reads_own_words() {
        let options =
            Options::parse("console=hvc0 rxl.dirty=200 rxl.content=text rxl.seed=x rxl.leave=48\n");
        assert_eq!(options.dirty_pages_per_s, 200);
        assert_eq!(options.content, Content::Text);
        assert_eq!((options.seed, options.leave_mib), (1, 48));
        assert!(!options.ignore_suspend);
    }

    #[test]
    fn test_parse_zero_tick_is_raised() {
        assert_eq!(Options::parse("rxl.tick_ms=0").tick, Duration::from_millis(1));
    }
}
