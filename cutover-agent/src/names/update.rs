//! One dynamic update (RFC 2136) signed with TSIG (RFC 8945, HMAC-SHA-256): the message, its signature, and what the
//! server's answer means. Pure bytes: it opens no socket and reads no clock.
//!
//! A set of addresses is replaced within one message, so that at no moment the name has none: an answer of "no such
//! name" would be remembered by resolvers for longer than any address.

use std::net::IpAddr;

use aws_lc_rs::hmac;

// Types, classes and numbers of RFC 1035, 2136 and 8945.
const SOA: u16 = 6;
const A: u16 = 1;
const AAAA: u16 = 28;
const TSIG: u16 = 250;
const INTERNET: u16 = 1;
const ANY: u16 = 255;
const UPDATE: u16 = 5 << 11;
const HEADER: usize = 12;
/// The name of the only algorithm we speak; every server knows it (RFC 8945, section 6).
const ALGORITHM: &str = "hmac-sha256";
/// Seconds that clocks may differ by.
const FUDGE_S: u16 = 300;
/// Labels of a name, and bytes of a label.
const NAME_BYTES_MAX: usize = 255;
const LABEL_BYTES_MAX: usize = 63;

/// Why an update cannot be made, or was not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// Not a domain name.
    #[error("{0:?} is no domain name")]
    Name(String),
    /// The answer is no answer to this update.
    #[error("the name server's answer makes no sense, or is not signed with our key")]
    Nonsense,
    /// It said no.
    #[error("the name server refused the update: {0}")]
    Refused(&'static str),
}

/// A shared key of TSIG.
#[derive(Clone)]
pub struct TsigKey {
    name: Vec<u8>,
    secret: Vec<u8>,
}

impl std::fmt::Debug for TsigKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("TsigKey")
    }
}

impl TsigKey {
    /// A key of this name.
    ///
    /// # Errors
    /// When the name is none.
    pub fn new(name: &str, secret: Vec<u8>) -> Result<Self, UpdateError> {
        Ok(Self {
            name: wire_name(name)?,
            secret,
        })
    }

    fn sign(&self, parts: &[&[u8]]) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.secret);
        let mut context = hmac::Context::with_key(&key);
        for part in parts {
            context.update(part);
        }
        context.sign().as_ref().to_vec()
    }
}

/// What is to be so afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change<'a> {
    /// The zone.
    pub zone: &'a str,
    /// The name in it.
    pub name: &'a str,
    /// All of its addresses from now on; families that are not among them are left alone.
    pub addresses: &'a [IpAddr],
    /// For how long resolvers may remember them, in seconds.
    pub ttl_s: u32,
}

/// A signed update, and what its answer must match.
#[derive(Debug)]
pub struct Update {
    /// What is sent.
    pub message: Vec<u8>,
    id: u16,
    mac: Vec<u8>,
}

impl Update {
    /// The update that makes a change so. `now_s` is the wall clock, in seconds since 1970.
    ///
    /// # Errors
    /// When a name is none.
    pub fn new(
        change: &Change<'_>,
        key: &TsigKey,
        id: u16,
        now_s: u64,
    ) -> Result<Self, UpdateError> {
        let name = wire_name(change.name)?;
        let mut families: Vec<u16> = change
            .addresses
            .iter()
            .map(|address| kind(*address))
            .collect();
        families.sort_unstable();
        families.dedup();
        let updates = families.len() + change.addresses.len();
        let mut message = Vec::new();
        // One zone, no prerequisites, so many updates, and nothing more before the signature.
        for field in [id, UPDATE, 1, 0, updates as u16, 0] {
            message.extend_from_slice(&field.to_be_bytes());
        }
        message.extend_from_slice(&wire_name(change.zone)?);
        message.extend_from_slice(&[SOA.to_be_bytes(), INTERNET.to_be_bytes()].concat());
        for family in families {
            // Class ANY and no data: the whole set of this type goes (section 2.5.2).
            record(&mut message, &name, family, ANY, 0, &[]);
        }
        for address in change.addresses {
            let data = match address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            record(
                &mut message,
                &name,
                kind(*address),
                INTERNET,
                change.ttl_s,
                &data,
            );
        }
        let mac = key.sign(&[&message, &variables(key, now_s, FUDGE_S, 0, &[])]);
        let signature = signature(now_s, &mac, id);
        record(&mut message, &key.name, TSIG, ANY, 0, &signature);
        message[10..12].copy_from_slice(&1_u16.to_be_bytes());
        Ok(Self { message, id, mac })
    }

