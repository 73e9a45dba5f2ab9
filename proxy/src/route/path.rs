//! What a request's path means, so that what a rule matches is what the upstream serves.
//!
//! Programs differ in how they read an unusual path: some merge `//`, resolve `/../`, decode `%2f` before they look
//! for slashes, cut `;parameters`, take `\` for `/`, or decode twice. So a path is read in two ways. The *strict*
//! reading changes only what RFC 3986 (section 6.2.2) says is the same anyway: `%7E` is `~`, `%c3` is `%C3`; that is
//! what rules match first and what is forwarded. The *loose* reading does all of the above at once. A path whose two
//! readings lead to different rules is refused by the table; nothing is repaired. What no reading can make sense of
//! (a broken `%`, an encoded control byte, a `..` above the root) is refused here.
//!
//! The usual path has only one reading; finding that out is one pass over it, and costs no allocation.

use std::borrow::Cow;

/// Encodings inside encodings that are looked through: every program in front of an application may undo one.
const DECODINGS_MAX: usize = 3;

/// Why a path is not acceptable where rules look at paths. The words end up in the answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A `%` without two hexadecimal digits.
    #[error("a \"%\" in its path that encodes nothing")]
    Encoding,
    /// An encoded control byte.
    #[error("an encoded control byte in its path")]
    Control,
    /// A byte that must be encoded.
    #[error("a character in its path that must be encoded")]
    Character,
    /// A path that leads above the root.
    #[error("a path that leads above the root")]
    AboveRoot,
    /// An encoding of an encoding of an encoding.
    #[error("a path that is encoded too many times over")]
    TooDeep,
    /// A path that different programs read differently, and that leads to different routes.
    #[error("a path that can be read in two ways")]
    Ambiguous,
}

/// A path in its two readings; without its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Path<'p> {
    strict: Cow<'p, str>,
    /// Where it differs.
    loose: Option<String>,
}

impl<'p> Path<'p> {
    /// A path that nobody decides by.
    pub(crate) const fn unread(path: &'p str) -> Self {
        Self {
            strict: Cow::Borrowed(path),
            loose: None,
        }
    }

    /// Reads a path.
    ///
    /// # Errors
    /// It has no acceptable reading.
    pub(crate) fn read(path: &'p str) -> Result<Self, PathError> {
        if is_plain(path.as_bytes()) {
            return Ok(Self::unread(path));
        }
        let strict = strict(path)?;
        let loose = loose(strict.as_bytes())?;
        Ok(Self {
            loose: (loose != *strict).then_some(loose),
            strict,
        })
    }

    /// The reading that is forwarded.
    pub(crate) fn as_str(&self) -> &str {
        &self.strict
    }

    /// Whether that is what the client sent.
    pub(crate) const fn is_as_sent(&self) -> bool {
        matches!(self.strict, Cow::Borrowed(_))
    }

    /// The other one, where there are two.
    pub(crate) fn loose(&self) -> Option<&str> {
        self.loose.as_deref()
    }
}

/// Bytes that mean themselves in a path (RFC 3986, `pchar`), but for `;` and `%`.
const fn is_plain_byte(byte: u8) -> bool {
    is_unreserved(byte)
        || matches!(
            byte,
            b'!' | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b'='
                | b':'
                | b'@'
                | b'/'
        )
}

const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

const PLAIN: [bool; 256] = {
    let mut plain = [false; 256];
    let mut byte = 0_u8;
    loop {
        plain[byte as usize] = is_plain_byte(byte);
        if byte == u8::MAX {
            break plain;
        }
        byte += 1;
    }
};

/// Whether there is only one way to read it.
fn is_plain(path: &[u8]) -> bool {
    let mut before = 0;
    for (at, byte) in path.iter().enumerate() {
        let is_dot_segment = || {
            let rest = path[at..].split(|byte| *byte == b'/').next();
            matches!(rest, Some(b"." | b".."))
        };
        let doubtful = before == b'/' && (*byte == b'/' || (*byte == b'.' && is_dot_segment()));
        if !PLAIN[usize::from(*byte)] || doubtful {
            return false;
        }
        before = *byte;
    }
    true
}

