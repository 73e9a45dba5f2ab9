//! An established TLS session: what is left of a handshake once it is over, and all that an idle connection keeps.
//!
//! It turns plaintext into records and records into plaintext, and answers what a peer may still say besides data:
//! alerts, key updates, tickets. It never touches a socket, and it never grows with what a peer sends.

use std::io::IoSlice;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ContentType, ExtractedSecrets, HandshakeType, ProtocolVersion};

use super::record::{Protection, RECORD_OVERHEAD};

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// Wrong key, or bytes changed on the way.
    #[error("a record does not decrypt")]
    Undecipherable,
    /// More bytes than the protocol allows.
    #[error("a record is longer than TLS allows")]
    Overlong,
    /// A message of a kind that may not come now.
    #[error("the peer sent a message that has no place in an established session")]
    OutOfPlace,
    /// Not TLS.
    #[error("the peer sent something that is not TLS")]
    Malformed,
    /// The peer gave up.
    #[error("the peer ended the session with the alert {0:?}")]
    Alert(AlertDescription),
    /// TLS 1.2 has no way to renew keys.
    #[error("the keys of the session are used up")]
    KeysUsedUp,
    /// A cipher that we did not offer.
    #[error("the cipher failed")]
    Cipher,
    /// The handshake, or what of it comes later.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

impl SessionError {
    /// What the peer is told, unless it knows already.
    const fn alert(&self) -> Option<AlertDescription> {
        match self {
            Self::Undecipherable => Some(AlertDescription::BadRecordMac),
            Self::Overlong => Some(AlertDescription::RecordOverflow),
            Self::OutOfPlace => Some(AlertDescription::UnexpectedMessage),
            Self::Malformed => Some(AlertDescription::DecodeError),
            Self::Cipher | Self::Rustls(_) => Some(AlertDescription::InternalError),
            Self::Alert(_) | Self::KeysUsedUp => None,
        }
    }
}

/// Which records a peer may send that carry nothing for us, one after the other. Each costs us a decryption.
const IDLE_RECORDS_MAX: u8 = 32;
/// Longest message after the handshake; tickets with many extensions are about 2 KiB.
const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// Records under one AES-GCM key before it is replaced: far below the 2^24 of RFC 8446, section 5.5.
const RECORDS_PER_KEY: u64 = 1 << 23;

const WARNING: u8 = 1;
const FATAL: u8 = 2;
const KEY_UPDATE_HEADER: [u8; 4] = [24, 0, 0, 1];

/// What a record was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received<'r> {
    /// Bytes of the peer's application.
    Data(&'r [u8]),
    /// Something between the two sessions.
    Nothing,
    /// The peer will send no more.
    Closed,
}

/// What rustls still does after a handshake: derive the next keys, keep tickets.
pub(super) enum Keys {
    Server(KernelConnection<ServerConnectionData>),
    Client(KernelConnection<ClientConnectionData>),
}

/// An established session.
pub(super) struct Session {
    keys: Keys,
    version: ProtocolVersion,
    sending: Protection,
    receiving: Protection,
    /// The beginning of a message that comes in several records.
    message: Vec<u8>,
    /// Records in a row without data.
    idle_records: u8,
    records_per_key: u64,
}

impl Session {
    pub(super) fn new(keys: Keys, secrets: ExtractedSecrets) -> Result<Self, SessionError> {
        let version = match &keys {
            Keys::Server(keys) => keys.protocol_version(),
            Keys::Client(keys) => keys.protocol_version(),
        };
        let ExtractedSecrets { tx, rx } = secrets;
        Ok(Self {
            keys,
            version,
            sending: Protection::new(version, tx.0, tx.1)?,
            receiving: Protection::new(version, rx.0, rx.1)?,
            message: Vec::new(),
            idle_records: 0,
            records_per_key: RECORDS_PER_KEY,
        })
    }

    #[cfg(test)]
    pub(super) const fn renew_keys_after(&mut self, records: u64) {
        self.records_per_key = records;
    }

    /// The length of the record at the front of what was received, once all of it is there.
    pub(super) fn whole_record(&self, bytes: &[u8]) -> Result<Option<usize>, SessionError> {
        self.receiving.whole_record(bytes)
    }

    /// Appends records with the first `most` bytes of the slices, or all of them; says how many it took.
    pub(super) fn seal(
        &mut self,
        slices: &[IoSlice<'_>],
        most: usize,
        out: &mut Vec<u8>,
    ) -> Result<usize, SessionError> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        out.reserve(most.min(length) + RECORD_OVERHEAD);
        let mut taken = 0;
        while taken < length && taken < most {
            self.renew_before_limit(out)?;
            taken += self
                .sending
                .seal(ContentType::ApplicationData, slices, taken, out)?;
        }
        Ok(taken)
    }

    fn renew_before_limit(&mut self, out: &mut Vec<u8>) -> Result<(), SessionError> {
        if self.sending.sequence() < self.records_per_key {
            return Ok(());
        }
        if self.version != ProtocolVersion::TLSv1_3 {
            return Err(SessionError::KeysUsedUp);
        }
        self.update_sending(out)
    }

