//! W3C Trace Context: which trace a request belongs to, and which span of it called us.
//!
//! While our own spans are recorded, a trace goes on with a new span id, or begins here. While they are not, we are
//! no participant and pass both fields on as they are; a span id that nobody records would cut the trace in two.
//! What is malformed is dropped, never repaired, and `tracestate` never goes on without its `traceparent`.

use super::{OurField, Said, Tracing};
use crate::http::fields::Fields;
use crate::http::request::RequestId;

/// Most bytes of a tracestate (section 3.3.1.5 asks to carry at least so many).
const STATE_BYTES_MAX: usize = 512;
/// Most members of a tracestate (section 3.3.1.1).
const STATE_MEMBERS_MAX: usize = 32;

/// A place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TraceParent {
    pub(crate) trace_id: u128,
    pub(crate) span_id: u64,
    /// Bit 0: the trace is recorded. Bit 1: the trace id is random.
    pub(crate) flags: u8,
}

impl TraceParent {
    /// Reads version 00, and of later versions the part that is defined as in version 00 (section 3.2.4).
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let (head, rest) = value.split_at_checked(55)?;
        let version = hex(&head[..2])?;
        let fits = match version {
            0 => rest.is_empty(),
            0xff => false,
            _ => rest.is_empty() || rest[0] == b'-',
        };
        let dashes = head[2] == b'-' && head[35] == b'-' && head[52] == b'-';
        let trace_id = hex(&head[3..35])?;
        let span_id = u64::try_from(hex(&head[36..52])?).ok()?;
        let flags = u8::try_from(hex(&head[53..])?).ok()?;
        (fits && dashes && trace_id != 0 && span_id != 0).then_some(Self {
            trace_id,
            span_id,
            // Other bits of version 00 have no meaning and must be sent as zero.
            flags: flags & 3,
        })
    }

    /// A new trace, named after the request.
    pub(crate) fn begin(id: RequestId) -> Self {
        let high = mixed(id.origin ^ mixed(id.number));
        let low = mixed(high ^ id.number);
        Self {
            trace_id: u128::from(high) << 64 | u128::from(low),
            span_id: span_of(id),
            flags: 1,
        }
    }

    /// The same trace, called by our span.
    pub(crate) fn goes_on(self, id: RequestId) -> Self {
        Self {
            span_id: span_of(id),
            ..self
        }
    }

    fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"traceparent: 00-");
        write_hex(out, self.trace_id, 32);
        out.push(b'-');
        write_hex(out, u128::from(self.span_id), 16);
        out.push(b'-');
        write_hex(out, u128::from(self.flags), 2);
        out.extend_from_slice(b"\r\n");
    }
}

/// Where a request stands in its trace, before us and with us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hop {
    /// Who called us, if it said so.
    pub(crate) parent: Option<TraceParent>,
    /// Our span, as the upstream is told.
    pub(crate) own: TraceParent,
}

impl Hop {
    /// Of a request that goes on with a span of ours.
    pub(crate) fn of(said: Said<'_>, id: RequestId) -> Self {
        let parent = received(said);
        let own = parent.map_or_else(|| TraceParent::begin(id), |parent| parent.goes_on(id));
        Self { parent, own }
    }

    /// Whether whoever began the trace wants it recorded.
    pub(crate) const fn is_recorded(&self) -> bool {
        self.own.flags & 1 == 1
    }
}

/// The place in a trace a request came with, if it is well-formed and there once.
pub(crate) fn received(said: Said<'_>) -> Option<TraceParent> {
    if !said.seen.has(OurField::TraceParent) {
        return None;
    }
    said.fields
        .single("traceparent")
        .and_then(TraceParent::parse)
}

