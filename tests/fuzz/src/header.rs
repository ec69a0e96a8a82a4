//! What `xl` writes before a libxl stream, and how that begins.

use rxl_migrate::frame::DomId;
use rxl_migrate::stream::libxl::{START_BYTES, is_start};
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::header::{CONFIG_BYTES_MAX, HEADER_BYTES, Header, HeaderError};

use crate::assert_told;

pub(crate) fn run(bytes: &[u8]) {
    let mut stream = bytes;
    match Header::read_from(&mut stream) {
        Ok(header) => read(&header, bytes.len() - stream.len()),
        Err(error) => assert_told(&error),
    }
    let start = stream.first_chunk::<START_BYTES>();
    if start.is_some_and(|start| is_start(*start)) {
        assert!(stream.starts_with(b"LibxlFmt"));
    }
    // A configuration need not be in a header that can be read.
    let text = bytes.get(HEADER_BYTES + 4..).and_then(|text| std::str::from_utf8(text).ok());
    if let Some(text) = text {
        configure(text);
        let fits = !text.contains('\0') && text.len() < CONFIG_BYTES_MAX;
        assert_eq!(Header::new(text).is_ok(), fits);
    }
}

/// A header that was read from `consumed` bytes.
fn read(header: &Header, consumed: usize) {
    assert_eq!(consumed, HEADER_BYTES + header.info.2 as usize, "more or less than it says");
    assert!(header.config.len() <= CONFIG_BYTES_MAX && !header.config.contains('\0'));
    configure(&header.config);
    match Header::new(&header.config) {
        Ok(own) => {
            let bytes = own.to_bytes();
            let mut stream = &bytes[..];
            let again = Header::read_from(&mut stream).expect("rxl reads what it writes");
            assert!(again == own && stream.is_empty());
        }
        // One that comes without a NUL may be as long as one that comes with it.
        Err(HeaderError::ConfigTooLong(length)) => assert_eq!(length, CONFIG_BYTES_MAX),
        Err(other) => panic!("{other}"),
    }
}

fn configure(text: &str) {
    let mut config = match DomainConfig::parse(text) {
        Ok(config) => config,
        Err(error) => return assert_told(&error),
    };
    let name = config.name().unwrap_or_default().to_owned();
    let reboot = config.field("on_reboot").map(str::to_owned);
    config.set_name(&format!("{name}--incoming"));
    config.set_domid(Some(DomId(7)));
    let again = DomainConfig::parse(&config.to_json()).expect("rxl reads what it writes");
    assert_eq!(again, config);
    assert_eq!(again.name().and_then(|n| n.strip_suffix("--incoming")), Some(&*name));
    assert_eq!(again.field("on_reboot"), reboot.as_deref());
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let start = b"LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0";
    let configs = [
        "{}",
        r#"{"c_info":{}}"#,
        r#"{"c_info":{},"a":[{"b":[1,1.5]}]}"#,
        r#"{"c_info":{"type":"pv","name":"web","domid":7,"uuid":"8b1f"},"on_reboot":"restart",
        "b_info":{"max_memkb":18446744073709551615,"sched_params":{"weight":256}}}"#,
    ];
    let headers = configs.iter().map(|config| Header::new(config).expect("a short one"));
    let mut seeds: Vec<Vec<u8>> =
        headers.map(|header| [&header.to_bytes()[..], start].concat()).collect();
    for (offset, value) in [(0, 0), (32, 4), (36, 1), (36, 2), (36, 7), (44, 3), (47, 1), (51, 1)] {
        let mut other = seeds.first().cloned().unwrap_or_default();
        if let Some(byte) = other.get_mut(offset) {
            *byte = value;
        }
        seeds.push(other);
    }
    seeds
}
