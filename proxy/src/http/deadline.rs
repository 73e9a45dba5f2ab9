//! What a client says of its own patience, read off a head as it goes upstream: only once the request is held, so that
//! nobody pays for it who is not.
//!
//! | field | value | whose |
//! |---|---|---|
//! | `grpc-timeout` | 1 to 8 digits and one of `H M S m u n` | gRPC over HTTP/2, "Requests" |
//! | `connect-timeout-ms` | 1 to 10 digits, milliseconds | Connect, "Unary-Request" |
//! | `request-timeout`, `x-request-timeout` | 1 to 8 digits, seconds | draft-thomson-hybi-http-timeout, and what is used like it |
//!
//! Read strictly: what is not exactly of this form, is zero, or comes twice says nothing, and goes on as it came. Of
//! several the shortest counts. Time runs from the arrival of the head here.
//!
//! **Shortened.** Servers count from the arrival at *them*. After a hold of seven seconds "ten seconds" would have the
//! server work for seven more than anybody waits, so what goes upstream is what is left. A head that was never held is
//! not touched.

use std::time::Duration;

use super::mux::answer::fields;

/// Most digits that gRPC allows, and we of seconds.
const DIGITS_MAX: usize = 8;
/// Most digits that Connect allows.
const CONNECT_DIGITS_MAX: usize = 10;
/// The largest number of eight digits.
const NUMBER_MAX: u128 = 99_999_999;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Grpc,
    Milliseconds,
    Seconds,
}

const KNOWN: [(&[u8], Form); 4] = [
    (b"grpc-timeout", Form::Grpc),
    (b"connect-timeout-ms", Form::Milliseconds),
    (b"request-timeout", Form::Seconds),
    (b"x-request-timeout", Form::Seconds),
];

impl Form {
    fn read(self, value: &[u8]) -> Option<Duration> {
        match self {
            Self::Grpc => {
                let (unit, digits) = value.split_last()?;
                let number = number(digits, DIGITS_MAX)?;
                let seconds = |each: u64| Some(Duration::from_secs(number * each));
                match unit {
                    b'H' => seconds(3600),
                    b'M' => seconds(60),
                    b'S' => seconds(1),
                    b'm' => Some(Duration::from_millis(number)),
                    b'u' => Some(Duration::from_micros(number)),
                    b'n' => Some(Duration::from_nanos(number)),
                    _ => None,
                }
            }
            Self::Milliseconds => number(value, CONNECT_DIGITS_MAX).map(Duration::from_millis),
            Self::Seconds => number(value, DIGITS_MAX).map(Duration::from_secs),
        }
    }

    /// The same time or a little less, at least one of the unit; whole seconds are rounded up.
    fn write(self, left: Duration) -> String {
        match self {
            Self::Grpc => {
                let units = [(1_000, 'u'), (1_000_000, 'm'), (1_000_000_000, 'S')];
                let fits = |(each, _): &(u128, char)| left.as_nanos() / each <= NUMBER_MAX;
                let (each, unit) = units
                    .into_iter()
                    .find(fits)
                    .unwrap_or((3_600_000_000_000, 'H'));
                format!("{}{unit}", (left.as_nanos() / each).clamp(1, NUMBER_MAX))
            }
            Self::Milliseconds => left.as_millis().max(1).to_string(),
            Self::Seconds => left.as_nanos().div_ceil(1_000_000_000).max(1).to_string(),
        }
    }
}

/// A number above zero of so many digits at most.
fn number(digits: &[u8], most: usize) -> Option<u64> {
    let is_number = (1..=most).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    if !is_number {
        return None;
    }
    let number = digits
        .iter()
        .fold(0, |sum: u64, digit| sum * 10 + u64::from(digit - b'0'));
    (number > 0).then_some(number)
}

/// How long after the arrival of its request a client has no use for an answer any more, if its head says so. `head` is
/// of our own writing.
pub(crate) fn of(head: &[u8]) -> Option<Duration> {
    KNOWN
        .iter()
        .filter_map(|(name, form)| form.read(only(head, name)?))
        .min()
}

/// Puts what is left in the place of what the client said, after it was held for so long.
pub(crate) fn shorten(head: &mut Vec<u8>, passed: Duration) {
    for (name, form) in KNOWN {
        let Some(value) = only(head, name) else {
            continue;
        };
        let Some(time) = form.read(value) else {
            continue;
        };
        let text = form.write(time.saturating_sub(passed));
        let start = value.as_ptr().addr() - head.as_ptr().addr();
        let place = start..start + value.len();
        head.splice(place, text.into_bytes());
    }
}

/// Whether a client speaks gRPC, of whatever kind: it reads the outcome from `grpc-status`, and takes 504 for an
/// upstream that cannot be reached.
pub(crate) fn is_grpc(head: &[u8]) -> bool {
    only(head, b"content-type").is_some_and(|value| {
        value
            .get(..16)
            .is_some_and(|begin| begin.eq_ignore_ascii_case(b"application/grpc"))
    })
}