/// Decodes what need not be encoded, and writes digits in capitals.
fn strict(path: &str) -> Result<Cow<'_, str>, PathError> {
    let bytes = path.as_bytes();
    let mut out = String::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'%' => {
                let decoded = encoded(&bytes[at..]).ok_or(PathError::Encoding)?;
                if decoded < 0x20 || decoded == 0x7f {
                    return Err(PathError::Control);
                }
                write_byte(&mut out, decoded, is_unreserved(decoded));
                at += 3;
            }
            0x21..0x7f if *byte != b'#' => {
                out.push(char::from(*byte));
                at += 1;
            }
            _ => return Err(PathError::Character),
        }
    }
    Ok(if out == path {
        Cow::Borrowed(path)
    } else {
        Cow::Owned(out)
    })
}

/// What the most generous program would make of it.
fn loose(path: &[u8]) -> Result<String, PathError> {
    let decoded = decode_all(path)?;
    let end = decoded.iter().position(|byte| matches!(byte, b'?' | b'#'));
    let decoded = &decoded[..end.unwrap_or(decoded.len())];
    let mut segments: Vec<&[u8]> = Vec::new();
    let mut ends_with_slash = false;
    for segment in decoded.split(|byte| matches!(byte, b'/' | b'\\')) {
        let name = segment
            .split(|byte| *byte == b';')
            .next()
            .unwrap_or_default();
        ends_with_slash = matches!(name, b"" | b"." | b"..");
        match name {
            b"" | b"." => {}
            b".." => drop(segments.pop().ok_or(PathError::AboveRoot)?),
            name => segments.push(name),
        }
    }
    let mut out = String::with_capacity(decoded.len());
    for segment in &segments {
        out.push('/');
        for byte in *segment {
            write_byte(&mut out, *byte, is_plain_byte(*byte));
        }
    }
    if ends_with_slash {
        out.push('/');
    }
    Ok(out)
}

fn decode_all(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let mut bytes = path.to_vec();
    for _ in 0..DECODINGS_MAX {
        let Some(decoded) = decode_once(&bytes) else {
            return Ok(bytes);
        };
        if decoded.iter().any(u8::is_ascii_control) {
            return Err(PathError::Control);
        }
        bytes = decoded;
    }
    decode_once(&bytes).map_or(Ok(bytes), |_| Err(PathError::TooDeep))
}

/// Undoes one encoding, if there is one. What is no encoding stays.
fn decode_once(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let decoded = encoded(&bytes[at..]);
        out.push(decoded.unwrap_or(*byte));
        at += if decoded.is_some() { 3 } else { 1 };
    }
    (out.len() < bytes.len()).then_some(out)
}

/// The byte that `%XX` at the beginning stands for.
fn encoded(bytes: &[u8]) -> Option<u8> {
    let digit = |digit: &u8| {
        char::from(*digit)
            .to_digit(16)
            .and_then(|value| u8::try_from(value).ok())
    };
    match bytes {
        [b'%', high, low, ..] => Some(digit(high)? << 4 | digit(low)?),
        _ => None,
    }
}