    /// Whether the server has made it so. Its answer must be signed with our key.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub fn check(&self, answer: &[u8], key: &TsigKey) -> Result<(), UpdateError> {
        let head = answer.get(..HEADER).ok_or(UpdateError::Nonsense)?;
        let field = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        if field(0) != self.id || field(2) & 0x8000 == 0 {
            return Err(UpdateError::Nonsense);
        }
        let code = field(2) & 0xf;
        // A server that does not know our key cannot sign with it; it only ever says no that way.
        if code != 0 {
            return Err(UpdateError::Refused(reason(code)));
        }
        self.check_signature(answer, key)
            .ok_or(UpdateError::Nonsense)
    }

    fn check_signature(&self, answer: &[u8], key: &TsigKey) -> Option<()> {
        let count = |at: usize| Some(u16::from_be_bytes(answer.get(at..at + 2)?.try_into().ok()?));
        let more = count(10)?.checked_sub(1)?;
        let mut at = HEADER;
        for _ in 0..count(4)? {
            at = skip_name(answer, at)? + 4;
        }
        for _ in 0..count(6)?.checked_add(count(8)?)?.checked_add(more)? {
            at = skip_record(answer, at)?;
        }
        let body = skip_name(answer, at)?;
        let data = answer.get(body + 10..)?;
        if answer.get(body..body + 2)? != TSIG.to_be_bytes() {
            return None;
        }
        let data = data.get(skip_name(data, 0)?..)?;
        let time = data.get(..6)?;
        let fudge = u16::from_be_bytes(data.get(6..8)?.try_into().ok()?);
        let length = usize::from(u16::from_be_bytes(data.get(8..10)?.try_into().ok()?));
        let mac = data.get(10..10 + length)?;
        let error = u16::from_be_bytes(data.get(12 + length..14 + length)?.try_into().ok()?);
        let other = data.get(16 + length..)?;
        let mut signed = answer.get(..at)?.to_vec();
        signed.get_mut(10..12)?.copy_from_slice(&more.to_be_bytes());
        let now_s = time
            .iter()
            .fold(0_u64, |time, byte| time << 8 | u64::from(*byte));
        let request = [&(self.mac.len() as u16).to_be_bytes()[..], &self.mac].concat();
        let wanted = key.sign(&[
            &request,
            &signed,
            &variables(key, now_s, fudge, error, other),
        ]);
        // Whoever can time this is the name server itself.
        (wanted == mac).then_some(())
    }
}

const fn kind(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(_) => A,
        IpAddr::V6(_) => AAAA,
    }
}

fn record(message: &mut Vec<u8>, name: &[u8], kind: u16, class: u16, ttl_s: u32, data: &[u8]) {
    message.extend_from_slice(name);
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&class.to_be_bytes());
    message.extend_from_slice(&ttl_s.to_be_bytes());
    message.extend_from_slice(&(data.len() as u16).to_be_bytes());
    message.extend_from_slice(data);
}

/// What is signed besides the message (RFC 8945, section 4.3.3).
fn variables(key: &TsigKey, now_s: u64, fudge_s: u16, error: u16, other: &[u8]) -> Vec<u8> {
    let mut bytes = key.name.clone();
    bytes.extend_from_slice(&ANY.to_be_bytes());
    bytes.extend_from_slice(&0_u32.to_be_bytes());
    bytes.extend_from_slice(&algorithm());
    bytes.extend_from_slice(&now_s.to_be_bytes()[2..]);
    bytes.extend_from_slice(&fudge_s.to_be_bytes());
    bytes.extend_from_slice(&error.to_be_bytes());
    bytes.extend_from_slice(&(other.len() as u16).to_be_bytes());
    bytes.extend_from_slice(other);
    bytes
}

/// The data of a TSIG record.
fn signature(now_s: u64, mac: &[u8], id: u16) -> Vec<u8> {
    let mut data = algorithm();
    data.extend_from_slice(&now_s.to_be_bytes()[2..]);
    data.extend_from_slice(&FUDGE_S.to_be_bytes());
    data.extend_from_slice(&(mac.len() as u16).to_be_bytes());
    data.extend_from_slice(mac);
    data.extend_from_slice(&id.to_be_bytes());
    // No error, nothing more.
    data.extend_from_slice(&[0; 4]);
    data
}

