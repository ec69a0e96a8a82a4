//! Debian's unmodified `libxl-save-helper`, without a Xen underneath: what it sends must be what
//! this program takes for the helper protocol.
#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::process::{Command, Stdio};

use rxl_migrate::helper::Message;
use rxl_tests::stock;

/// Everything that the stock helper sends before it gives up for want of a hypervisor.
fn messages(args: &str) -> Vec<Message> {
    let output = Command::new(stock::program("libxl-save-helper").unwrap())
        .args(args.split_whitespace())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(!output.status.success(), "it found a hypervisor");
    let mut channel = &output.stdout[..];
    std::iter::from_fn(|| Message::read_from(&mut channel).unwrap()).collect()
}

fn logged(messages: &[Message]) -> Vec<(u32, Option<u32>, &str, &str)> {
    let lines = messages.iter().map(|message| match message {
        Message::Log { level, errno, context, text } => {
            (*level, *errno, context.as_str(), text.as_str())
        }
        other => panic!("{other:?}"),
    });
    lines.collect()
}

#[test]
fn the_stock_helper_takes_these_arguments_and_speaks_this_protocol() {
    const ENOENT: Option<u32> = Some(2);
    let starts = [
        ("--save-domain 2 0 7 1 136 0", "starting save"),
        ("--restore-domain 2 -1 7 1 0 2 0 768 0", "starting restore"),
    ];
    for (args, start) in starts {
        let messages = messages(args);
        let logged = logged(&messages);
        assert_eq!(logged[0], (1, Some(0), "libxl-save-helper", start));
        let failure = (8, ENOENT, "libxl-save-helper", "xc_interface_open failed");
        assert_eq!(logged.last(), Some(&failure));
        for message in &messages {
            assert_eq!(&Message::read_from(&mut &message.encode()[..]).unwrap().unwrap(), message);
        }
    }
}