    /// Tells the peer that our next record is under the next key, and changes to it.
    fn update_sending(&mut self, out: &mut Vec<u8>) -> Result<(), SessionError> {
        let [typ, a, b, c] = KEY_UPDATE_HEADER;
        self.say(ContentType::Handshake, &[typ, a, b, c, 0], out)?;
        let (sequence, secrets) = match &mut self.keys {
            Keys::Server(keys) => keys.update_tx_secret()?,
            Keys::Client(keys) => keys.update_tx_secret()?,
        };
        self.sending = Protection::new(self.version, sequence, secrets)?;
        Ok(())
    }

    fn update_receiving(&mut self) -> Result<(), SessionError> {
        let (sequence, secrets) = match &mut self.keys {
            Keys::Server(keys) => keys.update_rx_secret()?,
            Keys::Client(keys) => keys.update_rx_secret()?,
        };
        self.receiving = Protection::new(self.version, sequence, secrets)?;
        Ok(())
    }

    fn say(
        &mut self,
        typ: ContentType,
        text: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), SessionError> {
        self.sending.seal(typ, &[IoSlice::new(text)], 0, out)?;
        Ok(())
    }

    /// Appends our last word.
    pub(super) fn close(&mut self, out: &mut Vec<u8>) -> Result<(), SessionError> {
        let alert = [WARNING, AlertDescription::CloseNotify.into()];
        self.say(ContentType::Alert, &alert, out)
    }

    /// Appends why we give up, as far as the peer may know.
    pub(super) fn give_up(&mut self, error: &SessionError, out: &mut Vec<u8>) {
        if let Some(alert) = error.alert() {
            // The session is over whether or not it can still say so.
            self.say(ContentType::Alert, &[FATAL, alert.into()], out)
                .ok();
        }
    }

    /// Takes in a whole record, in place. What has to be answered goes behind `replies`.
    pub(super) fn open<'r>(
        &mut self,
        record: &'r mut [u8],
        replies: &mut Vec<u8>,
    ) -> Result<Received<'r>, SessionError> {
        let (typ, text) = self.receiving.open(record)?;
        if typ == ContentType::ApplicationData && self.message.is_empty() && !text.is_empty() {
            self.idle_records = 0;
            return Ok(Received::Data(text));
        }
        self.idle_records += 1;
        if self.idle_records > IDLE_RECORDS_MAX {
            return Err(SessionError::OutOfPlace);
        }
        match typ {
            // Nothing may come between the records of one message.
            ContentType::ApplicationData | ContentType::Alert if !self.message.is_empty() => {
                Err(SessionError::OutOfPlace)
            }
            ContentType::ApplicationData => Ok(Received::Nothing),
            ContentType::Alert => self.heed_alert(text),
            ContentType::Handshake if !text.is_empty() => {
                self.message.extend_from_slice(text);
                self.heed_messages(replies)?;
                Ok(Received::Nothing)
            }
            _ => Err(SessionError::OutOfPlace),
        }
    }

    fn heed_alert<'r>(&self, text: &[u8]) -> Result<Received<'r>, SessionError> {
        let &[level, description] = text else {
            return Err(SessionError::Malformed);
        };
        let tls13 = self.version == ProtocolVersion::TLSv1_3;
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => Ok(Received::Closed),
            AlertDescription::UserCanceled => Ok(Received::Nothing),
            // TLS 1.3 knows no other warnings (RFC 8446, section 6).
            _ if level == WARNING && !tls13 => Ok(Received::Nothing),
            other => Err(SessionError::Alert(other)),
        }
    }

    fn heed_messages(&mut self, replies: &mut Vec<u8>) -> Result<(), SessionError> {
        while let Some(&[typ, a, b, c]) = self.message.first_chunk::<4>() {
            let [_, a, b, c] = [0, a, b, c].map(usize::from);
            let end = 4 + (a << 16 | b << 8 | c);
            if end > MESSAGE_BYTES_MAX {
                return Err(SessionError::Overlong);
            }
            if self.message.len() < end {
                return Ok(());
            }
            let mut message = std::mem::take(&mut self.message);
            let rest = message.split_off(end);
            self.heed_message(HandshakeType::from(typ), &message[4..], &rest, replies)?;
            self.message = rest;
        }
        Ok(())
    }

    fn heed_message(
        &mut self,
        typ: HandshakeType,
        text: &[u8],
        rest: &[u8],
        replies: &mut Vec<u8>,
    ) -> Result<(), SessionError> {
        let tls13 = self.version == ProtocolVersion::TLSv1_3;
        match (typ, &mut self.keys) {
            (HandshakeType::KeyUpdate, _) if tls13 => {
                // What follows must be under the new key.
                if !rest.is_empty() {
                    return Err(SessionError::OutOfPlace);
                }
                let &[request @ (0 | 1)] = text else {
                    return Err(SessionError::Malformed);
                };
                self.update_receiving()?;
                // One answer serves all requests that came before it left us (RFC 8446, section 4.6.3).
                if request == 1 && replies.is_empty() {
                    self.update_sending(replies)?;
                }
                Ok(())
            }
            (HandshakeType::NewSessionTicket, Keys::Client(keys)) if tls13 => {
                Ok(keys.handle_new_session_ticket(text)?)
            }
            // A wish to start over is declined (RFC 5246, section 7.2.2).
            (HandshakeType::HelloRequest, Keys::Client(_))
            | (HandshakeType::ClientHello, Keys::Server(_))
                if !tls13 =>
            {
                let alert = [WARNING, AlertDescription::NoRenegotiation.into()];
                self.say(ContentType::Alert, &alert, replies)
            }
            _ => Err(SessionError::OutOfPlace),
        }
    }
}