fn write_byte(out: &mut String, byte: u8, as_it_is: bool) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    if as_it_is {
        out.push(char::from(byte));
    } else {
        out.push('%');
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Both readings, or the one.
    fn read(path: &str) -> Result<String, PathError> {
        let path = Path::read(path)?;
        Ok(match path.loose() {
            None => path.as_str().to_owned(),
            Some(loose) => format!("{} or {loose}", path.as_str()),
        })
    }

    #[test]
    fn the_usual_path_has_one_reading_and_is_not_copied() {
        for path in [
            "/",
            "/a/b.html",
            "/a/",
            "/.well-known/acme",
            "/a..b/...",
            "/@user:x=1,2+3!$&'()*",
            "*",
        ] {
            let read = Path::read(path).unwrap();
            assert!(
                matches!(read.strict, Cow::Borrowed(same) if same == path),
                "{path}"
            );
            assert_eq!(read.loose(), None, "{path}");
        }
    }

    #[test]
    fn what_is_the_same_by_rfc_3986_is_read_as_the_same() {
        for (path, same) in [
            ("/%7Euser", "/~user"),
            ("/%61dmin", "/admin"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("/a%20b", "/a%20b"),
        ] {
            assert_eq!(read(path).unwrap(), same);
        }
    }

    #[test]
    fn what_programs_read_differently_has_two_readings() {
        for (path, readings) in [
            ("//admin", "//admin or /admin"),
            ("/a/./b", "/a/./b or /a/b"),
            ("/a/../admin", "/a/../admin or /admin"),
            ("/a/%2e%2e/admin", "/a/../admin or /admin"),
            ("/a/.%2E;x=1/admin", "/a/..;x=1/admin or /admin"),
            ("/a%2fb", "/a%2Fb or /a/b"),
            ("/a%5cb", "/a%5Cb or /a/b"),
            ("/a\\b", "/a\\b or /a/b"),
            ("/a%252fb", "/a%252fb or /a/b"),
            ("/%2561dmin", "/%2561dmin or /admin"),
            ("/admin;x=1", "/admin;x=1 or /admin"),
            ("/;/admin", "/;/admin or /admin"),
            ("/admin%3fx", "/admin%3Fx or /admin"),
            ("/admin%23x", "/admin%23x or /admin"),
            ("/a%3Ab", "/a%3Ab or /a:b"),
            ("/a/..", "/a/.. or /"),
            ("/a%25", "/a%25 or /a%25"),
        ] {
            let expected = if path == "/a%25" { "/a%25" } else { readings };
            assert_eq!(read(path).unwrap(), expected, "{path}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (path, why) in [
            ("/%", PathError::Encoding),
            ("/%4", PathError::Encoding),
            ("/%zz", PathError::Encoding),
            ("/a%00b", PathError::Control),
            ("/a%0d%0ab", PathError::Control),
            ("/a%250ab", PathError::Control),
            ("/a%7f", PathError::Control),
            ("/a#b", PathError::Character),
            ("/é", PathError::Character),
            ("/..", PathError::AboveRoot),
            ("/a/../../b", PathError::AboveRoot),
            ("/a%2f..%2f..%2fb", PathError::AboveRoot),
            ("/%2525252561", PathError::TooDeep),
        ] {
            assert_eq!(read(path), Err(why), "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_path_makes_the_reader_panic(path in "\\PC{0,60}") {
            let _ = Path::read(&path);
        }

        #[test]
        fn the_loose_reading_has_nothing_left_to_read_differently(path in "(/|//|\\.|\\.\\.|%2e|%2f|%5c|%25|%61|;|a|\\\\|%3f){1,12}") {
            if let Ok(read) = Path::read(&format!("/{path}")) {
                let loose = read.loose().unwrap_or(read.as_str()).to_owned();
                let again = Path::read(&loose).unwrap();
                prop_assert_eq!(again.as_str(), loose.as_str());
                prop_assert_eq!(again.loose(), None, "{}", loose);
            }
        }

        #[test]
        fn the_strict_reading_is_its_own_strict_reading(path in "(/|\\.|%2e|%2F|%25|%c3|;|a|%7e){1,12}") {
            if let Ok(read) = Path::read(&format!("/{path}")) {
                let strict = read.as_str().to_owned();
                let again = Path::read(&strict).unwrap();
                prop_assert_eq!(again.as_str(), strict.as_str());
                prop_assert_eq!(again.loose(), read.loose());
            }
        }
    }
}
