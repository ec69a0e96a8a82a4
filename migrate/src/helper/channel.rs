//! The helper's end of the channel to libxl, as the engine's [`Toolstack`].

use std::fmt;
use std::io::{self, Read, Write};
use std::time::Duration;

use super::Callbacks;
use super::message::{Message, number};
use crate::frame::DomId;
use crate::hypervisor::{LogLevel, Toolstack};
use crate::report::Event;

/// The context of progress messages, which `xl` puts before each line.
const PROGRESS_CONTEXT: &str = "xc";
/// The context of log messages.
const LOG_CONTEXT: &str = "rxl";
/// Least number of pages between two progress messages.
const PROGRESS_STEP_MIN: u64 = 1024;

/// Where the events of a migration go besides libxl, which has no message for them.
pub type EventSink = Box<dyn FnMut(&Event)>;

/// Tells who watches over the migration that libxl is about to ask the guest to suspend.
pub type Notice = Box<dyn FnMut() -> io::Result<()>>;

/// The helper's end of the protocol: `messages` is its standard output, `replies` its standard
/// input.
///
/// Once libxl no longer reads, logging says nothing about it, but [`Toolstack::aborted`] is true
/// and the next request is an error: without libxl neither a save nor a restore can end well.
pub struct HelperChannel<R, W> {
    replies: R,
    messages: W,
    domain: DomId,
    callbacks: Callbacks,
    aborted: fn() -> bool,
    now: fn() -> Duration,
    events: Option<EventSink>,
    notice: Option<Notice>,
    shown: Option<Shown>,
    broken: Option<io::ErrorKind>,
}

/// The last progress message.
struct Shown {
    what: String,
    done: u64,
}

impl<R: Read, W: Write> HelperChannel<R, W> {
    /// For `domain`. `aborted` says whether the process has been told to end (libxl sends
    /// `SIGTERM`); `now` is the host's monotonic clock.
    pub fn new(
        replies: R,
        messages: W,
        domain: DomId,
        callbacks: Callbacks,
        aborted: fn() -> bool,
        now: fn() -> Duration,
    ) -> HelperChannel<R, W> {
        HelperChannel {
            replies,
            messages,
            domain,
            callbacks,
            aborted,
            now,
            events: None,
            notice: None,
            shown: None,
            broken: None,
        }
    }

    /// Sends every event to `sink` too.
    #[must_use]
    pub fn with_events(mut self, sink: EventSink) -> HelperChannel<R, W> {
        self.events = Some(sink);
        self
    }

    /// Has `notice` told before libxl is asked to suspend the guest; where it cannot be told, libxl
    /// is not asked.
    #[must_use]
    pub fn with_notice(mut self, notice: Notice) -> HelperChannel<R, W> {
        self.notice = Some(notice);
        self
    }

    /// Where the rings of the restored guest are. Stock sends it after a failure as well, and
    /// libxl expects it before [`HelperChannel::complete`].
    ///
    /// # Errors
    /// The channel broke.
    pub fn restore_results(&mut self, store: u64, console: u64) -> io::Result<()> {
        if !self.callbacks.has(number::RESTORE_RESULTS) {
            return Ok(());
        }
        self.send(&Message::RestoreResults { store, console })
    }

    /// Says how it ended (0 and 0, or -1 and an errno), and waits until libxl has taken note:
    /// only then may the process exit.
    ///
    /// # Errors
    /// The channel broke.
    pub fn complete(mut self, retval: i32, errno: i32) -> io::Result<()> {
        self.ask(&Message::Complete { retval, errno }).map(|_| ())
    }

    fn send(&mut self, message: &Message) -> io::Result<()> {
        if let Some(kind) = self.broken {
            return Err(io::Error::new(kind, "libxl no longer listens"));
        }
        let sent = self.messages.write_all(&message.encode()).and_then(|()| self.messages.flush());
        sent.inspect_err(|e| self.broken = Some(e.kind()))
    }

    fn ask(&mut self, message: &Message) -> io::Result<i32> {
        self.send(message)?;
        let mut reply = [0; 4];
        self.replies.read_exact(&mut reply).inspect_err(|e| self.broken = Some(e.kind()))?;
        Ok(i32::from_ne_bytes(reply))
    }

    /// A request whose answer is 0 or an error.
    fn request(&mut self, message: &Message) -> io::Result<()> {
        match self.ask(message)? {
            0 => Ok(()),
            code => Err(io::Error::other(format!("libxl answered {code}"))),
        }
    }

