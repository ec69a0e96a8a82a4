//! Streams as both ends write them, made from the engine's own formats.
#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::cell::RefCell;
use std::rc::Rc;

use rxl_migrate::frame::{PageType, Pfn};
use rxl_migrate::stream::libxc::{GuestKind, PageEntry, page_data_head, record};

use super::*;

/// What has been written, for the writer and for who looks meanwhile.
#[derive(Clone, Default)]
struct Shared(Rc<RefCell<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Pages with these pfns.
fn pages(pfns: impl Iterator<Item = u64>) -> Vec<u8> {
    let entry = |pfn| PageEntry { pfn: Pfn(pfn), kind: PageType::Normal };
    let entries: Vec<PageEntry> = pfns.map(entry).collect();
    let mut out = page_data_head(&entries).unwrap();
    out.resize(out.len() + entries.len() * PAGE_SIZE, 7);
    out
}

/// A migration's forward direction, and where each point is in it.
fn sender() -> (Vec<u8>, Vec<(Point, usize)>) {
    let mut points = Vec::new();
    let mut out = Header::new("{}").unwrap().to_bytes();
    points.push((Point::Stream, out.len()));
    out.extend(b"LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0");
    let header = StreamHeader { version: 3, guest: GuestKind::Pv, xen: (4, 17) };
    out.extend(header.to_bytes());
    out.extend(record(RecordKind::StaticDataEnd, &[]).unwrap());
    let first = PAGES as u64;
    for start in (0..first).step_by(1024) {
        out.extend(pages(start..start + 1024));
    }
    points.push((Point::Pages, out.len()));
    out.extend(pages(first..first + 5));
    points.push((Point::Again, out.len()));
    out.extend(pages([first + 9, 17].into_iter()));
    points.push((Point::State, out.len()));
    out.extend(record(RecordKind::SharedInfo, &[&[1; 13]]).unwrap());
    out.extend(record(RecordKind::X86TscInfo, &[&[0; 24]]).unwrap());
    out.extend(record(RecordKind::End, &[]).unwrap());
    // A record with a body that needs padding, and the end.
    out.extend([2, 0, 0, 0, 5, 0, 0, 0, 9, 9, 9, 9, 9, 0, 0, 0]);
    points.push((Point::End, out.len()));
    out.extend([0; 8]);
    points.push((Point::Go, out.len()));
    out.extend(Message::Go.text());
    (out, points)
}

fn receiver() -> (Vec<u8>, Vec<(Point, usize)>) {
    let messages = [
        (Message::Banner, Point::Banner),
        (Message::Ready, Point::Ready),
        (Message::Report, Point::Report),
    ];
    let (mut out, mut points) = (Vec::new(), Vec::new());
    for (message, point) in messages {
        points.push((point, out.len()));
        out.extend(message.text());
    }
    out.push(0);
    (out, points)
}

/// What goes on of `bytes`, and the points with what had gone on before each.
fn through(bytes: &[u8], is_sender: bool) -> (Vec<u8>, Vec<(Point, usize)>) {
    let out = Shared::default();
    let mut points = Vec::new();
    let mut reached = |point| points.push((point, out.0.borrow().len()));
    let follow = if is_sender { forward } else { backward };
    follow(bytes, out.clone(), &mut reached).unwrap();
    let out = out.0.borrow().clone();
    (out, points)
}

#[test]
fn every_point_of_a_migration_comes_before_its_bytes_go_on() {
    for (made, is_sender) in [(sender(), true), (receiver(), false)] {
        let (bytes, points) = made;
        assert_eq!(through(&bytes, is_sender), (bytes, points));
    }
}

#[test]
fn with_links_the_first_end_of_a_pass_is_a_point() {
    let (bytes, points) = sender();
    let (_, start) = points[1];
    let end = |pass: u64| [record(RecordKind::RxlPassEnd, &[&pass.to_le_bytes(), &[0; 8]])];
    let mut with = bytes[..start].to_vec();
    with.extend(end(0).into_iter().chain(end(1)).flat_map(Result::unwrap));
    let (out, points) = through(&with, true);
    assert_eq!(out, with);
    assert_eq!(points[1..], [(Point::PassEnd, start)]);
}

#[test]
fn a_stream_that_ends_anywhere_or_is_something_else_goes_on_as_it_is() {
    for (made, is_sender) in [(sender(), true), (receiver(), false)] {
        let (bytes, points) = made;
        // Around each point, and in the midst of records and messages.
        let near = points.iter().flat_map(|(_, at)| [at + 1, at + 20]);
        for end in near.filter(|end| *end < bytes.len()) {
            let cut = &bytes[..end];
            assert_eq!(through(cut, is_sender).0, cut);
            let mut other = bytes.clone();
            other[end] ^= 0x5a;
            assert_eq!(through(&other, is_sender).0, other);
        }
        let tail = [&bytes[..], b"and more"].concat();
        assert_eq!(through(&tail, is_sender).0, tail);
    }
}
