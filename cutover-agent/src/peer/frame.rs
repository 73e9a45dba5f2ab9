//! The one frame of the peer protocol, on every connection: lengths first, then a small typed head, then raw bytes.
//!
//! ```text
//! u32 LE  bytes that follow   (≤ FRAME_BYTES_MAX)
//! u24 LE  bytes of the head
//! u8      channel: whose frame it is
//! head    postcard
//! body    raw: file data or an encoded message, never copied through the serialiser
//! ```
//! Decoding never panics and never allocates more than the declared length, which is bounded before it is believed.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The largest frame anybody may send, in bytes. Data frames stay near 1 MiB; the rest is room for manifests.
pub const FRAME_BYTES_MAX: usize = 16 << 20;
const LENGTHS: usize = 8;
/// The channel stands above the 24 bits of the head's length.
const CHANNEL_SHIFT: u32 = 24;

/// Whose frame it is; they share connections and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    /// Control messages, greetings and blocks of files.
    Trees,
    /// Pages of memory.
    Pages,
}

impl Channel {
    const fn number(self) -> u8 {
        match self {
            Self::Trees => 0,
            Self::Pages => 1,
        }
    }

    const fn of(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Trees),
            1 => Some(Self::Pages),
            _ => None,
        }
    }
}

/// Why bytes from the peer are not a frame.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The stream ended or failed.
    #[error("the connection to the peer broke: {0}")]
    Broken(#[from] std::io::Error),
    /// A declared length is out of bounds.
    #[error(
        "the peer declared a frame of {bytes} bytes, {FRAME_BYTES_MAX} are allowed: it speaks another protocol"
    )]
    TooLong {
        /// What it declared.
        bytes: usize,
    },
    /// The head is not what belongs here.
    #[error("the peer sent a frame we cannot read: it speaks another version of the protocol")]
    Garbled,
}

/// A frame taken off the wire.
#[derive(Debug)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
    head: usize,
    channel: Channel,
}

impl Frame {
    /// Decodes the head as `T`.
    pub(crate) fn head<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        postcard::from_bytes(&self.bytes[..self.head]).map_err(|_| FrameError::Garbled)
    }

    /// Whose frame it is.
    pub(crate) const fn channel(&self) -> Channel {
        self.channel
    }

    /// The raw bytes after the head.
    pub(crate) fn body(&self) -> &[u8] {
        &self.bytes[self.head..]
    }
}

/// An encoded frame on its way: lengths and head, and a body that is not copied for it. All of it may be in the head, of
/// which the sender may keep a share.
#[derive(Debug)]
pub(crate) struct Parcel {
    head: Arc<Vec<u8>>,
    body: Vec<u8>,
}

impl Parcel {
    /// Bytes on the wire.
    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// What is written, in order.
    pub(crate) fn parts(&self) -> [&[u8]; 2] {
        [&self.head, &self.body]
    }
}

impl From<Vec<u8>> for Parcel {
    fn from(frame: Vec<u8>) -> Self {
        Arc::new(frame).into()
    }
}

impl From<Arc<Vec<u8>>> for Parcel {
    fn from(frame: Arc<Vec<u8>>) -> Self {
        Self {
            head: frame,
            body: Vec::new(),
        }
    }
}

/// Encodes the lengths and the head of a frame of [`Channel::Trees`] in front of its body.
///
/// # Errors
/// When it would exceed [`FRAME_BYTES_MAX`].
pub(crate) fn parcel<T: Serialize>(head: &T, body: Vec<u8>) -> Result<Parcel, FrameError> {
    let mut head = encode(head, &[])?;
    let [a, b, c, d, ..] = head[..] else {
        return Err(FrameError::Garbled);
    };
    let bytes = u32::from_le_bytes([a, b, c, d]) as usize + body.len();
    if bytes >= FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes });
    }
    // It fits: bounded just above.
    head[..4].copy_from_slice(&(bytes as u32).to_le_bytes());
    let head = Arc::new(head);
    Ok(Parcel { head, body })
}

