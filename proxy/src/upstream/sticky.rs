//! The cookie by which a client stays with its server. Its value is a keyed digest: it tells two servers apart, on
//! every proxy with the same configuration, and tells nobody where they are.

use aws_lc_rs::hmac;

use super::address::Endpoint;

/// Of the digest. Two servers of a group share a value once in 2^64 pairs.
const VALUE_BYTES: usize = 8;

/// The value that stands for a server of a group.
pub(super) fn value(group: &str, secret: &str, endpoint: &Endpoint) -> Box<str> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    // A group's name holds no line break, so no two pairs read alike.
    let digest = hmac::sign(&key, format!("{group}\n{endpoint}").as_bytes());
    let bytes = digest.as_ref().iter().take(VALUE_BYTES);
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

/// The values of a field in a head that begins with a request line, blanks around them gone.
pub(super) fn fields<'h>(head: &'h [u8], name: &str) -> impl Iterator<Item = &'h [u8]> {
    let lines = head.split(|byte| *byte == b'\n').skip(1);
    lines.filter_map(move |line| {
        let (field, value) = line.split_at_checked(name.len())?;
        let value = value.strip_prefix(b":")?;
        field
            .eq_ignore_ascii_case(name.as_bytes())
            .then(|| value.trim_ascii())
    })
}

/// The value of one cookie in a `Cookie` header, without its quotes; the first if there are several.
pub(crate) fn find<'h>(header: &'h [u8], name: &str) -> Option<&'h [u8]> {
    header.split(|byte| *byte == b';').find_map(|pair| {
        let pair = pair.trim_ascii();
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        let quoted = value
            .strip_prefix(b"\"")
            .and_then(|value| value.strip_suffix(b"\""));
        Some(quoted.unwrap_or(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_by_its_whole_name() {
        let header = b"ahop=1; hop=2;hop=3; hopx=4; q=\"5\"; empty=";
        assert_eq!(find(header, "hop"), Some(&b"2"[..]));
        assert_eq!(find(header, "q"), Some(&b"5"[..]));
        assert_eq!(find(header, "empty"), Some(&b""[..]));
        assert_eq!(find(header, "ho"), None);
        assert_eq!(find(b"", "hop"), None);
    }

    #[test]
    fn a_field_is_found_in_a_head_whatever_its_case() {
        let head =
            b"GET /cookie: HTTP/1.1\r\nHost: h\r\nCOOKIE: a=1\r\nCookies: x\r\ncookie:b=2 \r\n\r\n";
        let found: Vec<&[u8]> = fields(head, "cookie").collect();
        assert_eq!(found, [&b"a=1"[..], b"b=2"]);
        assert_eq!(fields(b"", "cookie").count(), 0);
    }

    #[test]
    fn a_value_differs_by_server_group_and_secret_and_says_nothing_of_the_address() {
        let endpoint = |text: &str| Endpoint::Tcp(text.parse().unwrap());
        let one = value("web", "s", &endpoint("10.0.0.1:80"));
        assert_eq!(one.len(), 2 * VALUE_BYTES);
        assert_eq!(one, value("web", "s", &endpoint("10.0.0.1:80")));
        for other in [
            value("web", "s", &endpoint("10.0.0.2:80")),
            value("api", "s", &endpoint("10.0.0.1:80")),
            value("web", "t", &endpoint("10.0.0.1:80")),
        ] {
            assert_ne!(one, other);
        }
    }
}