fn algorithm() -> Vec<u8> {
    // A constant that is a name.
    wire_name(ALGORITHM).unwrap_or_default()
}

/// A name as labels, in lower case, the root last.
fn wire_name(name: &str) -> Result<Vec<u8>, UpdateError> {
    let refuse = || UpdateError::Name(name.to_owned());
    let mut wire = Vec::with_capacity(name.len() + 2);
    for label in name.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > LABEL_BYTES_MAX || !label.is_ascii() {
            return Err(refuse());
        }
        wire.push(label.len() as u8);
        wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    wire.push(0);
    if wire.len() > NAME_BYTES_MAX {
        Err(refuse())
    } else {
        Ok(wire)
    }
}

/// Where a name ends that begins at `at`; a pointer ends it.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match usize::from(*message.get(at)?) {
            0 => return Some(at + 1),
            length if length >= 0xc0 => return Some(at + 2),
            length => at += length + 1,
        }
    }
}

fn skip_record(message: &[u8], at: usize) -> Option<usize> {
    let body = skip_name(message, at)?;
    let length = u16::from_be_bytes(message.get(body + 8..body + 10)?.try_into().ok()?);
    Some(body + 10 + usize::from(length))
}

const fn reason(code: u16) -> &'static str {
    match code {
        1 => "it cannot read it",
        2 => "it failed",
        3 => "it has no such name",
        4 => "it takes no updates",
        5 => "it does not allow it to us",
        9 => "it is not the zone's server, or does not take our key",
        10 => "the name is not in the zone",
        _ => "it gives a reason that we do not know",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> TsigKey {
        TsigKey::new("hopgate.", vec![7; 32]).unwrap()
    }

    fn change(addresses: &[IpAddr]) -> Change<'_> {
        Change {
            zone: "example.org",
            name: "WWW.example.org.",
            addresses,
            ttl_s: 30,
        }
    }

    #[test]
    fn one_message_takes_the_old_addresses_and_gives_the_new() {
        let addresses = [IpAddr::from([192, 0, 2, 7]), IpAddr::from([192, 0, 2, 8])];
        let update = Update::new(&change(&addresses), &key(), 0x1234, 1_700_000_000).unwrap();
        let message = &update.message;
        // One zone, three updates (one set deleted, two addresses added), one signature.
        assert_eq!(message[..12], [0x12, 0x34, 0x28, 0, 0, 1, 0, 0, 0, 3, 0, 1]);
        let name = b"\x03www\x07example\x03org\x00";
        assert_eq!(
            message
                .windows(name.len())
                .filter(|part| part == name)
                .count(),
            3
        );
    }

    #[test]
    fn a_signed_answer_is_believed_and_a_changed_one_is_not() {
        let addresses = [IpAddr::from([192, 0, 2, 7])];
        let update = Update::new(&change(&addresses), &key(), 7, 1_700_000_000).unwrap();
        let mut answer = [7_u16, 0x8000 | UPDATE, 0, 0, 0, 0]
            .map(u16::to_be_bytes)
            .concat();
        let request = [&32_u16.to_be_bytes()[..], &update.mac].concat();
        let mac = key().sign(&[
            &request,
            &answer,
            &variables(&key(), 1_700_000_001, FUDGE_S, 0, &[]),
        ]);
        let signature = signature(1_700_000_001, &mac, 7);
        record(&mut answer, &key().name, TSIG, ANY, 0, &signature);
        answer[11] = 1;
        assert_eq!(update.check(&answer, &key()), Ok(()));
        let other = TsigKey::new("hopgate", vec![8; 32]).unwrap();
        assert_eq!(update.check(&answer, &other), Err(UpdateError::Nonsense));
        answer[3] = 5;
        assert!(matches!(
            update.check(&answer, &key()),
            Err(UpdateError::Refused(_))
        ));
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in [
            "",
            "a..b",
            &"x".repeat(64),
            &"abc.".repeat(70),
            "bücher.example",
        ] {
            assert!(wire_name(name).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_answers_never_panic(answer in proptest::collection::vec(any::<u8>(), 0..120), id in any::<u16>()) {
            let update = Update { message: Vec::new(), id, mac: vec![1; 32] };
            let mut answer = answer;
            if answer.len() > 4 {
                answer[..2].copy_from_slice(&id.to_be_bytes());
                (answer[2], answer[3]) = (0x80, 0);
            }
            prop_assert!(update.check(&answer, &key()).is_err());
        }
    }
}