/// Encodes a whole frame of [`Channel::Trees`], ready to be written in one go.
///
/// # Errors
/// When it would exceed [`FRAME_BYTES_MAX`].
pub(crate) fn encode<T: Serialize>(head: &T, body: &[u8]) -> Result<Vec<u8>, FrameError> {
    encode_on(Channel::Trees, head, body)
}

/// Encodes a whole frame of any channel.
///
/// # Errors
/// When it would exceed [`FRAME_BYTES_MAX`].
pub(crate) fn encode_on<T: Serialize>(
    channel: Channel,
    head: &T,
    body: &[u8],
) -> Result<Vec<u8>, FrameError> {
    let head = postcard::to_stdvec(head).map_err(|_| FrameError::Garbled)?;
    let bytes = 4 + head.len() + body.len();
    if bytes >= FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes });
    }
    let mut frame = Vec::with_capacity(4 + bytes);
    // Both fit: below FRAME_BYTES_MAX, which 24 bits hold.
    frame.extend_from_slice(&(bytes as u32).to_le_bytes());
    let tagged = head.len() as u32 | u32::from(channel.number()) << CHANNEL_SHIFT;
    frame.extend_from_slice(&tagged.to_le_bytes());
    frame.extend_from_slice(&head);
    frame.extend_from_slice(body);
    Ok(frame)
}

/// Reads the next frame; `None` when the peer closed between two frames.
///
/// # Errors
/// When the stream breaks inside a frame or the lengths are out of bounds.
///
/// # Cancel safety
/// None: a dropped read loses the bytes it had; only a task that owns the stream may call this.
pub(crate) async fn read<R: AsyncRead + Unpin>(
    stream: &mut R,
) -> Result<Option<Frame>, FrameError> {
    let mut lengths = [0_u8; LENGTHS];
    let mut filled = 0;
    while filled < LENGTHS {
        match stream.read(&mut lengths[filled..]).await? {
            0 if filled == 0 => return Ok(None),
            0 => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            count => filled += count,
        }
    }
    let [a, b, c, d, e, f, g, h] = lengths;
    let bytes = u32::from_le_bytes([a, b, c, d]) as usize;
    let head = u32::from_le_bytes([e, f, g, 0]) as usize;
    let channel = Channel::of(h).ok_or(FrameError::Garbled)?;
    if !(4..=FRAME_BYTES_MAX).contains(&bytes) || head > bytes - 4 {
        return Err(FrameError::TooLong { bytes });
    }
    let mut body = Vec::with_capacity((bytes - 4).min(2 << 20));
    let read = stream
        .take((bytes - 4) as u64)
        .read_to_end(&mut body)
        .await?;
    if read < bytes - 4 {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Some(Frame {
        bytes: body,
        head,
        channel,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_or_refused_but_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut stream = bytes.as_slice();
            while let Ok(Some(frame)) = block_on(read(&mut stream)) {
                let _ = frame.head::<(u64, String, Vec<u32>)>();
            }
        }

        #[test]
        fn what_was_encoded_is_read_back(head in any::<(u64, String)>(), body in proptest::collection::vec(any::<u8>(), 0..5000)) {
            for channel in [Channel::Trees, Channel::Pages] {
                let wire = encode_on(channel, &head, &body).unwrap();
                let frame = block_on(read(&mut wire.as_slice())).unwrap().unwrap();
                prop_assert_eq!(frame.channel(), channel);
            }
            let wire = encode(&head, &body).unwrap();
            let parcel = parcel(&head, body.clone()).unwrap();
            prop_assert_eq!(parcel.parts().concat(), wire.clone());
            let frame = block_on(read(&mut wire.as_slice())).unwrap().unwrap();
            prop_assert_eq!(frame.head::<(u64, String)>().unwrap(), head);
            prop_assert_eq!(frame.body(), body);
        }
    }

    #[test]
    fn a_frame_cut_short_is_an_error_and_a_closed_stream_is_not() {
        let wire = encode(&7_u8, b"body").unwrap();
        assert!(matches!(
            block_on(read(&mut &wire[..wire.len() - 1])),
            Err(FrameError::Broken(_))
        ));
        assert!(block_on(read(&mut &wire[..0])).unwrap().is_none());
    }
}