    /// A message that nobody waits for: a failure is found by whoever sends the next.
    fn tell(&mut self, message: &Message) {
        let _ = self.send(message);
    }

    /// Whether so much was done since the last progress message that another is due: a hundredth
    /// of the whole, at least [`PROGRESS_STEP_MIN`] pages, or the rest.
    fn progress_is_due(&self, what: &str, done: u64, total: u64) -> bool {
        match &self.shown {
            Some(shown) if shown.what == what && done >= shown.done => {
                let step = (total / 100).max(PROGRESS_STEP_MIN);
                done - shown.done >= step || done >= total && shown.done < total
            }
            _ => true,
        }
    }
}

impl<R: Read, W: Write> Toolstack for HelperChannel<R, W> {
    fn suspend(&mut self) -> io::Result<bool> {
        if !self.callbacks.has(number::SUSPEND) {
            let why = "libxl does not offer to suspend the guest";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        self.notice.as_mut().map_or(Ok(()), |notice| notice())?;
        match self.ask(&Message::Suspend)? {
            1 => Ok(true),
            0 => Ok(false),
            code => Err(io::Error::other(format!("libxl answered {code}"))),
        }
    }

    fn qemu_log_dirty(&mut self, on: bool) -> io::Result<()> {
        if !self.callbacks.has(number::SWITCH_QEMU_LOGDIRTY) {
            return Ok(());
        }
        self.request(&Message::SwitchQemuLogdirty { domain: self.domain, enable: on })
    }

    fn static_data_done(&mut self, missing_cpuid: bool, missing_msr: bool) -> io::Result<()> {
        if !self.callbacks.has(number::STATIC_DATA_DONE) {
            return Ok(());
        }
        self.request(&Message::StaticDataDone { missing_cpuid, missing_msr })
    }

    fn log(&mut self, level: LogLevel, text: &str) {
        let (context, text) = (LOG_CONTEXT.to_owned(), text.to_owned());
        self.tell(&Message::Log { level: level as u32, errno: None, context, text });
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) {
        if !self.progress_is_due(what, done, total) {
            return;
        }
        self.shown = Some(Shown { what: what.to_owned(), done });
        let (context, what) = (PROGRESS_CONTEXT.to_owned(), what.to_owned());
        self.tell(&Message::Progress { context, what, done, total });
    }

    fn event(&mut self, event: &Event) {
        if let Some(sink) = &mut self.events {
            sink(event);
        }
    }

    fn aborted(&self) -> bool {
        (self.aborted)() || self.broken.is_some()
    }

    fn now(&self) -> Duration {
        (self.now)()
    }
}

impl<R, W> fmt::Debug for HelperChannel<R, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HelperChannel")
            .field("domain", &self.domain)
            .field("callbacks", &self.callbacks)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What libxl offers in a plain save and a plain restore.
    const SAVE_CALLBACKS: Callbacks = Callbacks(0x88);
    const RESTORE_CALLBACKS: Callbacks = Callbacks(0x300);

    fn now() -> Duration {
        Duration::ZERO
    }

    fn text(s: &str) -> String {
        s.to_owned()
    }

    /// Everything that the channel wrote, readable while the channel still lives.
    #[derive(Clone, Default)]
    struct Sent(Arc<Mutex<Vec<u8>>>);

    impl Sent {
        fn messages(&self) -> Vec<Message> {
            let bytes = self.0.lock().unwrap().clone();
            let mut channel = &bytes[..];
            std::iter::from_fn(|| Message::read_from(&mut channel).unwrap()).collect()
        }
    }

    impl Write for Sent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type TestChannel = HelperChannel<Cursor<Vec<u8>>, Sent>;

    /// A channel of domain 7 on which libxl answers with `replies`, and what is sent on it.
    fn channel(callbacks: Callbacks, replies: &[i32]) -> (TestChannel, Sent) {
        let replies = replies.iter().flat_map(|r| r.to_le_bytes()).collect();
        let sent = Sent::default();
        let channel = HelperChannel::new(
            Cursor::new(replies),
            sent.clone(),
            DomId(7),
            callbacks,
            || false,
            now,
        );
        (channel, sent)
    }

