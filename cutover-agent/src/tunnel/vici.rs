//! A small client of strongSwan's control socket (VICI; src/libcharon/plugins/vici/README.md of strongSwan). One
//! command at a time, each with a limit; it knows the encoding, not what the commands mean.

use std::io::{self, Error, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

// Types of packets.
const COMMAND: u8 = 0;
const RESPONSE: u8 = 1;
const REGISTER: u8 = 3;
const CONFIRM: u8 = 5;
const EVENT: u8 = 7;
// Types of elements.
const SECTION: u8 = 1;
const SECTION_END: u8 = 2;
const VALUE: u8 = 3;
const LIST: u8 = 4;
const LIST_ITEM: u8 = 5;
const LIST_END: u8 = 6;
/// charon's own bound.
const PACKET_BYTES_MAX: usize = 512 << 10;
/// Sections inside sections that are read: charon uses four.
const DEPTH_MAX: usize = 16;

/// One element of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    Value(String, Vec<u8>),
    List(String, Vec<Vec<u8>>),
    Section(String, Vec<Item>),
}

/// A value.
pub(super) fn value(name: &str, value: impl AsRef<[u8]>) -> Item {
    Item::Value(name.to_owned(), value.as_ref().to_vec())
}

/// A list with one entry: all of ours have one.
pub(super) fn list(name: &str, entry: impl AsRef<[u8]>) -> Item {
    Item::List(name.to_owned(), vec![entry.as_ref().to_vec()])
}

/// A section.
pub(super) fn section(name: &str, items: Vec<Item>) -> Item {
    Item::Section(name.to_owned(), items)
}

impl Item {
    fn name(&self) -> &str {
        match self {
            Self::Value(name, _) | Self::List(name, _) | Self::Section(name, _) => name,
        }
    }

    /// The elements of a section; none of anything else.
    pub(super) fn items(&self) -> &[Self] {
        match self {
            Self::Section(_, items) => items,
            Self::Value(..) | Self::List(..) => &[],
        }
    }
}

/// The element of this name.
pub(super) fn find<'a>(items: &'a [Item], name: &str) -> Option<&'a Item> {
    items.iter().find(|item| item.name() == name)
}

/// The value of this name, as text.
pub(super) fn text<'a>(items: &'a [Item], name: &str) -> Option<&'a str> {
    match find(items, name)? {
        Item::Value(_, value) => std::str::from_utf8(value).ok(),
        Item::List(..) | Item::Section(..) => None,
    }
}

/// A connection to charon.
#[derive(Debug)]
pub(super) struct Vici(UnixStream);

impl Vici {
    /// Connects; no read or write waits longer than `limit`.
    pub(super) fn connect(socket: &Path, limit: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            let path = socket.display();
            Error::new(error.kind(), format!("no charon answers at {path}: {error}; start strongSwan, or set `vici` of [tunnel]"))
        })?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self(stream))
    }

    /// Gives a command; an answer that says no is an error with charon's reason.
    pub(super) fn order(&mut self, command: &str, items: &[Item]) -> io::Result<Vec<Item>> {
        self.send(COMMAND, command, items)?;
        let (kind, _, answer) = self.receive()?;
        conclude(command, kind, answer)
    }

    /// Gives a command that answers with events first; gives their messages.
    pub(super) fn collect(&mut self, command: &str, event: &str) -> io::Result<Vec<Vec<Item>>> {
        self.send(REGISTER, event, &[])?;
        if self.receive()?.0 != CONFIRM {
            return Err(Error::other(format!("charon knows no event {event}")));
        }
        self.send(COMMAND, command, &[])?;
        let mut events = Vec::new();
        loop {
            match self.receive()? {
                (EVENT, _, message) => events.push(message),
                (kind, _, answer) => return conclude(command, kind, answer).map(|_| events),
            }
        }
    }

    fn send(&mut self, kind: u8, name: &str, items: &[Item]) -> io::Result<()> {
        let mut packet = vec![kind];
        put_name(&mut packet, name);
        encode(&mut packet, items);
        let mut bytes = (packet.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(&packet);
        self.0.write_all(&bytes)
    }

    fn receive(&mut self) -> io::Result<(u8, String, Vec<Item>)> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let length = u32::from_be_bytes(length) as usize;
        if length > PACKET_BYTES_MAX {
            return Err(garbled());
        }
        let mut packet = vec![0; length];
        self.0.read_exact(&mut packet)?;
        parse(&packet).ok_or_else(garbled)
    }
}

fn conclude(command: &str, kind: u8, answer: Vec<Item>) -> io::Result<Vec<Item>> {
    if kind != RESPONSE {
        return Err(Error::other(format!("charon knows no command {command}")));
    }
    if text(&answer, "success") == Some("no") {
        let why = text(&answer, "errmsg").unwrap_or("no reason");
        return Err(Error::other(format!("charon refused {command}: {why}")));
    }
    Ok(answer)
}