/// Appends the trace context that an upstream gets.
pub(super) fn write(said: Said<'_>, tracing: Tracing, id: RequestId, out: &mut Vec<u8>) {
    let received = received(said);
    let passed = match (received, tracing) {
        (None, Tracing::Off) => return,
        (Some(parent), Tracing::Off) => parent,
        (_, Tracing::On) => Hop::of(said, id).own,
    };
    passed.write(out);
    if received.is_some() && said.seen.has(OurField::TraceState) && is_state(said.fields) {
        said.fields.visit("tracestate", &mut |value| {
            out.extend_from_slice(b"tracestate: ");
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        });
    }
}

/// Whether all tracestate fields together are a list of `key=value`, within bounds.
fn is_state(fields: &dyn Fields) -> bool {
    let (mut bytes, mut members, mut is_list) = (0, 0, true);
    fields.visit("tracestate", &mut |value| {
        bytes += value.len();
        for member in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            members += usize::from(!member.is_empty());
            is_list &= member.is_empty() || is_member(member);
        }
    });
    is_list && bytes <= STATE_BYTES_MAX && members <= STATE_MEMBERS_MAX
}

fn is_member(member: &[u8]) -> bool {
    let Some(equals) = member.iter().position(|byte| *byte == b'=') else {
        return false;
    };
    let (key, value) = (&member[..equals], &member[equals + 1..]);
    let in_key =
        |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-*/@".contains(byte);
    let in_value = |byte: &u8| (0x20..0x7f).contains(byte) && !b",=".contains(byte);
    let key_fits = (1..=256).contains(&key.len()) && key.iter().all(in_key);
    key_fits && (1..=256).contains(&value.len()) && value.iter().all(in_value)
}

/// Our span of a request; never zero.
fn span_of(id: RequestId) -> u64 {
    mixed(id.origin.rotate_left(32) ^ id.number).max(1)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): neighbours become strangers, and no two the same.
const fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Lower-case digits only, as the recommendation demands.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0_u128, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

fn write_hex(out: &mut Vec<u8>, number: u128, places: u32) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend(
        (0..places)
            .rev()
            .map(|place| DIGITS[(number >> (place * 4)) as usize & 15]),
    );
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_taken_as_the_recommendation_says() {
        let good = TraceParent::parse(GOOD.as_bytes()).unwrap();
        assert_eq!(good.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!((good.span_id, good.flags), (0xb7ad_6b71_6920_3331, 1));
        let later = format!("cc{}-what-the-future-holds", &GOOD[2..]);
        assert_eq!(TraceParent::parse(later.as_bytes()), Some(good));
        let zero_trace = format!("00-{}-b7ad6b7169203331-01", "0".repeat(32));
        for bad in [
            "",
            &GOOD[..54],
            &format!("{GOOD}-more"),
            &format!("cc{}x", &GOOD[2..]),
            &format!("ff{}", &GOOD[2..]),
            &GOOD.to_uppercase(),
            &GOOD.replace("b7ad6b7169203331", "0000000000000000"),
            &GOOD.replace('-', "_"),
            &GOOD.replace("0af7", "0ag7"),
            &zero_trace,
        ] {
            assert_eq!(TraceParent::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn members_of_a_tracestate_have_a_key_and_a_value() {
        for (member, fits) in [
            ("rojo=00f067aa0ba902b7", true),
            ("a@b=c d", true),
            ("A=b", false),
            ("a", false),
            ("a=", false),
            ("=b", false),
            ("a=b=c", false),
        ] {
            assert_eq!(is_member(member.as_bytes()), fits, "{member}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(trace_id in 1_u128.., span_id in 1_u64.., flags in 0_u8..4) {
            let parent = TraceParent { trace_id, span_id, flags };
            let mut out = Vec::new();
            parent.write(&mut out);
            let value = out.strip_prefix(b"traceparent: ").unwrap().strip_suffix(b"\r\n").unwrap();
            prop_assert_eq!(TraceParent::parse(value), Some(parent));
        }

        #[test]
        fn no_value_makes_the_reader_panic(value in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = TraceParent::parse(&value);
        }
    }
}
