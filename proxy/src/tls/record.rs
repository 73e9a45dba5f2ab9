//! The protection of one direction of an established session: a plaintext becomes a record, a record a plaintext.
//!
//! The cipher is aws-lc's; what is done here is the framing of RFC 8446 (section 5) and RFC 5246 (section 6.2.3.3,
//! with the nonces of RFC 5288 and RFC 7905). A sequence number is used once and never wraps. Nothing here knows
//! what a record says.

use std::io::IoSlice;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce as AeadNonce, UnboundKey,
};
use rustls::crypto::cipher::{AeadKey, Iv, NONCE_LEN, Nonce, make_tls12_aad, make_tls13_aad};
use rustls::{ConnectionTrafficSecrets, ContentType, ProtocolVersion};

use super::SessionError;

/// Type, version and length.
pub(super) const HEADER_BYTES: usize = 5;
/// Most plaintext a record may carry.
pub(super) const PLAIN_BYTES_MAX: usize = 16 * 1024;
/// What a record adds to its plaintext: header, explicit nonce or content type, tag.
pub(super) const RECORD_OVERHEAD: usize = HEADER_BYTES + EXPLICIT_BYTES + TAG_BYTES;

const TAG_BYTES: usize = 16;
/// The part of an AES-GCM nonce that TLS 1.2 sends along.
const EXPLICIT_BYTES: usize = 8;
/// Most that may follow a header: RFC 5246 leaves a cipher 2048 bytes of expansion, RFC 8446 only 256.
const PAYLOAD_BYTES_MAX_12: usize = PLAIN_BYTES_MAX + 2048;
const PAYLOAD_BYTES_MAX_13: usize = PLAIN_BYTES_MAX + 256;

/// How a nonce is made and what is authenticated with the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Tls13,
    /// The nonce is the implicit vector with the sequence number, as in TLS 1.3.
    Tls12,
    /// Part of the nonce travels in the record.
    Tls12Explicit,
}

/// The key of one direction and how often it has been used.
pub(super) struct Protection {
    key: LessSafeKey,
    iv: Iv,
    sequence: u64,
    shape: Shape,
}

