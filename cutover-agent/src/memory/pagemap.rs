//! The files CRIU restores memory from, as bytes: `pagemap-PID.img` and `pagemap-shmem-ID.img`. Two magic words, then
//! protobuf messages behind their lengths; field numbers are those of CRIU's `images/pagemap.proto`.

use super::wire::{ImageHead, ImageId, Region};
use crate::criu::protobuf::{self, Value};

const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;

/// Varint fields of `pagemap_head` and `pagemap_entry`.
const PAGES_ID: u64 = 1;
const ADDRESS: u64 = 1;
const PAGES: u64 = 2;
const FLAGS: u64 = 4;

/// The name of an image's pagemap.
pub(crate) fn name(id: ImageId) -> String {
    match id {
        ImageId::Process(number) => format!("pagemap-{number}.img"),
        ImageId::Shared(number) => format!("pagemap-shmem-{number}.img"),
    }
}

/// The name of the file with the pages of image `number`, counted from 1.
pub(crate) fn pages_name(number: u32) -> String {
    format!("pages-{number}.img")
}

/// The pagemap of image `number`.
pub(crate) fn encode(number: u32, head: &ImageHead) -> Vec<u8> {
    let mut file = Vec::with_capacity(16 + head.regions.len() * 24);
    file.extend_from_slice(&COMMON_MAGIC.to_le_bytes());
    file.extend_from_slice(&PAGEMAP_MAGIC.to_le_bytes());
    message(&mut file, &[(PAGES_ID, u64::from(number))]);
    for Region {
        address,
        pages,
        flags,
    } in &head.regions
    {
        let fields = [
            (ADDRESS, *address),
            (PAGES, u64::from(*pages)),
            (FLAGS, u64::from(*flags)),
        ];
        message(&mut file, &fields);
    }
    file
}

fn message(file: &mut Vec<u8>, fields: &[(u64, u64)]) {
    let mut body = Vec::with_capacity(24);
    for (field, value) in fields {
        protobuf::put(&mut body, *field, Value::Number(*value));
    }
    // Three varints at most.
    file.extend_from_slice(&(body.len() as u32).to_le_bytes());
    file.extend_from_slice(&body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pagemap_is_byte_for_byte_what_criu_writes() {
        let head = ImageHead {
            id: ImageId::Process(1),
            pages: 2,
            regions: vec![Region {
                address: 0x40_0000,
                pages: 2,
                flags: 4,
            }],
        };
        let expected = [
            0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, // magic words
            2, 0, 0, 0, 0x08, 3, // pages_id = 3
            9, 0, 0, 0, 0x08, 0x80, 0x80, 0x80, 0x02, 0x10, 2, 0x20, 4,
        ];
        assert_eq!(encode(3, &head), expected);
        assert_eq!(name(head.id), "pagemap-1.img");
        assert_eq!(name(ImageId::Shared(7)), "pagemap-shmem-7.img");
        assert_eq!(pages_name(3), "pages-3.img");
    }
}
