//! Connection ids that say who they belong to: which process and which worker of it.
//!
//! Twelve bytes: seven random ones, and five that hold the process's generation, the worker and a check byte,
//! masked by a key that only we have. RFC 9000 (section 5.1) wants ids of one connection not to be linked by an
//! observer, so nothing of the place is visible; the mask is AES of the random bytes, as QUIC itself masks packet
//! numbers. The check byte keeps ids that clients invent from being read as a place: it proves nothing, and need
//! not, since a packet that is handed to the wrong place is merely one that nobody there can decrypt.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::aead::quic::HeaderProtectionKey;
use quinn::{ConnectionId, ConnectionIdGenerator};

/// Length of every connection id we choose.
pub(crate) const ID_BYTES: usize = 12;
const NONCE_BYTES: usize = 7;
/// What the last byte is, unmasked.
const CHECK: u8 = 0x68;
/// Bit of the first byte: a long header, which says the length of its connection ids (RFC 8999, section 5.1).
const LONG_HEADER: u8 = 0x80;
/// Where the length of the destination's id stands in a long header, behind first byte and version.
const LENGTH_AT: usize = 5;

/// Which of the processes that share one address, old and new, during an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation(pub(crate) u16);

impl Generation {
    /// Of a process that follows none. A number taken at random: what clients of a killed process still send is
    /// then not mistaken for ours, and is answered with a stateless reset.
    pub(crate) fn first() -> Self {
        let mut bytes = [0; 2];
        // Without randomness zero is as good a number as any.
        aws_lc_rs::rand::fill(&mut bytes).ok();
        Self(u16::from_be_bytes(bytes))
    }

    /// Of the process that follows this one.
    pub(crate) const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// Whom a connection belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) generation: Generation,
    pub(crate) worker: u16,
}

/// Whom a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Addressee {
    /// The connection id is one of ours.
    Place(Place),
    /// The client chose the id: its first packets, which whoever gets them may answer.
    Anyone,
    /// An id that neither we nor a client at its beginning would use.
    Nobody,
}

/// Writes and reads places. Processes that follow each other share its key.
pub(crate) struct PlaceCodec {
    key: HeaderProtectionKey,
}

impl fmt::Debug for PlaceCodec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PlaceCodec")
    }
}

impl PlaceCodec {
    pub(crate) const fn new(key: HeaderProtectionKey) -> Self {
        Self { key }
    }

    /// A new id for this place.
    fn id(&self, place: Place) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        let (nonce, rest) = id.split_at_mut(NONCE_BYTES);
        // Ids need to differ, not to be secret; a repeated one is noticed by the endpoint.
        aws_lc_rs::rand::fill(nonce).ok();
        let [g0, g1] = place.generation.0.to_be_bytes();
        let [w0, w1] = place.worker.to_be_bytes();
        let mask = self.mask(nonce);
        for ((out, plain), mask) in rest.iter_mut().zip([g0, g1, w0, w1, CHECK]).zip(mask) {
            *out = plain ^ mask;
        }
        id
    }

    /// The place an id names, unless it is none of ours.
    pub(crate) fn place(&self, id: &[u8]) -> Option<Place> {
        if id.len() != ID_BYTES {
            return None;
        }
        let (nonce, rest) = id.split_at(NONCE_BYTES);
        let mut plain = self.mask(nonce);
        for (plain, masked) in plain.iter_mut().zip(rest) {
            *plain ^= masked;
        }
        let [g0, g1, w0, w1, check] = plain;
        (check == CHECK).then(|| Place {
            generation: Generation(u16::from_be_bytes([g0, g1])),
            worker: u16::from_be_bytes([w0, w1]),
        })
    }

    /// The place a packet is addressed to.
    pub(crate) fn addressee(&self, packet: &[u8]) -> Addressee {
        let is_long = packet.first().is_some_and(|first| first & LONG_HEADER != 0);
        match destination(packet).and_then(|id| self.place(id)) {
            Some(place) => Addressee::Place(place),
            None if is_long => Addressee::Anyone,
            None => Addressee::Nobody,
        }
    }

    fn mask(&self, nonce: &[u8]) -> [u8; 5] {
        let mut sample = [0; 16];
        sample[..NONCE_BYTES].copy_from_slice(nonce);
        // Only a sample of another length is an error.
        self.key.new_mask(&sample).unwrap_or_default()
    }
}

