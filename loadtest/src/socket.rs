//! Just enough of WebSocket (RFC 6455) for one short text message at a time, both ends: what the counter echoes, and
//! what a client that stays across a hop asks of it. It knows one key, the RFC's example, so that nothing is hashed.

use std::io::{self, Read, Write};

pub use crate::bench::client::answer::{UPGRADE_ACCEPT, UPGRADE_KEY};

/// A text message.
pub const TEXT: u8 = 1;
/// The end of a conversation.
pub const CLOSE: u8 = 8;
/// Longest payload, in bytes: one length byte is enough for it.
const PAYLOAD_BYTES_MAX: u8 = 125;
/// Set in the first byte of a message that is not in pieces.
const WHOLE: u8 = 0x80;
/// Set in the second byte of a masked one.
const MASKED: u8 = 0x80;

/// Who writes: a client masks what it says (RFC 6455, section 5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client, with the mask of this message.
    Client([u8; 4]),
    /// The server.
    Server,
}

/// Writes one message.
///
/// # Errors
/// When it is longer than 125 bytes, or the connection fails.
pub fn write(to: &mut impl Write, end: End, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u8::try_from(payload.len()).unwrap_or(u8::MAX);
    if length > PAYLOAD_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = vec![WHOLE | kind];
    match end {
        End::Server => {
            bytes.push(length);
            bytes.extend_from_slice(payload);
        }
        End::Client(mask) => {
            bytes.push(MASKED | length);
            bytes.extend_from_slice(&mask);
            bytes.extend(
                payload
                    .iter()
                    .zip(mask.iter().cycle())
                    .map(|(byte, mask)| byte ^ mask),
            );
        }
    }
    to.write_all(&bytes)
}

/// Reads one message, and what kind it is.
///
/// # Errors
/// When it is in pieces or longer than 125 bytes, or the connection ends.
pub fn read(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 2];
    from.read_exact(&mut head)?;
    let length = head[1] & !MASKED;
    if head[0] & WHOLE == 0 || length > PAYLOAD_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut mask = [0; 4];
    if head[1] & MASKED != 0 {
        from.read_exact(&mut mask)?;
    }
    let mut payload = vec![0; usize::from(length)];
    from.read_exact(&mut payload)?;
    for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
    Ok((head[0] & 0x0f, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_writes_the_other_reads() {
        // The masked and the plain "Hello" of RFC 6455, section 5.7.
        let mut bytes = Vec::new();
        write(
            &mut bytes,
            End::Client([0x37, 0xfa, 0x21, 0x3d]),
            TEXT,
            b"Hello",
        )
        .unwrap();
        assert_eq!(
            bytes,
            [
                0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58
            ]
        );
        assert_eq!(
            read(&mut bytes.as_slice()).unwrap(),
            (TEXT, b"Hello".to_vec())
        );
        let mut bytes = Vec::new();
        write(&mut bytes, End::Server, TEXT, b"Hello").unwrap();
        assert_eq!(bytes, [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
        assert_eq!(
            read(&mut bytes.as_slice()).unwrap(),
            (TEXT, b"Hello".to_vec())
        );
    }

    #[test]
    fn what_is_too_long_is_refused_at_both_ends() {
        assert!(write(&mut Vec::new(), End::Server, TEXT, &[0; 126]).is_err());
        assert!(read(&mut [0x81, 126, 0, 200].as_slice()).is_err());
        assert!(read(&mut [0x01, 1, 0].as_slice()).is_err());
    }
}
