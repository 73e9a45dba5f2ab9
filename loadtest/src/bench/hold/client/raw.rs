//! One exchange over raw TCP: eight bytes of id, four of length, so many bytes; the id comes back.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Fault;
use super::dial::Wire;
use super::notes::Place;
use crate::bench::hold::plan::{BODY_BYTES, Method};

pub(super) async fn exchange(wire: &mut Wire, place: &Place) -> Result<(), Fault> {
    let length = match place.method {
        Method::Get => 0,
        Method::Post => BODY_BYTES,
    };
    let mut request = place.id.to_be_bytes().to_vec();
    request.extend(u32::try_from(length).unwrap_or(0).to_be_bytes());
    request.resize(request.len() + length, b'b');
    wire.write_all(&request).await?;
    place.sent();
    let mut answer = [0; 8];
    match wire.read_exact(&mut answer).await {
        Ok(_) if answer == place.id.to_be_bytes() => Ok(()),
        Ok(_) => Err(Fault::Foreign),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(Fault::Closed),
        Err(error) => Err(error.into()),
    }
}