    #[test]
    fn a_save_asks_for_what_libxl_offers_and_takes_its_answers() {
        let (mut channel, sent) = channel(SAVE_CALLBACKS, &[0, 1, 0, -1, 99]);
        channel.qemu_log_dirty(true).unwrap();
        assert!(channel.suspend().unwrap());
        assert!(!channel.suspend().unwrap());
        assert_eq!(channel.qemu_log_dirty(false).unwrap_err().to_string(), "libxl answered -1");
        channel.restore_results(1, 2).unwrap();
        channel.static_data_done(true, true).unwrap();
        channel.complete(0, 0).unwrap();
        let switch = |enable| Message::SwitchQemuLogdirty { domain: DomId(7), enable };
        let complete = Message::Complete { retval: 0, errno: 0 };
        let expected = [switch(true), Message::Suspend, Message::Suspend, switch(false), complete];
        assert_eq!(sent.messages(), expected);
    }

    #[test]
    fn a_restore_reports_its_rings_and_may_not_suspend() {
        let (mut channel, sent) = channel(RESTORE_CALLBACKS, &[0, 0]);
        assert_eq!(channel.suspend().unwrap_err().kind(), io::ErrorKind::Unsupported);
        channel.qemu_log_dirty(true).unwrap();
        channel.static_data_done(true, false).unwrap();
        channel.restore_results(3, 4).unwrap();
        channel.complete(-1, 5).unwrap();
        let expected = [
            Message::StaticDataDone { missing_cpuid: true, missing_msr: false },
            Message::RestoreResults { store: 3, console: 4 },
            Message::Complete { retval: -1, errno: 5 },
        ];
        assert_eq!(sent.messages(), expected);
    }

    #[test]
    fn an_answer_that_means_nothing_is_an_error() {
        let (mut channel, _) = channel(SAVE_CALLBACKS, &[2]);
        assert_eq!(channel.suspend().unwrap_err().to_string(), "libxl answered 2");
    }

    #[test]
    fn an_answer_that_ends_early_ends_the_operation() {
        for replies in [&[][..], &[1, 0, 0]] {
            let sent = Sent::default();
            let mut channel =
                HelperChannel::new(replies, sent.clone(), DomId(7), SAVE_CALLBACKS, || false, now);
            assert_eq!(channel.suspend().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert!(channel.aborted());
            assert_eq!(channel.complete(-1, 5).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(sent.messages(), [Message::Suspend]);
        }
    }

    #[test]
    fn logging_into_a_closed_channel_aborts() {
        let mut nothing = [0_u8; 0];
        let replies = io::empty();
        let closed = &mut nothing[..];
        let mut channel =
            HelperChannel::new(replies, closed, DomId(7), SAVE_CALLBACKS, || false, now);
        assert!(!channel.aborted());
        channel.log(LogLevel::Info, "Saving domain 7");
        assert!(channel.aborted());
        assert_eq!(channel.suspend().unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn a_signal_aborts() {
        let channel =
            HelperChannel::new(io::empty(), io::sink(), DomId(7), SAVE_CALLBACKS, || true, now);
        assert!(channel.aborted());
    }

    #[test]
    fn log_lines_carry_xentoollogs_levels() {
        let (mut channel, sent) = channel(SAVE_CALLBACKS, &[]);
        channel.log(LogLevel::Warn, "odd");
        let expected =
            Message::Log { level: 7, errno: None, context: text("rxl"), text: text("odd") };
        assert_eq!(sent.messages(), [expected]);
    }

    #[test]
    fn progress_is_sent_at_the_start_at_each_step_and_at_the_end_of_a_pass() {
        let (mut channel, sent) = channel(SAVE_CALLBACKS, &[]);
        let total = 1_000_000;
        for done in (0..=total).step_by(1000) {
            channel.progress("Frames iteration 0", done, total);
        }
        for done in [0, 100, 1023, 1024, 1100, 1100] {
            channel.progress("Frames iteration 1", done, 1100);
        }
        channel.progress("Frames iteration 1", 0, 1100);
        let done: Vec<u64> = sent
            .messages()
            .into_iter()
            .map(|m| match m {
                Message::Progress { done, .. } => done,
                other => panic!("{other:?}"),
            })
            .collect();
        let expected: Vec<u64> = (0..=100).map(|n| n * 10_000).chain([0, 1024, 1100, 0]).collect();
        assert_eq!(done, expected);
    }

    #[test]
    fn events_go_to_their_sink_and_not_to_libxl() {
        let (channel, sent) = channel(SAVE_CALLBACKS, &[]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let mut channel =
            channel.with_events(Box::new(move |e| sink.lock().unwrap().push(e.clone())));
        channel.event(&Event::SuspendAsked);
        assert_eq!(*seen.lock().unwrap(), [Event::SuspendAsked]);
        assert_eq!(sent.messages(), []);
    }
}