fn garbled() -> Error {
    Error::new(ErrorKind::InvalidData, "charon's answer cannot be read")
}

fn put_name(bytes: &mut Vec<u8>, name: &str) {
    // Names are ours, and short.
    bytes.push(name.len() as u8);
    bytes.extend_from_slice(name.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &[u8]) {
    bytes.extend_from_slice(&(value.len() as u16).to_be_bytes());
    bytes.extend_from_slice(value);
}

fn encode(bytes: &mut Vec<u8>, items: &[Item]) {
    for item in items {
        match item {
            Item::Value(name, value) => {
                bytes.push(VALUE);
                put_name(bytes, name);
                put_value(bytes, value);
            }
            Item::List(name, entries) => {
                bytes.push(LIST);
                put_name(bytes, name);
                for entry in entries {
                    bytes.push(LIST_ITEM);
                    put_value(bytes, entry);
                }
                bytes.push(LIST_END);
            }
            Item::Section(name, items) => {
                bytes.push(SECTION);
                put_name(bytes, name);
                encode(bytes, items);
                bytes.push(SECTION_END);
            }
        }
    }
}

/// Type, name (of events) and content of a packet.
fn parse(packet: &[u8]) -> Option<(u8, String, Vec<Item>)> {
    let (&kind, mut rest) = packet.split_first()?;
    let name = if kind == EVENT {
        take_name(&mut rest)?
    } else {
        String::new()
    };
    let items = decode(&mut rest, 0)?;
    rest.is_empty().then_some((kind, name, items))
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count)?;
    *rest = left;
    Some(taken)
}

fn take_name(rest: &mut &[u8]) -> Option<String> {
    let length = usize::from(take(rest, 1)?[0]);
    Some(String::from_utf8_lossy(take(rest, length)?).into_owned())
}

fn take_value(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let length = u16::from_be_bytes(take(rest, 2)?.try_into().ok()?);
    Some(take(rest, usize::from(length))?.to_vec())
}

fn decode(rest: &mut &[u8], depth: usize) -> Option<Vec<Item>> {
    let mut items = Vec::new();
    while !rest.is_empty() {
        match take(rest, 1)?[0] {
            SECTION_END if depth > 0 => return Some(items),
            VALUE => items.push(Item::Value(take_name(rest)?, take_value(rest)?)),
            LIST => items.push(Item::List(take_name(rest)?, take_list(rest)?)),
            SECTION if depth < DEPTH_MAX => {
                items.push(Item::Section(take_name(rest)?, decode(rest, depth + 1)?))
            }
            _ => return None,
        }
    }
    (depth == 0).then_some(items)
}

fn take_list(rest: &mut &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut entries = Vec::new();
    loop {
        match take(rest, 1)?[0] {
            LIST_ITEM => entries.push(take_value(rest)?),
            LIST_END => return Some(entries),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item() -> impl Strategy<Value = Item> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..20);
        let leaf = prop_oneof![
            ("[a-z_-]{1,10}", bytes()).prop_map(|(name, value)| Item::Value(name, value)),
            ("[a-z_-]{1,10}", proptest::collection::vec(bytes(), 0..4))
                .prop_map(|(name, list)| Item::List(name, list)),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            ("[a-z_-]{1,10}", proptest::collection::vec(inner, 0..4))
                .prop_map(|(name, items)| Item::Section(name, items))
        })
    }

    proptest! {
        #[test]
        fn a_message_is_read_as_it_was_written(items in proptest::collection::vec(item(), 0..6)) {
            let mut packet = vec![RESPONSE];
            encode(&mut packet, &items);
            prop_assert_eq!(parse(&packet), Some((RESPONSE, String::new(), items)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&packet);
        }
    }

    #[test]
    fn the_encoding_is_the_documented_one() {
        // The example of strongSwan's own description.
        let items = [
            value("key1", "value1"),
            section(
                "section1",
                vec![
                    section("sub-section", vec![value("key2", "value2")]),
                    Item::List("list1".into(), vec![b"item1".to_vec(), b"item2".to_vec()]),
                ],
            ),
        ];
        let mut bytes = Vec::new();
        encode(&mut bytes, &items);
        let documented = b"\x03\x04key1\x00\x06value1\x01\x08section1\x01\x0bsub-section\x03\x04key2\x00\x06value2\x02\
                           \x04\x05list1\x05\x00\x05item1\x05\x00\x05item2\x06\x02";
        assert_eq!(bytes, documented);
    }

    #[test]
    fn a_refusal_is_an_error_with_its_reason() {
        let answer = vec![value("success", "no"), value("errmsg", "no such child")];
        let error = conclude("initiate", RESPONSE, answer).unwrap_err();
        assert_eq!(error.to_string(), "charon refused initiate: no such child");
    }
}