/// Whether a page that loads itself again is an answer: somebody looks at it, and asking once more is no harm.
pub(crate) fn may_be_shown_a_page(head: &[u8]) -> bool {
    let is_safe = head.starts_with(b"GET ") || head.starts_with(b"HEAD ");
    let mut accepts = lines(head).filter(|(name, _)| name.eq_ignore_ascii_case(b"accept"));
    is_safe
        && accepts.any(|(_, value)| {
            let mut kinds = value.split(|byte| *byte == b',');
            kinds.any(|kind| {
                let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default();
                kind.trim_ascii().eq_ignore_ascii_case(b"text/html")
            })
        })
}

/// The value of a field that is there once.
fn only<'h>(head: &'h [u8], name: &[u8]) -> Option<&'h [u8]> {
    let mut found = lines(head).filter(|(known, _)| known.eq_ignore_ascii_case(name));
    let (_, value) = found.next()?;
    found.next().is_none().then_some(value)
}

/// Field lines, without the first.
fn lines(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let first = memchr::memchr(b'\n', head).map_or(head.len(), |end| end + 1);
    fields(&head[first..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &str) -> Vec<u8> {
        format!("GET /a HTTP/1.1\r\nHost: h\r\n{lines}\r\n").into_bytes()
    }

    fn said(lines: &str) -> Option<Duration> {
        of(&head(lines))
    }

    #[test]
    fn each_unit_of_grpc_is_understood() {
        let seconds = Duration::from_secs;
        let known = [
            ("2H", seconds(7200)),
            ("3M", seconds(180)),
            ("4S", seconds(4)),
            ("5m", Duration::from_millis(5)),
            ("6u", Duration::from_micros(6)),
            ("7n", Duration::from_nanos(7)),
            ("99999999H", seconds(99_999_999 * 3600)),
        ];
        for (text, time) in known {
            assert_eq!(
                said(&format!("Grpc-Timeout: {text}\r\n")),
                Some(time),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_exactly_so_says_nothing() {
        let wrong = [
            "",
            "S",
            "1",
            "0S",
            "1s",
            "1h",
            "-1S",
            "+1S",
            "1.5S",
            "1 S",
            "123456789S",
            "1SS",
            "S1",
            "0x1S",
            "1,2S",
        ];
        for text in wrong {
            assert_eq!(said(&format!("grpc-timeout: {text}\r\n")), None, "{text}");
        }
        for text in ["", "0", "-1", "1.5", "12345678901", "5s"] {
            assert_eq!(
                said(&format!("connect-timeout-ms: {text}\r\n")),
                None,
                "{text}"
            );
            assert_eq!(
                said(&format!("request-timeout: {text}\r\n")),
                None,
                "{text}"
            );
        }
        assert_eq!(said("grpc-timeout: 1S\r\ngrpc-timeout: 1S\r\n"), None);
        assert_eq!(said("x-grpc-timeout: 1S\r\n"), None);
    }

    #[test]
    fn the_shortest_counts() {
        let text = "request-timeout: 9\r\nx-request-timeout: 3\r\nconnect-timeout-ms: 4000\r\ngrpc-timeout: 7S\r\n";
        assert_eq!(said(text), Some(Duration::from_secs(3)));
        assert_eq!(
            said("request-timeout: 9\r\nconnect-timeout-ms: 4000\r\n"),
            Some(Duration::from_secs(4))
        );
        assert_eq!(said(""), None);
    }

    #[test]
    fn what_is_left_goes_upstream() {
        let mut text = head(
            "grpc-timeout: 10S\r\nX-A: b\r\nrequest-timeout: 10\r\nconnect-timeout-ms: 10000\r\n",
        );
        shorten(&mut text, Duration::from_millis(7_250));
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "GET /a HTTP/1.1\r\nHost: h\r\ngrpc-timeout: 2750000u\r\nX-A: b\r\nrequest-timeout: 3\r\n\
             connect-timeout-ms: 2750\r\n\r\n"
        );
        let mut long = head("grpc-timeout: 99999999H\r\n");
        shorten(&mut long, Duration::from_secs(1));
        assert!(of(&long).unwrap() > Duration::from_secs(99_999_000 * 3600));
    }

    #[test]
    fn what_says_nothing_is_not_touched() {
        let before = head("grpc-timeout: soon\r\nrequest-timeout: 0\r\n");
        let mut after = before.clone();
        shorten(&mut after, Duration::from_secs(1));
        assert_eq!(after, before);
    }

    #[test]
    fn a_page_is_for_those_who_look_at_it() {
        let asks = |method: &str, accept: &str| {
            let head = format!("{method} / HTTP/1.1\r\nHost: h\r\nAccept: {accept}\r\n\r\n");
            may_be_shown_a_page(head.as_bytes())
        };
        assert!(asks(
            "GET",
            "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"
        ));
        assert!(asks("HEAD", "image/png, Text/HTML;q=0.1"));
        assert!(!asks("POST", "text/html"));
        assert!(!asks("GET", "*/*"));
        assert!(!asks("GET", "application/json"));
        assert!(!may_be_shown_a_page(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"));
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        assert!(is_grpc(&head("Content-Type: application/grpc+proto\r\n")));
        assert!(is_grpc(&head("content-type: application/grpc-web\r\n")));
        assert!(!is_grpc(&head("content-type: application/json\r\n")));
        assert!(!is_grpc(&head("")));
    }
}