/// The destination connection id of the first QUIC packet of a datagram, as far as it can be one of ours.
fn destination(packet: &[u8]) -> Option<&[u8]> {
    let (first, _) = packet.split_first()?;
    if first & LONG_HEADER == 0 {
        return packet.get(1..=ID_BYTES);
    }
    let length = usize::from(*packet.get(LENGTH_AT)?);
    let start = LENGTH_AT + 1;
    (length == ID_BYTES)
        .then(|| packet.get(start..start + ID_BYTES))
        .flatten()
}

/// Makes the ids of one endpoint. It need not tell good ids from bad: the demultiplexer has done so.
#[derive(Debug)]
pub(crate) struct PlacedIds {
    pub(crate) codec: Arc<PlaceCodec>,
    pub(crate) place: Place,
}

impl ConnectionIdGenerator for PlacedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&self.codec.id(self.place))
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

#[cfg(test)]
pub(super) mod tests {
    use aws_lc_rs::aead::quic::AES_128;
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn codec() -> PlaceCodec {
        PlaceCodec::new(HeaderProtectionKey::new(&AES_128, &[7; 16]).unwrap())
    }

    /// A packet with a short header, addressed to this place.
    pub(crate) fn short_packet(codec: &PlaceCodec, generation: u16, worker: u16) -> Vec<u8> {
        let place = Place {
            generation: Generation(generation),
            worker,
        };
        let mut packet = vec![0x40];
        packet.extend_from_slice(&codec.id(place));
        packet.extend_from_slice(&[0; 40]);
        packet
    }

    fn long_packet(id: &[u8]) -> Vec<u8> {
        let mut packet = vec![0xe0, 0, 0, 0, 1, u8::try_from(id.len()).unwrap()];
        packet.extend_from_slice(id);
        packet.extend_from_slice(&[0; 40]);
        packet
    }

    proptest! {
        #[test]
        fn the_place_that_went_into_an_id_comes_out(generation: u16, worker: u16) {
            let codec = codec();
            let place = Place { generation: Generation(generation), worker };
            let id = codec.id(place);
            prop_assert_eq!(codec.place(&id), Some(place));
            prop_assert_eq!(codec.addressee(&long_packet(&id)), Addressee::Place(place));
            let short = short_packet(&codec, generation, worker);
            prop_assert_eq!(codec.addressee(&short), Addressee::Place(place));
        }

        #[test]
        fn no_packet_is_too_short_or_strange_to_be_looked_at(packet: Vec<u8>) {
            codec().addressee(&packet);
        }
    }

    #[test]
    fn ids_of_one_place_have_nothing_in_common() {
        let codec = codec();
        let place = Place {
            generation: Generation(1),
            worker: 1,
        };
        let ids: Vec<_> = (0..64).map(|_| codec.id(place)).collect();
        for at in 0..ID_BYTES {
            assert!(ids.iter().any(|id| id[at] != ids[0][at]), "byte {at}");
        }
    }

    #[test]
    fn ids_that_a_client_chose_or_a_stranger_made_name_no_place() {
        let codec = codec();
        assert_eq!(codec.addressee(&long_packet(&[1; 8])), Addressee::Anyone);
        assert_eq!(codec.addressee(&long_packet(&[1; 20])), Addressee::Anyone);
        assert_eq!(codec.addressee(&[]), Addressee::Nobody);
        let stranger = PlaceCodec::new(HeaderProtectionKey::new(&AES_128, &[8; 16]).unwrap());
        let taken_for_ours = (0..512)
            .filter(|_| codec.addressee(&short_packet(&stranger, 1, 1)) != Addressee::Nobody)
            .count();
        assert!(
            taken_for_ours < 16,
            "one in 256, not {taken_for_ours} in 512"
        );
    }
}