impl Protection {
    pub(super) fn new(
        version: ProtocolVersion,
        sequence: u64,
        secrets: ConnectionTrafficSecrets,
    ) -> Result<Self, SessionError> {
        let tls13 = version == ProtocolVersion::TLSv1_3;
        let explicit = if tls13 {
            Shape::Tls13
        } else {
            Shape::Tls12Explicit
        };
        let implicit = if tls13 { Shape::Tls13 } else { Shape::Tls12 };
        let (algorithm, key, iv, shape): (_, AeadKey, Iv, Shape) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv, explicit),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv, explicit),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&CHACHA20_POLY1305, key, iv, implicit)
            }
            _ => return Err(SessionError::Cipher),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| SessionError::Cipher)?;
        Ok(Self {
            key: LessSafeKey::new(key),
            iv,
            sequence,
            shape,
        })
    }

    /// How many records have been protected with this key.
    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The number of the next record, used up with this call.
    fn next_sequence(&mut self) -> Result<u64, SessionError> {
        let sequence = self.sequence;
        self.sequence = sequence.checked_add(1).ok_or(SessionError::KeysUsedUp)?;
        Ok(sequence)
    }

    /// Appends one record with up to [`PLAIN_BYTES_MAX`] bytes of `text` behind `from`; says how many it took.
    pub(super) fn seal(
        &mut self,
        typ: ContentType,
        text: &[IoSlice<'_>],
        from: usize,
        out: &mut Vec<u8>,
    ) -> Result<usize, SessionError> {
        let sequence = self.next_sequence()?;
        let nonce = Nonce::new(&self.iv, sequence).0;
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        if self.shape == Shape::Tls12Explicit {
            out.extend_from_slice(&nonce[NONCE_LEN - EXPLICIT_BYTES..]);
        }
        let body = out.len();
        append(text, from, out);
        let plain = out.len() - body;
        let (outer, aad) = if self.shape == Shape::Tls13 {
            out.push(typ.into());
            let aad = make_tls13_aad(plain + 1 + TAG_BYTES);
            (ContentType::ApplicationData, Associated::Tls13(aad))
        } else {
            let aad = make_tls12_aad(sequence, typ, ProtocolVersion::TLSv1_2, plain);
            (typ, Associated::Tls12(aad))
        };
        let nonce = AeadNonce::assume_unique_for_key(nonce);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(aad), &mut out[body..])
            .map_err(|_| SessionError::Cipher)?;
        out.extend_from_slice(tag.as_ref());
        let length = u16::try_from(out.len() - start - HEADER_BYTES).unwrap_or(u16::MAX);
        out[start] = outer.into();
        out[start + 1..start + 3].copy_from_slice(&[3, 3]);
        out[start + 3..start + HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
        Ok(plain)
    }

    /// Decrypts a whole record in place.
    pub(super) fn open<'r>(
        &mut self,
        record: &'r mut [u8],
    ) -> Result<(ContentType, &'r [u8]), SessionError> {
        let sequence = self.next_sequence()?;
        let (header, payload) = record
            .split_at_mut_checked(HEADER_BYTES)
            .ok_or(SessionError::Malformed)?;
        let outer = ContentType::from(header[0]);
        match self.shape {
            Shape::Tls13 => self.open_13(outer, sequence, payload),
            Shape::Tls12 => {
                let nonce = Nonce::new(&self.iv, sequence).0;
                self.open_12(outer, sequence, nonce, payload)
            }
            Shape::Tls12Explicit => {
                let (explicit, payload) = payload
                    .split_at_mut_checked(EXPLICIT_BYTES)
                    .ok_or(SessionError::Undecipherable)?;
                let mut nonce = [0; NONCE_LEN];
                let (fixed, sent) = nonce.split_at_mut(NONCE_LEN - EXPLICIT_BYTES);
                fixed.copy_from_slice(&self.iv.as_ref()[..fixed.len()]);
                sent.copy_from_slice(explicit);
                self.open_12(outer, sequence, nonce, payload)
            }
        }
    }

    fn open_13<'r>(
        &self,
        outer: ContentType,
        sequence: u64,
        payload: &'r mut [u8],
    ) -> Result<(ContentType, &'r [u8]), SessionError> {
        if outer != ContentType::ApplicationData {
            return Err(SessionError::OutOfPlace);
        }
        let aad = Associated::Tls13(make_tls13_aad(payload.len()));
        let nonce = Nonce::new(&self.iv, sequence).0;
        let inner = self.decrypt(nonce, aad, payload)?;
        // The last byte that is not zero names the type; what follows it is padding.
        let end = inner
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or(SessionError::OutOfPlace)?;
        let typ = ContentType::from(inner[end]);
        check_plain(&inner[..end]).map(|text| (typ, text))
    }

    fn open_12<'r>(
        &self,
        typ: ContentType,
        sequence: u64,
        nonce: [u8; NONCE_LEN],
        payload: &'r mut [u8],
    ) -> Result<(ContentType, &'r [u8]), SessionError> {
        let plain = payload
            .len()
            .checked_sub(TAG_BYTES)
            .ok_or(SessionError::Undecipherable)?;
        let aad = make_tls12_aad(sequence, typ, ProtocolVersion::TLSv1_2, plain);
        let text = self.decrypt(nonce, Associated::Tls12(aad), payload)?;
        check_plain(text).map(|text| (typ, text))
    }

    fn decrypt<'r>(
        &self,
        nonce: [u8; NONCE_LEN],
        aad: Associated,
        payload: &'r mut [u8],
    ) -> Result<&'r [u8], SessionError> {
        let nonce = AeadNonce::assume_unique_for_key(nonce);
        self.key
            .open_in_place(nonce, Aad::from(aad), payload)
            .map(|text| &*text)
            .map_err(|_| SessionError::Undecipherable)
    }

    /// The length of the record at the front, header included, once all of it is there.
    pub(super) fn whole_record(&self, bytes: &[u8]) -> Result<Option<usize>, SessionError> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        if header[1] != 3 {
            return Err(SessionError::Malformed);
        }
        let payload = usize::from(u16::from_be_bytes([header[3], header[4]]));
        let most = match self.shape {
            Shape::Tls13 => PAYLOAD_BYTES_MAX_13,
            Shape::Tls12 | Shape::Tls12Explicit => PAYLOAD_BYTES_MAX_12,
        };
        if payload > most {
            return Err(SessionError::Overlong);
        }
        let whole = HEADER_BYTES + payload;
        Ok((bytes.len() >= whole).then_some(whole))
    }
}

/// What is authenticated with a text and not sent twice.
enum Associated {
    Tls12([u8; 13]),
    Tls13([u8; 5]),
}

impl AsRef<[u8]> for Associated {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Tls12(bytes) => bytes,
            Self::Tls13(bytes) => bytes,
        }
    }
}

fn check_plain(text: &[u8]) -> Result<&[u8], SessionError> {
    if text.len() > PLAIN_BYTES_MAX {
        return Err(SessionError::Overlong);
    }
    Ok(text)
}

/// Appends at most [`PLAIN_BYTES_MAX`] bytes of the slices, leaving out the first `from`.
fn append(slices: &[IoSlice<'_>], from: usize, out: &mut Vec<u8>) {
    let (mut skip, mut room) = (from, PLAIN_BYTES_MAX);
    for slice in slices {
        let behind = &slice[skip.min(slice.len())..];
        skip = skip.saturating_sub(slice.len());
        let taken = &behind[..behind.len().min(room)];
        out.extend_from_slice(taken);
        room -= taken.len();
    }
}
